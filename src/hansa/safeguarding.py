"""The safeguard stage: a model in, phase by phase a safeguarded one and its controls out.

Models are made once: the same command goes on where an earlier one stopped, and after a change of
the configuration repeats the phases that it concerns.

``config.toml``
    what was asked for.
``bundle/``
    the safeguarded model; ``model/`` the same as ``transformers`` saves it, with its tokenizer,
    where the model came from there.
``models/KEY/``
    what a phase has made: ``bundle/``, and its losses step by step in ``history.json``. A key
    stands for all that the model depends on.
``models.json``
    which model is which for the red team, and what each has cost.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hansa import bundle
from hansa.bundle import digest
from hansa.errors import InputError
from hansa.files import write_atomic
from hansa.models.build import Architecture, build
from hansa.models.language import CausalLM
from hansa.processes import threads_for
from hansa.report.safeguard_training import report
from hansa.runs import claim, locked
from hansa.safeguard.federated import Collector
from hansa.safeguard.loop import descend
from hansa.safeguard.measure import scores
from hansa.safeguard.models import Loaded, load_model, state_of, take_state
from hansa.safeguard.opened import open_data
from hansa.safeguard.phases import AnyPhase
from hansa.safeguard.setup import Collect, Metrics, Setup
from hansa.safeguard.sharding import Ranks, ranks
from hansa.safeguard_config import SafeguardConfig, load

Watch = Callable[[str, int, int], None]
_log = logging.getLogger("hansa")


@dataclass(frozen=True)
class Safeguarded:
    """What the stage made.

    Attributes:
        path: its folder.
        bundle: the safeguarded model.
        summary: what every model knows and has cost, as JSON values.
        report: the page about it.
    """

    path: Path
    bundle: bundle.Bundle
    summary: dict[str, Any]
    report: Path


def safeguard(
    source: str | Path | Mapping[str, Any],
    *,
    overrides: Iterable[str] = (),
    out: str | Path | None = None,
    watch: Watch | None = None,
) -> Safeguarded:
    """Put a safeguard into a model, and make the models that it is compared with.

    Under ``torchrun`` or ``accelerate launch`` all processes train one model together, each
    holding a part of it.

    Args:
        source: a configuration, see ``SafeguardConfig``.
        overrides: ``key=value`` with dotted keys, such as ``seed=1``.
        out: the folder to make or to go on in; by default ``NAME-seedN-safeguard``.
        watch: called with what is being done, how much of it is done, and of how much.

    Raises:
        InputError: input that cannot be used.
    """
    config = load(source, overrides)
    path = Path(out) if out is not None else config.folder
    with ranks() as place:
        if place.rank:
            stage = _Stage(path, config, place, watch)
            stage.work()
            return stage.result(path / "report.html")
        begun = (path / "config.toml").is_file()
        claim(path, begun, ("config.toml",), "that of a safeguard")
        with locked(path):
            stage = _Stage(path, config, place, watch)
            write_atomic(path / "config.toml", config.as_toml())
            stage.work()
            stage.finish()
            page = report(path / "report.html", config, stage.summary, stage.histories)
            return stage.result(page)


@dataclass(frozen=True)
class _Link:
    """One model of a chain.

    Attributes:
        key: stands for all that it depends on.
        made: the phases that have made it, none for the start.
        path: where a start comes from that is not the safeguard's own.
    """

    key: str
    made: tuple[AnyPhase, ...] = ()
    path: str | None = None

    @property
    def phase(self) -> AnyPhase | None:
        """The last of them."""
        return self.made[-1] if self.made else None

    @property
    def is_start(self) -> bool:
        """Whether it is a model without any safeguard."""
        return all(phase.is_pretraining for phase in self.made)


class _Stage:
    """One folder's models, made one after another."""

    def __init__(
        self, path: Path, config: SafeguardConfig, place: Ranks, watch: Watch | None
    ) -> None:
        self.path, self.config, self.place = path, config, place
        self.watch = watch or (lambda what, done, total: None)
        source = config.model.path
        context = getattr(config.data, "context", 0)
        self._loaded = load_model(source, context) if source is not None else None
        self.data = open_data(config.data, self._loaded)
        self._others = {
            control.path: self._other(name, control.path)
            for name, control in config.controls.items()
            if control.path is not None
        }
        self.histories: dict[str, list[Metrics]] = {}

    def work(self) -> None:
        """Make every model that is not there."""
        with threads_for(sum(p.numel() for p in self._model(None).parameters())):
            for chain in self._chains.values():
                for before, link in zip([None, *chain], chain, strict=False):
                    self._make(before, link, chain)
                    self.place.wait()  # the others read what the first has written

    def finish(self) -> None:
        """Put the safeguarded model in its place, and tell which model is which."""
        before, last = self._chains["safeguarded"][-2:]
        made = self._bundle(last)
        metrics = made.card["metrics"]
        self._write(self.path / "bundle", last, made.weights, metrics, self._bundle(before))
        loaded = self._loaded
        if loaded is not None and loaded.own_tokenizer is not None:
            model: Any = copy.deepcopy(loaded.model)
            take_state(model, made.weights)
            model.config.use_cache = True  # whoever generates with it wants one
            model.save_pretrained(self.path / "model")
            loaded.own_tokenizer.save_pretrained(self.path / "model")
        for role, chain in self._chains.items():
            for link in chain:
                if link.phase is not None:
                    told = json.loads((self._folder(link) / "history.json").read_text())
                    self.histories[f"{role}: {link.phase.kind}"] = told
        write_atomic(self.path / "models.json", _json({k: self.summary[k] for k in _TOLD}))
        write_atomic(self.path / "summary.json", _json(self.summary))

    def result(self, page: Path) -> Safeguarded:
        """Return what was made."""
        return Safeguarded(
            self.path, self._bundle(self._chains["safeguarded"][-1]), self.summary, page
        )

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What every model knows and has cost."""
        found: dict[str, dict[str, Any]] = {"roles": {}, "cost_in_steps": {}, "scores": {}}
        size = self.config.chain[-1].batch_size
        for role, chain in self._chains.items():
            path = self._folder(chain[-1]).relative_to(self.path) / "bundle"
            found["roles"][role] = "bundle" if role == "safeguarded" else str(path)
            found["scores"][role] = dict(self._bundle(chain[-1]).card["metrics"])
            found["cost_in_steps"][role] = sum(
                phase.cost() * phase.batch_size / size
                for phase in chain[-1].made
                if not phase.is_pretraining
            )
        return found

    @cached_property
    def _fingerprint(self) -> str:
        """That of the data, which every bundle tells and every key depends on."""
        return self.data.fingerprint()

    @cached_property
    def _chains(self) -> dict[str, list[_Link]]:
        """The models on the way to each role, the start first."""
        config, chain = self.config, self.config.chain
        common = {
            "data": self._fingerprint,
            "seed": config.seed,
            "precision": config.precision,
        }
        start = {
            **common,
            "model": config.model.model_dump(mode="json"),
            "parent": digest(self._loaded.model.state_dict()) if self._loaded else "",
        }
        num = next(k for k, phase in enumerate(chain) if not phase.is_pretraining)
        recipes: dict[str, Sequence[AnyPhase]] = {"unprotected": chain[:num]}
        if num < len(chain) - 1:
            recipes["before"] = chain[:-1]
        recipes["safeguarded"] = chain
        for name, control in config.controls.items():
            if control.path is None:
                recipes[name] = (*chain[: control.after], *control.phases)
        found = {}
        for role, phases in recipes.items():
            links = [_Link(_key(start))]
            for phase in phases:
                key = _key([links[-1].key, phase.model_dump(mode="json")])
                links.append(_Link(key, (*links[-1].made, phase)))
            found[role] = links
        for name, control in config.controls.items():
            if control.path is not None:
                other = {"other": digest(self._others[control.path].model.state_dict())}
                found[name] = [_Link(_key({**common, **other}), path=control.path)]
        return found

    def _make(self, before: _Link | None, link: _Link, chain: Sequence[_Link]) -> None:
        folder = self._folder(link)
        if (folder / "bundle" / bundle.CARD).is_file():
            return
        if self.place.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
        model = self._model(before, link.path)
        if link.phase is None:
            assert before is None  # noqa: S101 a chain's start
            self._keep(link, model, None)
            return
        # What a safeguard must not move away from: the model before any.
        reference = before if link.is_start else [each for each in chain if each.is_start][-1]
        setup = Setup(
            self.place.shard(model),
            self.place.shard(self._model(reference).requires_grad_(False)),
            self.data,
            self.config.seed,
            getattr(torch, self.config.precision),
            self.place.rank,
            self.place.size,
            (len(link.made), link.phase.kind),
            self._collect,
        )
        what = f"{link.phase.kind} ({link.key[:6]})"
        self.watch(what, 0, link.phase.steps)
        history = descend(
            link.phase,
            setup,
            folder / "checkpoint.safetensors",
            lambda done, total, metrics: self.watch(what, done, total),
        )
        if odd := sum("skipped" in step or "diverged" in step for step in history):
            _log.warning(
                "%s: %d of %d steps with a loss that is no number", what, odd, len(history)
            )
        if self.place.rank == 0:
            write_atomic(folder / "history.json", _json(history))
        self._keep(link, setup.model, before)

    def _keep(self, link: _Link, model: nn.Module, before: _Link | None) -> None:
        """Ask a model what it knows, and write it."""
        told = {topic: vars(each) for topic, each in scores(model, self.data.questions()).items()}
        weights = state_of(model)
        if self.place.rank:
            return
        loaded = self._loaded if link.path is None else self._others[link.path]
        parent = loaded.parent if loaded else None
        if before is not None:
            parent = self._bundle(before)
        self._write(self._folder(link) / "bundle", link, weights, told, parent)
        (self._folder(link) / "checkpoint.safetensors").unlink(missing_ok=True)

    def _write(
        self,
        path: Path,
        link: _Link,
        weights: Mapping[str, torch.Tensor],
        told: Mapping[str, Any],
        parent: bundle.Bundle | None,
    ) -> None:
        config = self.config.as_dict()
        bundle.write(
            path,
            stage="safeguard" if link.phase is not None else "start",
            weights=weights,
            architecture=self._architecture.model_dump(mode="json", exclude_none=True),
            config={
                "seed": config["seed"],
                "data": config["data"],
                "precision": config["precision"],
                "phases": [phase.model_dump(mode="json", exclude_none=True) for phase in link.made],
            },
            seed=self.config.seed,
            data=self._fingerprint,
            metrics=told,
            parent=parent,
            tokenizer=self._loaded.tokenizer if self._loaded else "",
        )

    def _model(self, link: _Link | None, path: str | None = None) -> nn.Module:
        """Return a link's model, or that of a start as it comes."""
        if path is not None:
            model = copy.deepcopy(self._others[path].model)
        elif self._loaded is not None:
            model = copy.deepcopy(self._loaded.model)
        else:
            module = build(self._architecture, self.config.seed)
            assert isinstance(module, CausalLM)  # noqa: S101 options name no other
            model = module.model
        if link is not None:
            take_state(model, self._bundle(link).weights)
        return model

    def _other(self, name: str, path: str) -> Loaded:
        """Return the model of a control that does not come from the safeguard's own."""
        key, loaded = f"controls.{name}.path", load_model(path, self.data.context)
        mine, theirs = self._architecture, loaded.architecture
        own = self._loaded.tokenizer if self._loaded else ""
        is_alike = all(
            getattr(mine, k) == getattr(theirs, k) for k in ("name", "options", "classes")
        )
        if not is_alike or own != loaded.tokenizer:
            raise InputError(key, f"{path}, of another kind or tokenizer", "those of model.path")
        return loaded

    def _bundle(self, link: _Link) -> bundle.Bundle:
        return bundle.read_bundle(self._folder(link) / "bundle")

    def _folder(self, link: _Link) -> Path:
        return self.path / "models" / link.key

    @cached_property
    def _collect(self) -> Collect | None:
        """What asks the clients, where there are any."""
        clients = self.data.clients()
        if not clients:
            return None
        if self.place.size > 1:
            raise InputError("data.clients", "clients beside several ranks", "one process")
        return Collector(clients, self._model(None), self.config.seed).collect

    @cached_property
    def _architecture(self) -> Architecture:
        if self._loaded is not None:
            return self._loaded.architecture
        return Architecture(
            name=self.config.model.name,
            options=self.config.model.options,
            shape=(self.data.context,),
            classes=self.data.vocabulary,
        )


_TOLD = ("roles", "cost_in_steps")


def _key(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
