"""What the proxy writes down: a line for each response that a rule of its plan is for.

A line holds digests and places, and no value of a body, no query, no header.
"""

import json
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from hansa.audit.paths import written
from hansa.audit.redact import HIDDEN, Redactor
from hansa.audit.tamper import Edit
from hansa.errors import InputError

_TOKEN = re.compile(r"(?=[^/]*\d)(?=[^/]*[A-Za-z])[A-Za-z0-9_=:.~-]{20,}")


class ProxyLog:
    """A file with one JSON object a line, each written as soon as it is known.

    Args:
        path: the file; lines are appended to it.
        redactor: takes what is known as secret out of lines.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: Path, redactor: Redactor | None = None) -> None:
        self.path, self._redactor = path, redactor or Redactor()
        self.counts: Counter[str] = Counter()
        """Responses by what became of them: edited, passed, refused, failed, other."""
        try:
            self._file: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError("--log", f"{path} ({error.strerror})", "a file to write") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def edited(
        self,
        asked: "Asked",
        *,
        status: int,
        edits: Sequence[Edit],
        before: str,
        after: str,
        seed: int,
    ) -> None:
        """Write that a response was edited; digests are of bodies without their encoding."""
        places = [{"operator": e.operator, "path": written(e.path)} for e in edits]
        about = {"status": status, "seed": seed, "before": before, "after": after}
        self._line(asked, "edited", {**about, "edits": places})

    def passed(self, asked: "Asked", status: int, reason: str) -> None:
        """Write that a response went as it came, though a rule is for it, and why."""
        self._line(asked, "passed", {"status": status, "reason": reason})

    def refused(self, asked: "Asked", reason: str) -> None:
        """Write that the proxy gave an answer of its own in the place of the service's."""
        self._line(asked, "refused", {"reason": reason})

    def failed(self, asked: "Asked", reason: str) -> None:
        """Write that the service gave no answer, or half of one."""
        self._line(asked, "failed", {"reason": reason})

    def other(self) -> None:
        """Count a response that no rule is for."""
        self.counts["other"] += 1

    def _line(self, asked: "Asked", result: str, about: Mapping[str, Any]) -> None:
        self.counts[result] += 1
        entry = {
            "id": secrets.token_hex(8),
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "method": asked.method,
            "route": asked.shown(self._redactor),
            "result": result,
            **about,
        }
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()


class Asked:
    """A request, as much of it as the log may know.

    Args:
        method: its method.
        route: its path, without the query.
        query: its query, of which nothing is written; what it names as secret is hidden in the
            path, too.
        headers: its headers, likewise.
    """

    def __init__(self, method: str, route: str, query: str, headers: Mapping[str, str]) -> None:
        self.method, self.route = method, route
        self._query, self._headers = query, headers

    def shown(self, redactor: Redactor) -> str:
        """Return the path without secrets, and without parts that look like keys."""
        own = Redactor(environment={})
        own.learn_headers(self._headers)
        own.learn_url(f"http://host/?{self._query}")
        return _TOKEN.sub(HIDDEN, own.text(redactor.text(self.route)))
