"""Letters between two processes on one machine, as files that appear whole by a rename.

Flower starts a process for every message that a member is sent. It puts the request in here, and
what stays answers it: a client's worker, which holds its data, or the server of the federation
below. Either may be killed and started again in between.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hansa.federation.engines.flower.exchange import (
    Answer,
    LetterError,
    Request,
    from_bytes,
    to_bytes,
)
from hansa.files import write_atomic

_PAUSE = 0.1  # seconds between looks
_KEPT = 86_400.0  # seconds that an answer waits for whoever asked


class Mailbox:
    """A folder with requests and the answers to them, each named by the request's digest."""

    def __init__(self, folder: Path) -> None:
        self.charter = folder / "federation.toml"
        """The federation's settings as its server handed them out, where they are needed."""
        self._requests, self._answers = folder / "requests", folder / "answers"
        for each in (self._requests, self._answers):
            each.mkdir(parents=True, exist_ok=True)

    def hand_out(self, settings: Path) -> None:
        """Leave the federation's settings where a client's worker finds them."""
        content = settings.read_bytes()
        if not self.charter.exists() or self.charter.read_bytes() != content:
            write_atomic(self.charter, content)

    def ask(self, request: Request, seconds: float) -> Answer | None:
        """Put a request in and wait for its answer; None where there is none after that time."""
        path = self._answers / request.digest
        # An answer to the same request that nobody came for may stand on what was undone since.
        path.unlink(missing_ok=True)
        asked, until = self._requests / request.digest, time.monotonic() + seconds
        while time.monotonic() < until:
            if path.exists():
                answer = from_bytes(Answer, path.read_bytes())
                path.unlink(missing_ok=True)
                return answer
            if not asked.exists():  # not yet, or taken for one that was answered before
                write_atomic(asked, to_bytes(request))
            time.sleep(_PAUSE)
        asked.unlink(missing_ok=True)  # nobody waits for it any more
        return None

    def requests(self) -> Iterator[Request | None]:
        """Yield requests as they come, and None whenever there is none for a while."""
        while True:
            found = {}
            for path in self._requests.iterdir():
                with suppress(FileNotFoundError):
                    if not path.name.startswith("."):
                        found[path] = path.stat().st_mtime_ns
            for path in sorted(found, key=lambda path: found[path]):
                with suppress(FileNotFoundError):
                    try:
                        request = from_bytes(Request, path.read_bytes())
                    except LetterError:
                        path.unlink(missing_ok=True)
                        continue
                    yield request
            if not found:
                time.sleep(_PAUSE)
                yield None

    def reply(self, request: Request, answer: Answer) -> None:
        """Answer a request, which is then done with."""
        path = self._answers / request.digest
        write_atomic(path, to_bytes(answer))
        (self._requests / request.digest).unlink(missing_ok=True)
        with suppress(FileNotFoundError):  # it may have been fetched by now
            written = path.stat().st_mtime  # not the clock, by which it may be old at once
            for old in self._answers.iterdir():  # whoever asked for these was killed
                with suppress(FileNotFoundError):
                    if written - old.stat().st_mtime > _KEPT:
                        old.unlink()
