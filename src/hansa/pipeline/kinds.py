"""What a stage of a pipeline may be: how it is checked, joined to those before it, and done.

Each stands for one command of Hansa and adds nothing to it: it fills in what earlier stages have
made, and says in a few figures what came out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hansa import auditing, safeguard_config, searching
from hansa.bundle import read_bundle
from hansa.config import load as load_run
from hansa.curate import curate
from hansa.errors import InputError
from hansa.export import export
from hansa.pipeline.profiling import ProfileStage, profile
from hansa.prune import prune
from hansa.redteam import redteam, with_scorecard
from hansa.report import figures, report
from hansa.runs import Run
from hansa.safeguarding import safeguard
from hansa.training import CHANGEABLE, completed

_LATER = "of the stage before"
"""Stands for a path that is not known yet where a configuration is only looked at."""
_KEPT, _BUNDLE = "kept:", "bundle:"
"""Begin what a safeguard's configuration takes from stages before it: the examples that a client of
the curation has kept, and a stage's bundle as a control."""


@dataclass(frozen=True)
class Job:
    """One stage, ready to be done.

    Attributes:
        config: its configuration.
        seed: the pipeline's.
        folder: what it makes, or goes on in.
        start: the bundle that it starts from.
        read: kind -> folder of the last stage before it of that kind, of those it reads.
        bundles: name -> bundle of the earlier stages that its configuration names.
        watch: called with what is being done, how much of it is done, and of how much.
    """

    config: Mapping[str, Any]
    seed: int
    folder: Path
    start: Path | None
    read: Mapping[str, Path]
    bundles: Mapping[str, Path]
    watch: Callable[[str, int, int], None]

    @property
    def values(self) -> dict[str, Any]:
        """The configuration with the pipeline's seed, unless it has one of its own."""
        return {"seed": self.seed, **self.config}


@dataclass(frozen=True)
class Made:
    """What a stage made: a bundle, a page, and a few figures, each with its label."""

    bundle: Path | None
    report: Path | None
    figures: dict[str, str]


class Kind:
    """What a stage may be.

    Attributes:
        starts: whether it can start from a bundle.
        needs: whether it cannot do without.
        makes: whether it writes one.
        needs_read: whether it cannot do without the stages that it reads.
        is_of_run: whether its configuration is one of ``hansa train``.
        idle: dotted keys of its configuration that change nothing of what it makes.
    """

    starts, needs, makes, needs_read, is_of_run = True, False, True, False, False
    idle: tuple[str, ...] = ()

    def reads(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the kinds of earlier stages whose folders it reads."""
        return ()

    def names(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the earlier stages whose bundles its configuration names."""
        return ()

    def folder(self, named: Path, seed: int) -> Path:
        """Return the folder that it makes; ``named`` is the pipeline's name for it."""
        return named

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse a configuration that cannot be used, before anything is done.

        Raises:
            InputError: naming the key.
        """
        raise NotImplementedError

    def run(self, job: Job) -> Made:
        """Do it, or go on with it."""
        raise NotImplementedError


class _Profile(Kind):
    starts, makes = False, False

    def check(self, config: Mapping[str, Any]) -> None:
        ProfileStage.of(config)

    def run(self, job: Job) -> Made:
        return Made(None, None, profile(ProfileStage.of(job.config), job.folder, job.watch))


class _Search(Kind):
    starts = False

    def reads(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        return () if "table" in config else ("profile",)

    def check(self, config: Mapping[str, Any]) -> None:
        searching.load(config)

    def run(self, job: Job) -> Made:
        values = job.values
        if (profiled := job.read.get("profile")) is not None:
            values |= ProfileStage.joined(profiled, values)
        found = searching.search(values, out=job.folder, watch=job.watch)
        return Made(found.bundle, found.report, figures.of_search(found.summary))


class _OfRun(Kind):
    """A stage whose configuration is one of ``hansa train``."""

    is_of_run = True
    idle = tuple(key for key in CHANGEABLE if key != "rounds")

    def check(self, config: Mapping[str, Any]) -> None:
        load_run(_with_model(config, {"bundle": _LATER}))

    def values(self, job: Job) -> dict[str, Any]:
        """Return the configuration with the model of the bundle that it starts from."""
        if job.start is None:
            return job.values
        architecture = read_bundle(job.start).architecture
        model = {"name": architecture["name"], "bundle": str(job.start)}
        own = job.config.get("model", {}).get("options", {})
        options = {**architecture["options"], **own}
        return _with_model(job.values, {**model, "options": options})


class _Prune(_OfRun):
    def check(self, config: Mapping[str, Any]) -> None:
        super().check({key: value for key, value in config.items() if key != "structured"})
        if not config.get("pruning"):
            raise InputError("pruning", "nothing", "a table with a density")

    def run(self, job: Job) -> Made:
        values = self.values(job)
        structured = bool(values.pop("structured", False))
        made = prune(
            values,
            structured=structured,
            out=job.folder,
            watch=lambda done, total: job.watch("pruning", done, total),
        )
        return Made(made.path / "bundle", made.report, figures.of_prune(made.summary))


class _Train(_OfRun):
    exports = False

    def reads(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        return ("curate",) if "curation" in config else ()

    def folder(self, named: Path, seed: int) -> Path:
        return named.with_name(f"{named.name}-seed{seed}")

    def run(self, job: Job) -> Made:
        values = self.values(job)
        if (curated := job.read.get("curate")) is not None:
            values["curation"] = {**values["curation"], "masks": str(curated)}
        name = job.folder.name.removesuffix(f"-seed{values['seed']}")
        config = load_run({**values, "output": str(job.folder.parent), "name": name})
        if config.folder != job.folder:
            raise InputError("seed", values["seed"], "the pipeline's own, or none")
        path = completed(
            config, lambda run, result: job.watch("round", result.number, run.config.rounds)
        )
        run = Run(path)
        page = report([run], path / "report.html")
        if self.exports:
            names = sorted(run.history.scored("test", "accuracy")[run.round])
            for number, client in enumerate(names, 1):
                export(run, client)
                job.watch("client's model", number, len(names))
        common = path / "bundle"
        return Made(common if common.is_dir() else None, page, figures.of_run(run.summary()))


class _Personalise(_Train):
    exports = True


class _Curate(_OfRun):
    makes = False

    def run(self, job: Job) -> Made:
        made = curate(self.values(job), out=job.folder, watch=job.watch)
        return Made(None, made.report, figures.of_curation(made.summary))


class _Safeguard(Kind):
    needs_read = True

    def reads(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        return ("curate",) if _named(config.get("data"), _KEPT) else ()

    def names(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        return _named(config.get("controls"), _BUNDLE)

    def check(self, config: Mapping[str, Any]) -> None:
        safeguard_config.load(config)

    def run(self, job: Job) -> Made:
        values = job.values
        if job.start is not None:
            values["model"] = {**values.get("model", {}), "path": str(job.start)}
        if (curated := job.read.get("curate")) is not None:
            kept = {
                name: f"jsonl:{curated / 'clients' / name / 'kept.jsonl'}"
                for name in _named(values["data"], _KEPT)
            }
            values["data"] = _filled(values["data"], _KEPT, kept)
        if job.bundles:
            bundles = {name: str(path) for name, path in job.bundles.items()}
            values["controls"] = _filled(values["controls"], _BUNDLE, bundles)
        made = safeguard(values, out=job.folder, watch=job.watch)
        return Made(made.path / "bundle", made.report, figures.of_safeguard(made.summary))


class _Redteam(Kind):
    needs = needs_read = True
    idle = ("processes",)

    def reads(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        return ("safeguard",)

    def check(self, config: Mapping[str, Any]) -> None:
        safeguard_config.load({"preset": "debug", "redteam": dict(config)})

    def run(self, job: Job) -> Made:
        safeguarded = job.read["safeguard"]
        values = safeguard_config.load(safeguarded / "config.toml").as_dict()
        values["redteam"] = dict(job.config)
        made = redteam(values, of=safeguarded, out=job.folder, watch=job.watch)
        asked = safeguard_config.load(values).redteam
        joined = with_scorecard(
            safeguarded / "bundle", made.scorecard, asked, job.folder / "bundle"
        )
        return Made(joined, made.report, figures.of_redteam(made.scorecard))


class _Audit(Kind):
    def check(self, config: Mapping[str, Any]) -> None:
        auditing.load(_with_target(config, _LATER))

    def run(self, job: Job) -> Made:
        values = job.values
        if job.start is not None:
            values = _with_target(values, str(job.start))
        made = auditing.audit(values, out=job.folder, watch=job.watch)
        joined = None
        if job.start is not None and values["target"]["kind"] == "bundle":
            asked = auditing.load(values)
            joined = auditing.with_audit(job.start, made.summary, asked, job.folder / "bundle")
        return Made(joined, made.report, figures.of_audit(made.summary))


def _named(value: Any, prefix: str) -> tuple[str, ...]:
    """Return what the texts that begin with a prefix name, anywhere in some values."""
    if isinstance(value, str):
        return (value.removeprefix(prefix),) if value.startswith(prefix) else ()
    below = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping | list | tuple):
        return ()
    return tuple(dict.fromkeys(name for each in below for name in _named(each, prefix)))


def _filled(value: Any, prefix: str, with_: Mapping[str, str]) -> Any:
    """Return values in which such texts are replaced by what they name."""
    if isinstance(value, Mapping):
        return {key: _filled(below, prefix, with_) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(below, prefix, with_) for below in value]
    is_named = isinstance(value, str) and value.startswith(prefix)
    return with_[value.removeprefix(prefix)] if is_named else value


def _with_model(values: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "model": {**values.get("model", {}), **model}}


def _with_target(values: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return an audit's configuration; its target is the bundle unless it names another kind."""
    target = {"kind": "bundle", **values.get("target", {})}
    return {**values, "target": {**target, "path": path} if target["kind"] == "bundle" else target}


KINDS: dict[str, Kind] = {
    "profile": _Profile(),
    "search": _Search(),
    "prune": _Prune(),
    "train": _Train(),
    "personalise": _Personalise(),
    "curate": _Curate(),
    "safeguard": _Safeguard(),
    "redteam": _Redteam(),
    "audit": _Audit(),
}
"""By the name that ``stages.kind`` knows."""
