"""A user's own traffic as cases: recorded once, without its secrets, and replayed as it was.

A record is a case as ``cases.case_from`` takes it, one a line. The responses are frozen with it, so
that both arms of an audit see the same one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hansa.audit.cases import Case, Field, case_from
from hansa.audit.entities import Label, recognise
from hansa.audit.matching import Kind, Value
from hansa.audit.paths import look, parse
from hansa.audit.redact import Redactor
from hansa.audit.tamper import decoded
from hansa.errors import InputError

KINDS: Mapping[Label, Kind] = {
    "DATE": "date",
    "PERSON": "person",
    "ORG": "organisation",
    "GPE": "place",
}


class Recorder:
    """Appends cases to a file.

    Args:
        path: the file; it is made where it is not there.
        redactor: takes secrets out of what is written.
    """

    def __init__(self, path: Path, redactor: Redactor | None = None) -> None:
        self.path, self._redactor = path, redactor or Redactor()

    def record(
        self,
        question: str,
        request: Mapping[str, Any],
        body: bytes,
        paths: Sequence[str],
        *,
        unit: str = "",
        label: Label | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Case:
        """Append one question with its response, and return the case that it became.

        Args:
            question: what the user asked.
            request: ``method`` and ``url``, and ``time`` in seconds since 1970 if known.
            body: the response's body.
            paths: the fields that answer the question.
            unit: of a number.
            label: where the answer is a piece of a text: DATE, PERSON, ORG or GPE, of which the
                first is taken.
            headers: the request's headers, whose secrets are then known and hidden.

        Raises:
            InputError: a body that is not JSON, or a path that it does not have.
        """
        self._redactor.learn_headers(headers or {})
        self._redactor.learn_url(str(request.get("url", "")))
        document = decoded(body)
        truth, fields = _found(document, [parse(path) for path in paths], unit, label)
        num = len(self.path.read_text().splitlines()) if self.path.exists() else 0
        case = Case(
            id=f"{self.path.stem}-{num:05d}",
            domain=self.path.stem,
            question=question,
            request=dict(request),
            document=document,
            fields=fields,
            truth=truth,
        )
        entry = self._redactor.values(case.as_json())
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        return case_from(entry, case.domain, f"{self.path}:{num + 1}")


def _found(
    document: Any, paths: Sequence[Any], unit: str, label: Label | None
) -> tuple[Value, tuple[Field, ...]]:
    if not paths:
        raise InputError("paths", "none", "the fields that answer the question")
    held = look(document, paths[0])
    if label is not None:
        found = [each.text for each in recognise(str(held)) if each.label == label]
        if not found:
            raise InputError("label", f"no {label} in {held!r}", "a label that stands there")
        kind = KINDS[label]
        return Value(kind, found[0]), tuple(Field(path, kind, prose=True) for path in paths)
    if isinstance(held, bool) or not isinstance(held, int | float | str):
        raise InputError("paths", f"{held!r}", "fields that hold a number or a text")
    kind = "text" if isinstance(held, str) else "number"
    return Value(kind, held, unit), tuple(Field(path, kind, unit) for path in paths)
