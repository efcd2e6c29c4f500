"""What passes between a parent and a child on two machines, as bytes.

A request names run, node and round, so that a child can answer it once and recognise it when it
comes again, and says up to which round its parent has this child's replies. The body is a message
in Hansa's own encoding. Nothing here needs PyTorch, which takes seconds to import: Flower starts a
process for every message.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_args

if TYPE_CHECKING:
    from hansa.federation.leaf import Metrics
    from hansa.federation.participation import Fate

Kind = Literal["hello", "train", "score", "end"]
Status = Literal["ok", "diverged", "refused"]
MOST_ROUNDS = 1 << 63
"""What tables and names of files can hold."""
VERSION = 1
"""Of requests and answers; both sides must have the same."""


class LetterError(ValueError):
    """Bytes that are no request or answer, or one of another version."""


class LostError(Exception):
    """An answer that did not come, or that is of no use."""

    def __init__(self, fate: "Fate", why: str) -> None:
        super().__init__(why)
        self.fate: Fate = fate


@dataclass(frozen=True)
class Request:
    """What a parent asks of a child.

    Attributes:
        kind: ``train``: a round of local training, or of the federation below; ``score``: the
            child's scores; ``hello``: who it is; ``end``: the run is over.
        run: the run, as its server named it.
        path: the child.
        round: the round, counted from 1.
        known: the last round whose reply the parent has kept; what the child did later is undone.
        body: the encoded message, empty for an empty one.
    """

    kind: Kind
    run: str
    path: str
    round: int = 0
    known: int = 0
    body: bytes = b""

    @property
    def digest(self) -> str:
        """What a repeated request has in common with the first."""
        about = f"{self.kind} {self.run} {self.path} {self.round} "
        return sha256(about.encode() + self.body).hexdigest()


@dataclass(frozen=True)
class Answer:
    """What a child answers.

    Attributes:
        path: the child.
        round: the round that was asked for.
        status: ``ok``; ``diverged``: its loss is no number; ``refused``: see ``error``.
        error: why there is no reply.
        metrics: of its training, or its scores as ``SPLIT/METRIC``, as (sum, count).
        facts: who it is (``hello``).
        body: the encoded reply, empty for an empty one.
    """

    path: str
    round: int = 0
    status: Status = "ok"
    error: str = ""
    metrics: "Metrics" = field(default_factory=dict)
    facts: Mapping[str, str | int] = field(default_factory=dict)
    body: bytes = b""


Letter = TypeVar("Letter", Request, Answer)
Ticket = str
"""What a sent request is known by until its answer is taken."""


class Post(Protocol):
    """Carries requests to children and their answers back."""

    name: str

    def present(self, children: Sequence[str]) -> list[str]:
        """Return those of the children that can be reached now, in order."""
        ...

    def send(self, request: Request) -> Ticket:
        """Send a request on its way, and do not wait.

        Raises:
            LostError: the child cannot be reached.
        """
        ...

    def take(self, ticket: Ticket, until: float) -> Answer:
        """Wait for an answer.

        Args:
            ticket: what ``send`` returned.
            until: when it is too late, in seconds of ``time.monotonic``.

        Raises:
            LostError: it is late, or the child failed.
        """
        ...


def about(letter: Request | Answer) -> str:
    """Return everything but the body, as JSON."""
    facts = asdict(letter)
    del facts["body"]
    return json.dumps({"version": VERSION, **facts})


def letter(kind: type[Letter], text: str, body: bytes) -> Letter:
    """Return the request or answer that ``about`` and a body stand for.

    Raises:
        LetterError: the text is none, or of another version.
    """
    try:
        facts = json.loads(text)
        version = facts.pop("version")
        if version != VERSION:
            raise LetterError(f"version {version} of requests and answers is not {VERSION}")
        made = kind(**facts, body=body)
        _check(made)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise LetterError(f"malformed: {error}") from error
    return made


def _check(made: Request | Answer) -> None:
    """Refuse values of other kinds than the fields'; they come from another machine."""
    common = isinstance(made.path, str) and type(made.round) is int
    common = common and 0 <= made.round < MOST_ROUNDS
    if isinstance(made, Request):
        fits = made.kind in get_args(Kind) and isinstance(made.run, str)
        fits = fits and type(made.known) is int and 0 <= made.known < MOST_ROUNDS
        f"{made.path}{made.run}".encode()  # or it has no digest
    else:
        fits = made.status in get_args(Status) and isinstance(made.error, str)
        fits = fits and all(_is_metric(pair) for pair in made.metrics.values())
        fits = fits and all(isinstance(value, str | int) for value in made.facts.values())
        metrics = {n: (float(a), float(b)) for n, (a, b) in made.metrics.items()}
        object.__setattr__(made, "metrics", metrics)
        f"{made.path}{made.error}{''.join(metrics)}".encode()  # or no table could hold them
    if not (common and fits):
        raise ValueError("a field of another kind")


def _is_metric(pair: Any) -> bool:
    return len(pair) == 2 and all(type(x) in (int, float) and math.isfinite(x) for x in pair)


def to_bytes(letter: Request | Answer) -> bytes:
    """Return a request or an answer as one string of bytes, for a file."""
    return about(letter).encode() + b"\n" + letter.body


def from_bytes(kind: type[Letter], data: bytes) -> Letter:
    """Return the request or answer that the bytes stand for.

    Raises:
        LetterError: they stand for none.
    """
    text, _, body = data.partition(b"\n")
    try:
        return letter(kind, text.decode(), body)
    except UnicodeDecodeError as error:
        raise LetterError(f"malformed: {error}") from error
