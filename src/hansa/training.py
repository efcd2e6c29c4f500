"""The train stage: a configuration in, a run folder out. ``hansa train`` is this function."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from hansa import bundle
from hansa.config import RunConfig, difference, load
from hansa.curation.federated import Cohort, curated, read_public
from hansa.curation.masks import Kept, read_kept
from hansa.data.answers import Answers, federate_answers
from hansa.data.federate import FederatedData, federate
from hansa.data.text import federate_text
from hansa.data.tokenizer import Tokenizer, tokenizer_from_json
from hansa.errors import InputError
from hansa.federation.engines.engine import RoundResult, Visit
from hansa.federation.federation import Federation
from hansa.federation.leaf import DivergedError
from hansa.federation.message import MessageError, Tensors
from hansa.federation.store import Store
from hansa.federation.tree import ROOT, Tree, name_of
from hansa.models import Architecture, build, objective_of, resolved
from hansa.models.language import beside_adapters
from hansa.models.masks import attach
from hansa.pruning.federated import check_pruning, pre_round
from hansa.runs import Run
from hansa.tracking import check_trackers, tracked

_log = logging.getLogger("hansa")
Watch = Callable[[Run, RoundResult], None]
CHANGEABLE = (
    "engine.workers",
    "engine.state_memory_mb",
    "engine.stack_memory_mb",
    "rounds",
    "tracking",
)
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
    check_trackers(wanted.tracking)
    if (asked := wanted.curation) is not None and asked.warm_up and asked.masks is None:
        raise InputError(
            "curation.warm_up",
            "a table, which training has no time for",
            "`hansa curate`, and its folder as curation.masks",
        )
    trial = prepare(wanted, masks=run.masks if run else None)
    # The folder is made last, so that wrong input leaves nothing behind.
    run = Run.create(wanted) if run is None else run
    with run.claimed(wanted, trial.facts):
        store = run.store()
        if wanted.pruning and run.masks is None:
            trial = prepare(wanted, trial.data, _pruned(run, trial))
        trial.federation.keep_states_in(store, run.round)
        with tracked(run) as record:
            trial = _rounds(run, trial, store, [record, *([watch] if watch else [])])
        common = None
        if wanted.method.common:
            weights = trial.federation.model_of(ROOT).state_dict()
            # These are of the clients' models: what is scored, the method says.
            scored = "aggregated" if wanted.text else wanted.method.scored
            summary = run.history.summary()
            metrics = {"scored": scored, **summary["metrics"]}
            if (spent := summary.get("epsilon")) is not None:
                metrics["epsilon"] = spent
            if (kept := run.curated(run.round - 1)) is not None:
                metrics["curation"] = kept.manifest
            common = trial.write_bundle(
                run.path / "bundle", "train", weights, metrics, privacy=run.privacy()
            )
        run.finish(common)
    return run


def completed(config: RunConfig, watch: Watch | None = None) -> Path:
    """Bring the run of a configuration to its end and return its folder.

    One that is finished is kept, and one that was interrupted, or has fewer rounds, goes on.

    Args:
        config: the configuration.
        watch: called after every round.

    Raises:
        InputError: its folder holds something else; see ``train``.
    """
    path = config.folder
    if is_completed(config):
        return path
    if (path / "config.toml").is_file():
        return train(config, resume=path, watch=watch).path
    if path.is_dir():  # what a kill may leave of a run that was just being made
        if odd := {entry.name for entry in path.iterdir()} - {"checkpoint.json"}:
            raise InputError(str(path), f"a folder that is no run ({odd.pop()})", "no such folder")
        (path / "checkpoint.json").unlink(missing_ok=True)
        path.rmdir()
    return train(config, watch=watch).path


def is_completed(config: RunConfig) -> bool:
    """Tell whether the run of a configuration is there and finished.

    Raises:
        InputError: a run of another configuration has its name.
    """
    path = config.folder
    if not (path / "config.toml").is_file():
        return False
    run = Run(path)
    if keys := fixed_difference(run.config, config):
        raise InputError(
            str(path), f"a run with another {keys[0]}", "another name, or its folder removed"
        )
    if run.round > config.rounds:
        raise InputError("rounds", config.rounds, f"at least the {run.round} of {path}")
    return run.round == config.rounds and (path / "summary.json").is_file()


@dataclass(frozen=True)
class Trial:
    """A configuration made real: its data, model and federation, ready to run or to read."""

    config: RunConfig
    data: FederatedData
    architecture: Architecture
    parent: bundle.Bundle | None
    model: nn.Module
    federation: Federation

    @property
    def kept(self) -> Tensors:
        """The masks under which the federation trains: name -> bool tensor, True where kept."""
        return self.federation.setup.task.masks

    @property
    def facts(self) -> dict[str, Any]:
        """What a run of it stands on, as JSON values."""
        return {
            "data": self.data.fingerprint,
            "bundle": self.parent.digest if self.parent else "none",
            "clients": len(self.data.clients),
            "classes": list(self.data.classes),
            **({"attackers": list(names)} if (names := self.federation.attackers) else {}),
        }

    def write_bundle(
        self,
        path: Path,
        stage: str,
        weights: Tensors,
        metrics: Mapping[str, Any],
        masks: Tensors | None = None,
        parent: bundle.Bundle | None = None,
        privacy: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> bundle.Bundle:
        """Write a model of this federation as a bundle with its provenance.

        Raises:
            InputError: the path holds something that is no bundle.
        """
        return write_bundle(
            path,
            stage,
            weights,
            metrics,
            config=self.config,
            architecture=self.architecture,
            data=self.data.fingerprint,
            masks=masks,
            kept=self.kept,
            parent=parent or self.parent,
            tokenizer=self.data.tokenizer.as_json() if self.data.tokenizer else "",
            privacy=privacy,
            labels=self.data.classes,
        )


def write_bundle(
    path: Path,
    stage: str,
    weights: Tensors,
    metrics: Mapping[str, Any],
    *,
    config: RunConfig,
    architecture: Architecture,
    data: str,
    masks: Tensors | None = None,
    kept: Tensors | None = None,
    parent: bundle.Bundle | None = None,
    tokenizer: str = "",
    privacy: Mapping[str, Mapping[str, Any]] | None = None,
    labels: Sequence[str] = (),
) -> bundle.Bundle:
    """Write a model of a run as a bundle with its provenance; see ``bundle.write``.

    Of text, whose classes are tokens, ``labels`` are left out.

    Raises:
        InputError: the path holds something that is no bundle.
    """
    values = config.as_dict()
    return bundle.write(
        path,
        stage=stage,
        weights=weights,
        architecture=architecture.model_dump(mode="json", exclude_none=True),
        config={key: value for key, value in values.items() if key not in _NOT_PROVENANCE},
        seed=config.seed,
        data=data,
        metrics=metrics,
        masks=masks,
        kept=kept,
        parent=parent,
        tokenizer=tokenizer,
        privacy=privacy,
        labels=() if architecture.is_language else labels,
    )


def diverged(config: RunConfig, error: DivergedError) -> InputError:
    """Return the error that a user can mend, of a loss that is no number."""
    return InputError(
        "training.lr",
        f"{config.training.lr}, with which {error}",
        "a rate at which the loss stays finite, or on_failure = 'drop'",
    )


def prepare(
    config: RunConfig, data: FederatedData | None = None, masks: Tensors | None = None
) -> Trial:
    """Read the data, build the model, and set up the federation of a configuration.

    Args:
        config: the configuration.
        data: what ``federate`` returned before for the same data and seed, to save the reading.
        masks: what was found before the first round.

    Raises:
        InputError: input that cannot be used.
    """
    data = read_data(config) if data is None else data
    model, architecture, parent = make_model(config, data)
    if masks:
        attach(model, masks)
    elif config.pruning:
        check_pruning(model, config.pruning)
    federation = Federation(
        model,
        data.clients,
        config.method,
        config.training,
        seed=config.seed,
        participation=config.participation,
        buffers=config.model.buffers,
        tree=tree_of(config, data),
        engine=config.engine,
        on_failure=config.on_failure,
        compare_up_to=config.compare_up_to,
        objective=objective_of(architecture, data.bytes_of),
        robust=config.robust,
        attackers=config.attackers,
        rules=config.rules,
        central=config.central,
    )
    return Trial(config, data, architecture, parent, model, federation)


def read_data(config: RunConfig) -> FederatedData:
    """Return what the nodes of a configuration hold.

    Raises:
        InputError: see ``federate`` and ``federate_text``.
    """
    if config.text is None:
        return federate(config.data, config.seed)
    sources = {name: node.text for name, node in config.nodes.items() if node.text is not None}
    size, text = config.training.batch_size, config.text
    tokenizer = None
    if text.tokenizer == "bundle":
        tokenizer = _tokenizer_of(config.model.bundle)
    if text.answers is None:
        return federate_text(text, sources, ROOT, size, config.seed, tokenizer)
    tree = config.shape()
    return federate_answers(
        text.answers,
        sources,
        ROOT,
        leaves=[name_of(path) for path in tree.leaves()],
        context=text.context,
        shares={"validation": text.validation, "test": text.test},
        batch_size=size,
        seed=config.seed,
        tokenizer=tokenizer or (text.vocabulary if text.tokenizer == "bpe" else None),
    )


def _tokenizer_of(path: str | None) -> Tokenizer:
    """Return the tokenizer that a bundle was trained with."""
    found = bundle.read_bundle(Path(path)) if path else None
    if found is None or not found.tokenizer:
        raise InputError(
            "text.tokenizer",
            f"'bundle' and {'no model.bundle' if found is None else 'one without a tokenizer'}",
            "model.bundle of a language model, 'bytes' or 'bpe'",
        )
    return tokenizer_from_json(found.tokenizer)


def tree_of(config: RunConfig, data: FederatedData) -> Tree:
    """Return the shape of a configuration's federation."""
    if config.nodes:
        return config.shape()
    return Tree.grouped(data.clients, config.tree.federations)


def make_model(
    config: RunConfig, data: FederatedData
) -> tuple[nn.Module, Architecture, bundle.Bundle | None]:
    """Return a configuration's model at its initial values, masks of its bundle included.

    Raises:
        InputError: input that cannot be used.
    """
    parent = bundle.read_bundle(Path(config.model.bundle)) if config.model.bundle else None
    architecture = Architecture(
        name=config.model.name,
        options=config.model.options,
        shape=data.shape,
        classes=len(data.classes),
        channels=parent.architecture.get("channels") if parent else None,
    )
    architecture = resolved(architecture)
    model = build(architecture, config.seed)
    if parent is not None and not config.model.fresh:
        if data.tokenizer is not None and parent.tokenizer != data.tokenizer.as_json():
            raise InputError("model.bundle", "other tokens than the run's", "the same tokenizer")
        _take_weights(model, parent, config)
        if parent.kept and config.pruning:
            raise InputError("pruning", "a bundle that is pruned already", "one that is not")
        attach(model, parent.kept)
    return model, architecture, parent


def _pruned(run: Run, trial: Trial) -> Tensors:
    """Find the masks that a run trains under, and keep them in it."""
    config = trial.config
    assert config.pruning is not None  # noqa: S101 the caller has looked
    _log.info("pruning by %s to a density of %g", config.pruning.method, config.pruning.density)
    try:
        masks, result = pre_round(
            trial.model,
            trial.data.clients,
            config.pruning,
            config.training,
            seed=config.seed,
            tree=tree_of(config, trial.data),
            engine=config.engine,
            on_failure=config.on_failure,
        )
    except DivergedError as error:
        raise InputError(
            "pruning", f"{config.pruning.method}, with which {error}", "smaller inner steps"
        ) from error
    run.keep_masks(masks, result)
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    _log.info("%d of %d weights are kept", kept, total)
    return masks


def _rounds(run: Run, whole: Trial, store: Store, watches: Sequence[Watch]) -> Trial:
    """Run the rounds that are left, and return what the last of them ran on."""
    config, trial = run.config, whole
    try:
        while run.round < config.rounds:
            trial, last, spent = _with_kept(run, whole, store)
            rounds = trial.federation.rounds(
                config.rounds, run.round + 1, config.score_every, run.plan
            )
            with closing(rounds):
                for result in rounds:
                    result = replace(result, visits=(*spent, *result.visits))
                    spent = ()
                    run.record(result, trial.federation.plan)
                    for watch in watches:
                        watch(run, result)
                    if result.number == last:
                        break
    except DivergedError as error:
        raise diverged(config, error) from error
    except MessageError as error:
        raise InputError(
            str(run.path), f"states that do not fit the model ({error})", "the run's own model"
        ) from error
    return trial


def _with_kept(run: Run, whole: Trial, store: Store) -> tuple[Trial, int, tuple[Visit, ...]]:
    """Return what the next rounds run on, the last of them, and what it took to find that out.

    Args:
        run: the run, some rounds of which are done.
        whole: all of the data.
        store: the states as of the last round.
    """
    config, options = run.config, run.config.curation
    if options is None or not isinstance(whole.data, Answers):
        return whole, config.rounds, ()
    start = run.round // options.every * options.every if options.every else 0
    kept = run.curated(run.round)
    if kept is None or kept.manifest["round"] < start:
        whole.federation.keep_states_in(store, run.round)
        kept = _curated(whole, start)
        run.keep_curated(kept)
    trial = prepare(config, kept.apply(whole.data), run.masks)
    trial.federation.keep_states_in(store, run.round)
    spent = tuple(Visit(**visit) for visit in kept.manifest["ledger"])
    last = min(config.rounds, start + options.every) if options.every else config.rounds
    return trial, last, spent if run.round == start else ()


def _curated(trial: Trial, start: int) -> Kept:
    """Return which examples are used from here on, by the model as it is now."""
    options = trial.config.curation
    assert options is not None  # noqa: S101 the caller has looked
    if options.masks is not None:
        kept = read_kept(Path(options.masks))
        return replace(kept, manifest={**kept.manifest, "round": start, "ledger": []})
    model = trial.federation.model_of(ROOT)
    _log.info("scoring the clients' examples by %s", ", ".join(options.deciding))
    cohort = cohort_of(trial)
    deciding = options.model_copy(update={"scores": options.deciding})
    kept = curated(replace(cohort, options=deciding), model)
    for name, each in kept.manifest["counts"].items():
        samples, left = (sum(row[k] for row in each.values()) for k in ("samples", "kept"))
        _log.info("%s keeps %d of %d examples", name, left, samples)
    return replace(kept, manifest={**kept.manifest, "round": start})


def cohort_of(trial: Trial) -> Cohort:
    """Return who takes part in the curation that a configuration asks for.

    Raises:
        InputError: public examples that cannot be used.
    """
    config, data = trial.config, trial.data
    if config.curation is None or config.text is None or config.text.answers is None:
        raise InputError("curation", "nothing", "a table [curation], and [text.answers]")
    assert isinstance(data, Answers)  # noqa: S101 which [text.answers] makes it
    return Cohort(
        trial.model,
        data,
        read_public(config.curation, config.text.answers, data),
        config.curation,
        config.shape(),
        config.engine,
        config.training,
        config.seed,
    )


_NOT_PROVENANCE = ("engine", "name", "output", "tracking")
"""How and where a run was computed and watched does not change its result: it is in no digest."""


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
    if keys := fixed_difference(run.config, wanted):
        raise InputError(keys[0], "another value than the run's", "the run's own configuration")
    if wanted.rounds < run.round:
        raise InputError("rounds", wanted.rounds, f"at least the {run.round} rounds already there")
    return wanted, run


def fixed_difference(first: RunConfig, second: RunConfig) -> list[str]:
    """Return the dotted keys in which two configurations are not those of one run."""
    return [key for key in difference(first, second) if not key.startswith(CHANGEABLE)]


def _take_weights(model: nn.Module, parent: bundle.Bundle, config: RunConfig) -> None:
    mine, weights = model.state_dict(), beside_adapters(model, parent.weights)
    for name in sorted(mine.keys() | weights.keys()):
        theirs = weights.get(name)
        if name not in mine or theirs is None or theirs.shape != mine[name].shape:
            raise InputError(
                "model.bundle",
                f"{config.model.bundle}, whose weights differ from {config.model.name} in {name}",
                "a bundle of the same model",
            )
    model.load_state_dict(dict(weights))
