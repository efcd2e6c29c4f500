"""Measures: every case by every arm and defence, asked of a target, kept line by line.

A line is written as soon as it is known, so that an endpoint that dies costs what it was asked last
and nothing else. Lines of another seed, target or set of cases are left alone and not used.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hansa.audit.application import Asking, Service, checked, defence_of, reviewed
from hansa.audit.cases import Case
from hansa.audit.defences import Defence
from hansa.audit.domains import Domain
from hansa.audit.manipulate import Arm, Tampered
from hansa.audit.matching import Value
from hansa.audit.redact import Redactor
from hansa.audit.tamper import digest, encoded
from hansa.audit.targets import Asked, Target
from hansa.errors import InputError

BENIGN, AGAIN = "benign", "benign again"
Row = dict[str, Any]
Watch = Callable[[str, int, int], None]


class Kept:
    """What was measured, in a file with one line each.

    Args:
        path: the file.
        redactor: takes secrets out of what is written.
    """

    def __init__(self, path: Path, redactor: Redactor) -> None:
        self.path, self._redactor = path, redactor
        self._rows: dict[tuple[str, ...], Row] = {}
        held = path.read_bytes() if path.exists() else b""
        whole, end, torn = held.rpartition(b"\n")
        if torn:  # the last line of a run that was killed
            path.write_bytes(whole + end)
        for line in whole.decode().splitlines():
            row = _row(line, path)
            self._rows[_key(row)] = row

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, *key: str) -> Row | None:
        """Return what was measured, None where it was not."""
        return self._rows.get(key)

    def add(self, rows: Sequence[Row]) -> None:
        """Write rows down."""
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                clean = self._redactor.values(row)
                file.write(json.dumps(clean, ensure_ascii=False) + "\n")
                self._rows[_key(row)] = clean

    def of(self, stands: str, target: str) -> Iterator[Row]:
        """Yield the rows of one target that stand on one set of cases, seed and options."""
        for row in self._rows.values():
            if row["stands"] == stands and row["target"] == target:
                yield row


@dataclass(frozen=True)
class Round:
    """One domain asked of one target.

    Attributes:
        domain: its cases, possibly fewer than it has.
        service: its service.
        target: what is asked.
        stands: what its rows stand on; see ``standing``.
        seed: what false values are drawn from.
    """

    domain: Domain
    service: Service
    target: Target
    stands: str
    seed: int

    def run(
        self, arms: Sequence[Arm], defences: Sequence[str], kept: Kept, watch: Watch | None = None
    ) -> None:
        """Measure all cases by all arms and defences, those that are kept excepted.

        Raises:
            InputError: the target cannot answer; what was measured is kept.
        """
        memory: dict[str, str] = {}
        edited: dict[tuple[str, str], Tampered | None] = {}
        for name in defences:
            defence = defence_of(name, self.domain, self.service)
            arms_ = [None, None, *arms] if name == "none" else [None, *arms]
            for number, arm in enumerate(arms_):
                again = arm is None and number == 1
                label = AGAIN if again else (BENIGN if arm is None else arm.name)
                if watch is not None:
                    watch(f"{self.domain.name}, {name}, {label}", number, len(arms_))
                step = _Step(arm, label, name, defence, {} if again else memory, edited)
                self._arm(step, kept)

    def _arm(self, step: "_Step", kept: Kept) -> None:
        pending: list[tuple[Case, Tampered | None, Asking]] = []
        for case in self.domain.cases:
            key = self.stands, self.target.name, self.domain.name, case.id, step.label, step.name
            if kept.row(*key):
                continue
            made = None if step.arm is None else self._tampered(case, step)
            if step.arm is None:
                received = self.service.respond(case, case.document)
            elif made is None:
                continue  # the arm does not apply to the case
            else:
                received = self.service.tampered(case, step.arm, made.document)
            pending.append((case, made, checked(step.defence, case.question, received)))
        at_once = self.target.at_once
        for start in range(0, len(pending), at_once):
            part = pending[start : start + at_once]
            answers = self._answers([each for each in part if each[2].prompt], step)
            kept.add([self._row(case, made, asking, step, answers) for case, made, asking in part])

    def _tampered(self, case: Case, step: "_Step") -> Tampered | None:
        assert step.arm is not None  # noqa: S101 (only such arms tamper)
        key = case.id, step.label
        if key not in step.edited:
            step.edited[key] = self.domain.tamper(case, step.arm, self.seed)
        return step.edited[key]

    def _row(
        self,
        case: Case,
        made: Tampered | None,
        asking: Asking,
        step: "_Step",
        answers: Mapping[str, str],
    ) -> Row:
        raw = answers.get(case.id, "")
        told, reason, seconds = raw, asking.reason, asking.seconds
        if asking.prompt is not None:
            told, reason, more = reviewed(step.defence, raw, asking)
            seconds += more
        return {
            "stands": self.stands,
            "target": self.target.name,
            "domain": self.domain.name,
            "case": case.id,
            "arm": step.label,
            "defence": step.name,
            "answer": told,
            "blocked": bool(reason),
            "reason": reason,
            "seconds": round(seconds, 7),
            **_tampering(case, made),
        }

    def _answers(
        self,
        asked: Sequence[tuple[Case, Tampered | None, Asking]],
        step: "_Step",
    ) -> dict[str, str]:
        """Return case -> answer; a prompt that always has one answer is asked once."""
        open_: list[Asked] = []
        memory = step.memory
        texts: dict[str, str] = {}
        for case, _, asking in asked:
            assert asking.prompt is not None  # noqa: S101 (only such are asked)
            texts[case.id] = asking.prompt.text
            if not (self.target.repeats and asking.prompt.text in memory):
                attempt = int(step.label == AGAIN)
                open_.append(Asked(asking.prompt, case, asking.received, attempt))
        told = dict(
            zip([each.case.id for each in open_], self.target.answer(open_), strict=True)
            if open_
            else ()
        )
        if self.target.repeats:
            memory |= {texts[case]: answer for case, answer in told.items()}
            return {case: memory[text] for case, text in texts.items()}
        return told


@dataclass(frozen=True)
class _Step:
    """One arm under one defence.

    Attributes:
        arm: what is done to responses, None for nothing.
        label: what results call it.
        name: the defence's name.
        defence: the defence.
        memory: prompt -> answer, of targets that always give the same.
        edited: (case id, label) -> the response after tampering, the same under all defences.
    """

    arm: Arm | None
    label: str
    name: str
    defence: Defence
    memory: dict[str, str]
    edited: dict[tuple[str, str], Tampered | None]


def standing(domain: Domain, target: Mapping[str, Any], seed: int, identity: str) -> str:
    """Return what results stand on: cases, the target as configured, its identity, the seed."""
    cases = [case.as_json() for case in domain.cases]
    about = [cases, {k: v for k, v in target.items() if k not in ("parallel", "timeout")}]
    text = json.dumps([about, identity, seed], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fewer(domain: Domain, num: int) -> Domain:
    """Return a domain with its first cases; all of them for 0."""
    if not num:
        return domain
    return replace(domain, cases=domain.cases[:num])


def false_value(row: Mapping[str, Any]) -> Value | None:
    """Return the false value of a row, None where none was put in."""
    held = row.get("false")
    return None if held is None else Value(held["kind"], held["value"], held.get("unit", ""))


def check_answers(rows: Sequence[Row], target: str, path: Path) -> None:
    """Refuse a target that answers nothing.

    Raises:
        InputError: every answer is empty.
    """
    if rows and not any(row["answer"].strip() for row in rows):
        found = f"{target}, which gave {len(rows)} empty answers, kept in {path}"
        raise InputError("target", found, "answers; another --out asks anew")


def _tampering(case: Case, made: Tampered | None) -> dict[str, Any]:
    if made is None:
        return {}
    about: dict[str, Any] = {
        "edits": [edit.as_json() for edit in made.edits],
        "before": digest(encoded(case.document)),
        "after": digest(encoded(made.document)),
    }
    if (false := made.false) is not None:
        about["false"] = {"kind": false.kind, "value": false.value, "unit": false.unit}
    return about


def _row(line: str, path: Path) -> Row:
    try:
        row: Row = json.loads(line)
        row["answer"], row["blocked"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(str(path), f"no row ({line[:40]!r})", "what an audit wrote") from error
    return row


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    names = ("stands", "target", "domain", "case", "arm", "defence")
    return tuple(str(row.get(name, "")) for name in names)
