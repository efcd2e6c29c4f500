"""Requests and answers as Flower's records: a line of text and an array of bytes.

The array is cut into objects of 5 MB by Flower, each sent on its own and known by its hash: a
message that many children are sent is stored once, and what was sent before an interruption is
not sent again.
"""

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from hansa.federation.engines.flower.exchange import (
    Answer,
    Letter,
    LetterError,
    Request,
    about,
    letter,
)

_NAME = "hansa"
TYPES = {"train": "train", "score": "evaluate", "hello": "query", "end": "query.end"}
"""Flower's type of message for each kind of request."""


def to_records(letter: Request | Answer) -> RecordDict:
    """Return a request or an answer as Flower's records."""
    records = {_NAME: ConfigRecord({"about": about(letter)})}
    content = RecordDict(dict(records))
    if letter.body:
        array = Array("uint8", (len(letter.body),), "hansa.message", letter.body)
        content["message"] = ArrayRecord({"body": array})
    return content


def from_records(kind: type[Letter], content: RecordDict) -> Letter:
    """Return the request or answer that records stand for.

    Raises:
        LetterError: they stand for none.
    """
    try:
        text = content.config_records[_NAME]["about"]
    except KeyError as error:
        raise LetterError("records that Hansa did not write") from error
    if not isinstance(text, str):
        raise LetterError("records that Hansa did not write")
    arrays = content.array_records.get("message")
    body = arrays["body"].data if arrays is not None and "body" in arrays else b""
    return letter(kind, text, body)
