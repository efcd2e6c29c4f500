"""The train stage: a configuration in, a run folder out. ``hansa train`` is this function."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hansa import bundle
from hansa.config import RunConfig, difference, load
from hansa.data.federate import federate
from hansa.errors import InputError
from hansa.federation.engines.local import RoundResult
from hansa.federation.federation import Federation
from hansa.federation.leaf import DivergedError
from hansa.federation.message import MessageError
from hansa.federation.tree import ROOT, Tree
from hansa.models import Architecture, build
from hansa.runs import Run

Watch = Callable[[Run, RoundResult], None]
CHANGEABLE = ("engine.", "rounds")
"""What a resumed run may change: none of it alters the rounds already there."""


def train(
    config: str | Path | Mapping[str, Any] | RunConfig | None = None,
    *,
    overrides: Iterable[str] = (),
    resume: str | Path | None = None,
    watch: Watch | None = None,
) -> Run:
    """Train a federation as configured, and return its run.

    Args:
        config: a TOML file, the values themselves, or a validated configuration; None takes that
            of the run to resume.
        overrides: ``key=value`` with dotted keys, applied to the configuration.
        resume: folder of an interrupted run; it goes on after its last whole round and ends with
            the numbers of a run that was never interrupted.
        watch: called after every round.

    Raises:
        InputError: input that cannot be used, a loss that is no number included.
    """
    wanted, run = _open(config, overrides, resume)
    data = federate(wanted.data, wanted.seed)
    parent = bundle.read_bundle(Path(wanted.model.bundle)) if wanted.model.bundle else None
    architecture = Architecture(
        name=wanted.model.name,
        options=wanted.model.options,
        shape=data.shape,
        classes=len(data.classes),
    )
    model = build(architecture, wanted.seed)
    if parent is not None:
        _take_weights(model, parent, wanted)
    federation = Federation(
        model,
        data.clients,
        wanted.method,
        wanted.training,
        seed=wanted.seed,
        participation=wanted.participation,
        buffers=wanted.model.buffers,
        tree=Tree.grouped(data.clients, wanted.tree.federations),
        workers=wanted.engine.workers,
        on_failure=wanted.on_failure,
    )
    # The folder is made last, so that wrong input leaves nothing behind.
    run = Run.create(wanted) if run is None else run
    facts = {
        "data": data.fingerprint,
        "bundle": parent.digest if parent else "none",
        "clients": len(data.clients),
        "classes": list(data.classes),
    }
    with run.claimed(wanted, facts):
        federation.keep_states_in(run.store())
        _rounds(run, federation, watch)
        common = None
        if wanted.method.common:
            common = bundle.write(
                run.path / "bundle",
                stage="train",
                weights=federation.model_of(ROOT).state_dict(),
                architecture=architecture.model_dump(mode="json"),
                config={k: v for k, v in wanted.as_dict().items() if k not in _NOT_PROVENANCE},
                seed=wanted.seed,
                data=data.fingerprint,
                metrics=run.history.summary()["metrics"],
                parent=parent,
            )
        run.finish(common)
    return run


def _rounds(run: Run, federation: Federation, watch: Watch | None) -> None:
    config = run.config
    try:
        for result in federation.rounds(config.rounds, run.round + 1, config.score_every):
            run.record(result)
            if watch is not None:
                watch(run, result)
    except DivergedError as error:
        raise InputError(
            "training.lr",
            f"{config.training.lr}, with which {error}",
            "a rate at which the loss stays finite, or on_failure = 'drop'",
        ) from error
    except MessageError as error:
        raise InputError(
            str(run.path), f"states that do not fit the model ({error})", "the run's own model"
        ) from error


_NOT_PROVENANCE = ("engine", "name", "output")
"""How and where a run was computed does not change its result, so it is not in the digest."""


def _open(
    config: str | Path | Mapping[str, Any] | RunConfig | None,
    overrides: Iterable[str],
    resume: str | Path | None,
) -> tuple[RunConfig, Run | None]:
    """Return the configuration to follow, and the run to resume if there is one."""
    if isinstance(config, RunConfig):
        config = config.as_dict()
    if resume is None:
        if config is None:
            raise InputError("CONFIG", "nothing", "a configuration file, or --resume RUN")
        return load(config, overrides), None
    run = Run(Path(resume))
    wanted = load(run.config.as_dict() if config is None else config, overrides)
    for key in difference(run.config, wanted):
        if not key.startswith(CHANGEABLE):
            raise InputError(key, "another value than the run's", "the run's own configuration")
    if wanted.rounds < run.round:
        raise InputError("rounds", wanted.rounds, f"at least the {run.round} rounds already there")
    return wanted, run


def _take_weights(model: nn.Module, parent: bundle.Bundle, config: RunConfig) -> None:
    mine = model.state_dict()
    for name in sorted(mine.keys() | parent.weights.keys()):
        theirs = parent.weights.get(name)
        if name not in mine or theirs is None or theirs.shape != mine[name].shape:
            raise InputError(
                "model.bundle",
                f"{config.model.bundle}, whose weights differ from {config.model.name} in {name}",
                "a bundle of the same model",
            )
    model.load_state_dict(dict(parent.weights))
