"""Do the stages of a pipeline, keep what is done, and go on after an interruption.

A stage's folder is named by its key: a digest of its kind, its configuration and what it reads. So
a change makes new folders for what depends on it and touches nothing that is there; changed back,
it finds what it made before.

``config.toml``
    the pipeline, the files of its stages read into it.
``pipeline.json``
    every stage: its state, folder, bundle, digest and figures. It is replaced whenever one begins
    or ends.
``report.html``
    the same as a page.
``STAGE-KEY/``
    what the stage's own command makes, and ``outcome.json`` once it is done.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from hansa.bundle import read_bundle
from hansa.errors import InputError
from hansa.files import write_atomic
from hansa.pipeline.kinds import KINDS, Job
from hansa.pipeline.options import PipelineOptions, StageOptions, load
from hansa.report.pipeline import report
from hansa.runs import claim, locked
from hansa.untrusted import json_of, read_text

FORMAT = 1
Watch = Callable[[str, str, int, int], None]
_OUTCOME = "outcome.json"
_log = logging.getLogger("hansa")


@dataclass(frozen=True)
class Planned:
    """A stage and what is known of it.

    Attributes:
        name: what it is called.
        kind: what it does.
        state: ``waiting``, ``running`` or ``done``.
        start: the stage whose bundle it starts from.
        key: SHA-256 of all that it depends on; empty while a stage before it is not done.
        folder: where it is made, relative to the pipeline's; empty as long.
        bundle: its bundle's folder, relative to the pipeline's.
        digest: its bundle's digest.
        report: its page, relative to the pipeline's.
        seconds: how long it took, over all attempts that came to its end.
        figures: what came out, label -> text.
    """

    name: str
    kind: str
    state: str = "waiting"
    start: str | None = None
    key: str = ""
    folder: str = ""
    bundle: str | None = None
    digest: str | None = None
    report: str | None = None
    seconds: float | None = None
    figures: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Piped:
    """What a pipeline made: its folder, its stages, and its page."""

    path: Path
    stages: tuple[Planned, ...]
    report: Path

    @property
    def summary(self) -> dict[str, Any]:
        """All of it as JSON values."""
        stages = [asdict(stage) for stage in self.stages]
        return {"path": str(self.path), "report": str(self.report), "stages": stages}


def pipeline(
    source: str | Path | Mapping[str, Any],
    *,
    overrides: Iterable[str] = (),
    until: str | None = None,
    watch: Watch | None = None,
) -> Piped:
    """Do the stages of a pipeline, of which those that are done are kept.

    Args:
        source: a TOML file, or the values themselves; see ``PipelineOptions``.
        overrides: ``key=value``, or ``STAGE.key=value``.
        until: the last stage to do; by default all.
        watch: called with a stage's name, what it does, how much of it is done, and of how much.

    Raises:
        InputError: input that cannot be used, by any stage, before the first is begun; a bundle
            that is missing or differs from what was written. Nothing is overwritten.
    """
    options = load(source, overrides)
    wanted = _until(options, until)
    path = options.folder
    claim(
        path, (path / "pipeline.json").is_file(), ("config.toml", "pipeline.json"), "a pipeline's"
    )
    with locked(path):
        line = _Line(options, path)
        line.write()
        write_atomic(path / "config.toml", options.as_toml())
        for stage in wanted:
            if line.stages[stage.called].state != "done":
                line.do(stage, watch or (lambda name, what, done, total: None))
        return Piped(path, tuple(line.stages.values()), path / "report.html")


def plan(
    source: str | Path | Mapping[str, Any],
    *,
    overrides: Iterable[str] = (),
    until: str | None = None,
) -> tuple[Planned, ...]:
    """Return the stages of a pipeline and which of them are done, and do nothing.

    Raises:
        InputError: as for ``pipeline``.
    """
    options = load(source, overrides)
    stages = _Line(options, options.folder).stages
    return tuple(stages[stage.called] for stage in _until(options, until))


def _until(options: PipelineOptions, name: str | None) -> tuple[StageOptions, ...]:
    """Return the stages up to one; all where none is named."""
    return options.stages if name is None else options.stages[: options.position(name) + 1]


class _Line:
    """The stages in order, each with what is known of it."""

    def __init__(self, options: PipelineOptions, path: Path) -> None:
        self._options, self._path = options, path
        self.stages: dict[str, Planned] = {}
        for stage in options.stages:
            self.stages[stage.called] = self._known(stage)

    def do(self, stage: StageOptions, watch: Watch) -> None:
        """Do a stage whose forerunners are done, or go on with it."""
        name, kind = stage.called, KINDS[stage.kind]
        known = self.stages[name]
        self._tell(replace(known, state="running"))
        began = time.monotonic()
        job = Job(
            stage.config,
            self._options.seed,
            self._path / known.folder,
            self._bundle_of(known.start),
            {each.kind: self._path / each.folder for each in self._read(stage)},
            {
                each.name: self._path / str(each.bundle)
                for each in self._named(stage)
                if each.bundle is not None
            },
            lambda what, done, total: watch(name, what, done, total),
        )
        try:
            made = kind.run(job)
        except BaseException as error:
            self._tell(known)
            if isinstance(error, InputError):
                raise error.within(f"stages.{name}") from error
            raise
        outcome: dict[str, Any] = {
            "bundle": self._relative(made.bundle),
            "digest": read_bundle(made.bundle).digest if made.bundle else None,
            "report": self._relative(made.report),
            "seconds": round(time.monotonic() - began, 3),
            "figures": made.figures,
        }
        write_atomic(job.folder / _OUTCOME, json.dumps(outcome, indent=2) + "\n")
        self.stages[name] = replace(known, state="done", **outcome)
        # Those after it may be there already, from before a change that was taken back.
        for later in self._options.stages[self._options.position(name) + 1 :]:
            self.stages[later.called] = self._known(later)
        self.write()

    def write(self) -> None:
        """Write what is known, and the page about it."""
        stages = [asdict(stage) for stage in self.stages.values()]
        told = {
            "format": FORMAT,
            "name": self._options.name,
            "seed": self._options.seed,
            "stages": stages,
            "finished": all(stage.state == "done" for stage in self.stages.values()),
        }
        write_atomic(self._path / "pipeline.json", json.dumps(told, indent=2) + "\n")
        report(self._path)

    def _tell(self, stage: Planned) -> None:
        self.stages[stage.name] = stage
        self.write()

    def _known(self, stage: StageOptions) -> Planned:
        """Return what is known of a stage, given those before it."""
        before = self._options.start_of(stage.called)
        start = before.called if before else None
        known = Planned(stage.called, stage.kind, start=start)
        needed = [*([self.stages[start]] if start else []), *self._read(stage)]
        needed += self._named(stage)
        if any(each.state != "done" for each in needed):
            return known
        key = _key(stage, self._options.seed, needed)
        named = self._path / f"{stage.called}-{key[:8]}"
        folder = KINDS[stage.kind].folder(named, self._options.seed)
        known = replace(known, key=key, folder=folder.name)
        if not (folder / _OUTCOME).is_file():
            return known
        return replace(known, state="done", **self._outcome(stage.called, folder))

    def _outcome(self, name: str, folder: Path) -> dict[str, Any]:
        """Return what a stage made, its bundle verified."""
        file = folder / _OUTCOME
        try:
            told = json_of(read_text(file))
            found = {key: told[key] for key in ("bundle", "digest", "report", "seconds", "figures")}
            _check_outcome(found)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(str(file), f"unreadable ({error})", "what the stage wrote") from error
        if found["bundle"] is not None:
            whole = self._path / str(found["bundle"])
            again = f"what stage {name} wrote, or its folder removed to do it again"
            try:
                digest = read_bundle(whole).digest
            except InputError as error:
                raise InputError(error.key, error.found, f"{error.allowed}: {again}") from error
            if digest != found["digest"]:
                raise InputError(str(whole), f"another bundle ({digest[:12]})", again)
        return found

    def _read(self, stage: StageOptions) -> list[Planned]:
        """Return the last stages before one, of each kind whose folder it reads."""
        read = []
        for kind in KINDS[stage.kind].reads(stage.config):
            before = self._options.stages[: self._options.position(stage.called)]
            names = [each.called for each in before if each.kind == kind]
            read += [self.stages[names[-1]]] if names else []
        return read

    def _named(self, stage: StageOptions) -> list[Planned]:
        """Return the stages before one whose bundles its configuration names."""
        return [self.stages[name] for name in KINDS[stage.kind].names(stage.config)]

    def _bundle_of(self, name: str | None) -> Path | None:
        bundle = self.stages[name].bundle if name is not None else None
        return self._path / bundle if bundle else None

    def _relative(self, path: Path | None) -> str | None:
        return None if path is None else path.relative_to(self._path).as_posix()


def _check_outcome(found: Mapping[str, Any]) -> None:
    """Refuse values of other kinds, and paths that lead out of the pipeline's folder.

    Raises:
        ValueError: naming the key.
    """
    for key in ("bundle", "digest", "report"):
        value = found[key]
        if not (value is None or isinstance(value, str)):
            raise ValueError(f"{key} is no text")
    for key in ("bundle", "report"):
        place = PurePosixPath(found[key] or "")
        if "\0" in str(place) or str(place).encode(errors="replace").decode() != str(place):
            raise ValueError(f"{key} is no path")
        if place.is_absolute() or ".." in place.parts or "\\" in str(place) or ":" in str(place):
            raise ValueError(f"{key} leads out of the folder")
    if not (found["seconds"] is None or type(found["seconds"]) in (int, float)):
        raise ValueError("seconds is no number")
    figures = found["figures"]
    if figures is not None and not (
        isinstance(figures, dict) and all(isinstance(value, str) for value in figures.values())
    ):
        raise ValueError("figures are no texts")


def _without(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Return values without those under some dotted keys, and without tables left empty by that."""
    left = dict(values)
    for key in keys:
        first, _, rest = key.partition(".")
        if not rest:
            left.pop(first, None)
        elif isinstance(below := left.get(first), Mapping):
            left[first] = _without(below, [rest])
            if below and not left[first]:
                del left[first]
    return left


def _key(stage: StageOptions, seed: int, needed: Iterable[Planned]) -> str:
    values = {
        "format": FORMAT,
        "kind": stage.kind,
        "config": _without(stage.config, KINDS[stage.kind].idle),
        "seed": seed,
        "needed": [(each.kind, each.digest or each.key) for each in needed],
    }
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
