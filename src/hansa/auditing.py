"""The audit stage: ask a target about responses as they are and tampered with, and report.

``config.toml``
    what was asked for.
``results.jsonl``
    a line for every (domain, case, arm, defence, target): the answer, the edits, digests of the
    response before and after, what a defence said. The same command goes on where an earlier one
    stopped, and after a change of arms or defences asks what is new and nothing else.
``reader/``
    the demonstration's reader, where one was trained.
``audit.json``, ``report.html``, ``report.md``, ``report.xml``
    what was found: for programs, for people, for a review, for continuous integration (JUnit).
"""

import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from hansa import bundle
from hansa.audit.application import Service
from hansa.audit.domains import Domain, domain
from hansa.audit.gate import check_baseline, gate
from hansa.audit.measure import BENIGN, Kept, Round, check_answers, fewer, standing
from hansa.audit.options import AuditOptions, TargetOptions
from hansa.audit.redact import Hide, Redactor
from hansa.audit.summary import (
    NO_CONCLUSION,
    Table,
    calibration,
    is_calibrated,
    summarise,
)
from hansa.audit.targets import CALIBRATION, Endpoint, Target
from hansa.config import explain, values_of
from hansa.errors import InputError
from hansa.files import write_atomic
from hansa.report.audit import junit, markdown, report
from hansa.runs import claim, locked

Watch = Callable[[str, int, int], None]
_log = logging.getLogger("hansa")
_OWN = {".lock", "config.toml", "results.jsonl", "reader", "audit.json"}
_OWN |= {"report.html", "report.md", "report.xml"}

_TOLD = ("domains", "seed", "cases", "valid", "clean_accuracy", "noise_floor", "verdict", "why")
"""What of an audit stands in a bundle's card; not how long its defences took."""


@dataclass(frozen=True)
class Audited:
    """What the stage made.

    Attributes:
        path: its folder.
        summary: what was found, as JSON values.
        report: the page about it.
        passed: whether the gate lets it pass; True where no gate was asked for.
    """

    path: Path
    summary: dict[str, Any]
    report: Path
    passed: bool


def audit(
    source: str | Path | Mapping[str, Any],
    *,
    overrides: Iterable[str] = (),
    out: str | Path | None = None,
    max_adopted: float | None = None,
    baseline: str | Path | None = None,
    watch: Watch | None = None,
) -> Audited:
    """Measure what tampered responses do to a target's answers, and what defences do about it.

    Args:
        source: a configuration in TOML, or its values.
        overrides: ``key=value`` with dotted keys, such as ``target.kind=trusting``.
        out: the folder to make or to go on in; by default ``OUTPUT/NAME``.
        max_adopted: most of a gated arm's valid cases that may adopt a false value, as a share.
        baseline: ``audit.json`` of an earlier audit, whose shares are allowed where they are more.
        watch: called with what is being done, how much of it is done, and of how much.

    Raises:
        InputError: input that cannot be used; a target that does not answer. What was measured
            until then is kept, and the same call goes on from there.
    """
    options = load(source, overrides)
    if max_adopted is not None and not 0 <= max_adopted <= 1:
        raise InputError("--max-adopted", max_adopted, "a share from 0 to 1")
    before = None if baseline is None else check_baseline(_read_json(baseline), str(baseline))
    domains = [fewer(domain(name), options.cases) for name in options.domains]
    if len({each.name for each in domains}) < len(domains):
        raise InputError("domains", ", ".join(options.domains), "each once")
    path = Path(out) if out is not None else Path(options.output) / options.name
    claim(path, (path / "results.jsonl").exists(), _OWN, "an audit's")
    redactor = _redactor(options)
    hide = Hide(redactor)
    _log.addFilter(hide)
    try:
        with locked(path):
            write_atomic(path / "config.toml", redactor.text(_toml(options)))
            target = target_of(options.target, path, redactor, watch)
            summary = _measured(options, domains, target, path, redactor, watch)
            return _reported(options, summary, path, redactor, max_adopted, before)
    finally:
        _log.removeFilter(hide)


def with_audit(
    path: str | Path, summary: Mapping[str, Any], options: AuditOptions, out: str | Path
) -> Path:
    """Write the bundle that was audited again, with what was found in its card.

    Args:
        path: folder of the bundle, which becomes the new one's parent.
        summary: what the audit of it found.
        options: how it was audited, which stands in the card under ``config.audit``.
        out: the folder to make.

    Raises:
        InputError: no bundle, or no place to write.
    """
    told = {key: summary[key] for key in _TOLD if key in summary}
    told["adopted"] = {
        name: {arm: figures["adopted"] for arm, figures in defence["arms"].items()}
        for name, defence in summary["defences"].items()
    }
    target = {"kind", "template", "max_tokens"}  # others are of targets that are no bundle
    asked = options.model_dump(mode="json", exclude={"name", "output", "target"})
    asked["target"] = options.target.model_dump(mode="json", include=target)
    bundle.restated(bundle.read_bundle(path), Path(out), "audit", told, asked)
    return Path(out)


def load(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> AuditOptions:
    """Return the options of an audit.

    Raises:
        InputError: naming the first key that is wrong, what was found and what is allowed.
    """
    values = values_of(source, overrides)
    try:
        return AuditOptions.model_validate(values)
    except ValidationError as error:
        raise explain(error, AuditOptions, values) from error


def target_of(
    options: TargetOptions, path: Path, redactor: Redactor, watch: Watch | None = None
) -> Target:
    """Return what is audited; a reader is trained in the audit's folder unless it is there.

    Raises:
        InputError: an endpoint or a folder that cannot be used.
    """
    if options.kind == "endpoint":
        return Endpoint(
            options.url,
            options.model,
            key_variable=options.key_variable,
            redactor=redactor,
            temperature=options.temperature,
            parallel=options.parallel,
            timeout=options.timeout,
            max_tokens=options.max_tokens,
            headers=options.headers,
        )
    if options.kind in ("trusting", "verifying", "constant"):
        return next(kind() for kind in CALIBRATION if kind.name == options.kind)
    from hansa.audit import local

    if options.kind == "transformers":
        return local.Transformers(Path(options.path), options.max_tokens)
    if options.kind == "bundle":
        return local.FromBundle(Path(options.path), options.template, options.max_tokens)
    return local.Pointing(Path(options.path) if options.path else _reader(options, path, watch))


def _reader(options: TargetOptions, path: Path, watch: Watch | None) -> Path:
    from hansa.audit.reader import ReaderOptions, read
    from hansa.audit.reader_training import train

    folder = path / "reader"
    wanted = ReaderOptions(steps=options.steps, cases=options.cases)
    if (folder / "reader.json").exists() and read(folder).options == wanted:
        return folder
    train(wanted, None if watch is None else lambda k, n: watch("training the reader", k, n)).save(
        folder
    )
    return folder


def _measured(
    options: AuditOptions,
    domains: list[Domain],
    target: Target,
    path: Path,
    redactor: Redactor,
    watch: Watch | None,
) -> dict[str, Any]:
    """Ask what is not known yet, and return the summary."""
    signs = any("signature" in name.split("+") for name in options.defences)
    arms, kept = options.chosen, Kept(path / "results.jsonl", redactor)
    settings = redactor.values(options.target.model_dump(mode="json"))
    rows: list[Any] = []
    tables: dict[str, list[Any]] = {kind.name: [] for kind in CALIBRATION}
    for each in domains:
        service = Service(each, signs)
        for kind in CALIBRATION:
            stands = standing(each, {}, options.seed, kind.name)
            calibrated = [arm for arm in arms if is_calibrated(arm)]
            Round(each, service, kind(), stands, options.seed).run(calibrated, ["none"], kept)
            tables[kind.name] += kept.of(stands, kind.name)
        stands = standing(each, settings, options.seed, target.name)
        measured = Round(each, service, target, stands, options.seed)
        try:
            measured.run(arms, options.defences, kept, watch)
        except InputError as error:
            found = f"{error.found}; {len(kept)} answers are kept in {kept.path}"
            allowed = f"{error.allowed}; the same command goes on"
            raise InputError(error.key, redactor.text(found), allowed) from error
        rows += kept.of(stands, target.name)
    check_answers([row for row in rows if row["arm"] == BENIGN], target.name, kept.path)
    table = Table.of(domains, rows)
    summary = summarise(table, arms, options.defences, options.least_clean, options.seed)
    readers = {name: Table.of(domains, held) for name, held in tables.items()}
    summary["calibration"] = calibration(readers, arms)
    if not summary["calibration"]["holds"]:
        summary["verdict"] = NO_CONCLUSION
        summary["why"] = "the calibration readers do not score what they must"
    return {**_about(options, target, arms), **summary}


def _reported(
    options: AuditOptions,
    summary: dict[str, Any],
    path: Path,
    redactor: Redactor,
    max_adopted: float | None,
    before: Mapping[str, Any] | None,
) -> Audited:
    passed = True
    if max_adopted is not None or before is not None:
        gated = options.gate
        chosen = [
            arm.name
            for arm in options.chosen
            if arm.operator in gated.operators and arm.where in gated.where
        ]
        summary["gate"] = gate(summary, chosen, max_adopted, before)
        passed = summary["gate"]["passed"]
    summary = redactor.values(summary)
    write_atomic(path / "audit.json", json.dumps(summary, indent=2) + "\n")
    write_atomic(path / "report.md", redactor.text(markdown(summary)))
    write_atomic(path / "report.xml", redactor.text(junit(summary)))
    page = report(path / "report.html", summary, redactor.text(_toml(options)))
    return Audited(path, summary, page, passed)


def _about(options: AuditOptions, target: Target, arms: Iterable[Any]) -> dict[str, Any]:
    """Return what was measured with: figures of other harnesses are not comparable."""
    return {
        "name": options.name,
        "harness": {
            "hansa": importlib.metadata.version("hansa"),
            "python": platform.python_version(),
        },
        "target": {"kind": options.target.kind, "name": target.name},
        "domains": list(options.domains),
        "seed": options.seed,
        "arms": [arm.name for arm in arms],
        "gated": options.gated,
    }


def _redactor(options: AuditOptions) -> Redactor:
    redactor = Redactor()
    redactor.learn_headers(options.target.headers)
    if options.target.url:
        redactor.learn_url(options.target.url)
    if options.target.key_variable:
        redactor.learn(os.environ.get(options.target.key_variable, ""))
    return redactor


def _toml(options: AuditOptions) -> str:
    values = options.as_dict()
    values["target"]["headers"] = dict.fromkeys(options.target.headers, "[not written]")
    return tomli_w.dumps(values)


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("--baseline", f"{path} ({error})", "an audit.json") from error
