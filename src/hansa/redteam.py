"""The red-team stage: attack a safeguard and its controls, and say what that cost the attacker.

Cells are done once: the same command goes on where an earlier one stopped, and does what is new
after a change of the configuration.

``cells/``
    one file for each attack, rate, seed and model, with all that was measured on the way.
``scorecard.json``, ``scorecard.md``, ``report.html``
    what they say, for programs and for people.
``harness-KEY.json``
    benchmarks of a model of real text, where some were asked for.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hansa import bundle
from hansa.bundle import CARD, Bundle, read_bundle
from hansa.errors import InputError, first_line
from hansa.files import write_atomic
from hansa.report.safeguard import report
from hansa.runs import claim, locked
from hansa.safeguard import harness
from hansa.safeguard.attack_grids import attacks_of, edits_of
from hansa.safeguard.attacks import Probe
from hansa.safeguard.grid import Bench, cells_of, check_parts, run
from hansa.safeguard.models import Loaded, load_model
from hansa.safeguard.opened import open_data
from hansa.safeguard.redteam_options import Attack, Edit, RedteamOptions
from hansa.safeguard.rows import Data
from hansa.safeguard.scorecard import Facts, scorecard
from hansa.safeguard.scorecard_text import CLAIM, markdown
from hansa.safeguard_config import SafeguardConfig, load, of_card

Watch = Callable[[str, int, int], None]
_KNOWN = ("unprotected", "before", "safeguarded", "never")
_TOLD = (
    "threat", "flags", "chance", "floor", "recovery", "recovery_of_use", "half", "half_of_use",
    "retained", "cost_in_steps",
)  # fmt: skip
"""What of a scorecard stands in a bundle's card."""


@dataclass(frozen=True)
class Redteamed:
    """What the stage made.

    Attributes:
        path: its folder.
        scorecard: what attacks did, as JSON values.
        report: the page about it.
        bundle: folder of the bundle whose card holds the scorecard, where one was asked for.
    """

    path: Path
    scorecard: dict[str, Any]
    report: Path
    bundle: Path | None = None


def redteam(
    source: str | Path | Mapping[str, Any],
    *,
    overrides: Iterable[str] = (),
    of: str | Path | None = None,
    out: str | Path | None = None,
    join: bool = False,
    watch: Watch | None = None,
) -> Redteamed:
    """Attack all models that ``safeguard`` made of a configuration, or one bundle.

    Args:
        source: the configuration, the one in a run's own folder, or the folder of a bundle, of
            whose card the configuration is taken; alone it has no controls, and its scorecard says
            so.
        overrides: ``key=value`` with dotted keys, such as ``redteam.processes=2``.
        of: the folder that the safeguard was made in, where the configuration does not tell.
        out: the folder to make or to go on in; by default ``redteam`` in the run's folder, and
            ``redteam-NAME`` beside a bundle.
        join: whether to write the bundle again, its card with the scorecard, beside it.
        watch: called with what was done, how much of it is done, and of how much.

    Raises:
        InputError: input that cannot be used.
    """
    config = load(source, overrides)
    models = _models(source, config, Path(of) if of is not None else None)
    stage = _Stage(config, models)
    path = Path(out) if out is not None else models.place
    claim(path, (path / "cells").is_dir(), (), "a red team's")
    with locked(path):
        card = stage.run(path, watch)
        write_atomic(path / "config.toml", config.as_toml())
        write_atomic(path / "scorecard.json", json.dumps(card, indent=2) + "\n")
        write_atomic(path / "scorecard.md", markdown(card))
        page = report(path / "report.html", card, config.as_toml())
        safeguarded = models.paths["safeguarded"]
        joined = with_scorecard(safeguarded, card, config.redteam) if join else None
    return Redteamed(path, card, page, joined)


def with_scorecard(
    path: str | Path,
    card: Mapping[str, Any],
    options: RedteamOptions,
    out: str | Path | None = None,
) -> Path:
    """Write a bundle again, with a scorecard in its card under ``metrics.redteam``.

    Args:
        path: folder of the bundle, which becomes the new one's parent.
        card: its scorecard.
        options: how it was attacked, which stands in the card under ``config.redteam``.
        out: the folder to make; by default ``NAME-redteam`` beside the bundle.

    Raises:
        InputError: a scorecard of another bundle, or no place to write.
    """
    parent = read_bundle(path)
    if card.get("bundle") != parent.digest:
        found = f"the scorecard of {str(card.get('bundle'))[:16]}"
        raise InputError(str(path), found, f"that of {parent.digest[:16]}")
    whole = Path(path).resolve()
    beside = whole.with_name(f"{whole.name}-redteam") if out is None else Path(out)
    told = {"claim": CLAIM, **{key: card[key] for key in _TOLD}}
    asked = options.model_dump(mode="json", exclude_none=True, exclude={"processes"})
    bundle.restated(parent, beside, "redteam", told, asked)
    return beside


@dataclass(frozen=True)
class _Models:
    """The models that are attacked, by role, and where results go."""

    paths: dict[str, Path]
    cost: dict[str, float]
    place: Path


class _Stage:
    """What is attacked, with what, by which attacks; all of it checked before any work."""

    def __init__(self, config: SafeguardConfig, models: _Models) -> None:
        self.config, self.options, self.models = config, config.redteam, models
        bundles = {role: read_bundle(path) for role, path in models.paths.items()}
        self.roles = {role: found.digest for role, found in bundles.items()}
        self.loaded = _with_tokenizer(config, models.paths["safeguarded"])
        self.data = open_data(config.data, self.loaded)
        _check_bundles(bundles, self.data)
        _check_made(bundles["safeguarded"], config)
        check_parts(self.data)
        self.chance = Probe(self.data, self.options.templates).chance
        try:
            torch.zeros(1, device=self.options.device)
        except (RuntimeError, AssertionError) as error:
            found = f"{self.options.device!r} ({first_line(error)})"
            raise InputError("redteam.device", found, "cpu, cuda, ...") from error
        if self.options.harness is not None:
            harness.check(self.loaded)
        self.notes: list[str] = []
        if any(phase.kind == "refusal" for phase in config.chain):
            self.notes.append(
                "refusals: no attack trains on answers that are refused, and none are counted"
            )
        self.attacks, self.edits = self._attacks(), self._edits()
        self.cells = cells_of(self.roles, self.attacks, self.edits, self.options.seeds)

    def run(self, path: Path, watch: Watch | None) -> dict[str, Any]:
        """Do what is not done yet, and return the scorecard."""
        options, paths = self.options, self.models.paths
        bench = Bench(
            self.data,
            {digest: str(paths[role]) for role, digest in self.roles.items()},
            options.probes,
            options.templates,
            options.device,
            self.roles.get("unprotected"),
        )
        every = [cell for mine in self.cells.values() for cell in mine]
        found = run(every, bench, path / "cells", options.processes, watch)
        facts = Facts(
            name=self.config.name,
            roles=self.roles,
            chance=self.chance,
            tokens=self.data.context,
            floor=options.floor,
            seed=self.config.seed,
            data=self.data.fingerprint(),
            cost_in_steps=self.models.cost,
            harness=self._benchmarks(path),
            notes=self.notes,
        )
        return scorecard(
            {role: [found[cell] for cell in mine] for role, mine in self.cells.items()}, facts
        )

    def _attacks(self) -> list[Attack]:
        chosen = attacks_of(self.options)
        self._check_roles(chosen)
        if self.data.fresh() is not None:
            return chosen
        left = [spec for spec in chosen if spec.data != "fresh"]
        if len(left) < len(chosen):
            if self.options.attacks is not None:
                found = "'fresh', which these data do not have"
                raise InputError("redteam.attacks.data", found, "benign")
            self.notes.append("fresh: these data have no task that the model has not seen")
        return left

    def _edits(self) -> list[Edit]:
        chosen = edits_of(self.options)
        self._check_roles(chosen)
        if "unprotected" not in self.roles and any(how.kind == "merge" for how in chosen):
            self.notes.append("merge: there is no unprotected model to mix with")
        return chosen

    def _check_roles(self, hows: Sequence[Attack | Edit]) -> None:
        known = list(dict.fromkeys([*_KNOWN, *self.roles]))
        for how in hows:
            if odd := [role for role in how.roles if role not in known]:
                found = f"{odd[0]!r} as a role of {how.name}"
                raise InputError("redteam.attacks.roles", found, ", ".join(known))

    def _benchmarks(self, path: Path) -> dict[str, Any]:
        options = self.options.harness
        if options is None:
            return {}
        found = {}
        for role, digest in self.roles.items():
            about = json.dumps([digest, options.model_dump(mode="json")], sort_keys=True)
            file = path / f"harness-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"
            if not file.exists():
                model = load_model(str(self.models.paths[role]), self.data.context).model
                told = harness.evaluate(options, model, self.loaded, self.options.device)
                write_atomic(file, json.dumps(told, indent=2) + "\n")
            found[role] = json.loads(file.read_text())
        return found


def _models(
    source: str | Path | Mapping[str, Any], config: SafeguardConfig, of: Path | None
) -> _Models:
    """Return where the models are.

    Raises:
        InputError: there are none.
    """
    if not isinstance(source, Mapping) and (Path(source) / CARD).is_file():
        path = Path(source)
        name = path.resolve().name
        return _Models({"safeguarded": path}, {}, path.resolve().with_name(f"redteam-{name}"))
    folder = of or config.folder
    if (
        of is None
        and not isinstance(source, Mapping)
        and (Path(source).parent / "models.json").is_file()
    ):
        folder = Path(source).parent  # the configuration that lies in a run's own folder
    file = folder / "models.json"
    try:
        told = json.loads(file.read_text())
        paths = {str(role): folder / path for role, path in told["roles"].items()}
        cost = {str(role): float(steps) for role, steps in told["cost_in_steps"].items()}
        if "safeguarded" not in paths:
            raise KeyError("safeguarded")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"no models of a safeguard ({type(error).__name__})"
        raise InputError(str(file), found, "what hansa safeguard CONFIG makes") from error
    return _Models(paths, cost, folder / "redteam")


def _with_tokenizer(config: SafeguardConfig, path: Path) -> Loaded:
    """Return the safeguarded model, with the tokenizer of the one that it was made of."""
    context = getattr(config.data, "context", 0)
    loaded = load_model(str(path), context)
    beside = path.parent / "model"  # what the safeguard stage wrote for transformers
    source = config.model.path or (str(beside) if beside.is_dir() else None)
    if loaded.tokenizer or source is None:
        return loaded
    start = load_model(source, context)
    return Loaded(
        loaded.model, loaded.architecture, start.tokenizer, start.own_tokenizer, loaded.parent
    )


def _check_bundles(bundles: Mapping[str, Bundle], data: Data) -> None:
    """Refuse models of other data or other tokens than those that are asked for.

    Raises:
        InputError: naming the role.
    """
    for role, found in bundles.items():
        classes = found.architecture["classes"]
        if classes != data.vocabulary:
            tokens = f"{classes} tokens of {role}"
            raise InputError("data", tokens, f"{data.vocabulary}, as the data have")
        if found.card["data"] != data.fingerprint():
            other = f"other data than {role} was made with"
            raise InputError(
                "data", other, "the same, of which nobody was trained on what is asked"
            )


def _check_made(safeguarded: Bundle, config: SafeguardConfig) -> None:
    """Refuse models that another configuration has made.

    Raises:
        InputError: they are of other phases or of another seed.
    """
    made = load(of_card(safeguarded.card))  # with what it leaves to defaults
    if (made.chain, made.seed) != (config.chain, config.seed):
        found = "models that were made before the configuration changed"
        raise InputError("phases", found, "hansa safeguard CONFIG first")
