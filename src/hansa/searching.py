"""The search stage: a configuration in, the model that was found as a bundle, and a report out.

By a table a question is looked up; by training it is a run of the recipe, kept in the folder's
own table. A searcher draws from the seed alone, so a search that is begun again asks the same
questions, and those that were trained are answered at once: that is how it goes on after a kill.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from pydantic import ValidationError

from hansa import bundle
from hansa.config import explain, values_of
from hansa.config import load as load_training
from hansa.errors import InputError
from hansa.files import write_atomic
from hansa.models.blox_space import NUM_MODELS, describe, multiply_adds, parameters, vector_of
from hansa.processes import one_thread
from hansa.report.search import report
from hansa.runs import claim, locked
from hansa.search.federated import Group, groups
from hansa.search.loop import Answer, answered, best_of, incumbents, looked_up, pursue
from hansa.search.options import SearchOptions
from hansa.search.priors import PRIORS, prior_of, proxy_scores
from hansa.search.profile import rank_correlation
from hansa.search.recipes import RECIPES, Recipe, Splits, open_data, recipe_of
from hansa.search.searchers import SEARCHERS, Optuna, Searcher
from hansa.search.simulate import simulate
from hansa.search.spaces import BLOX, Bools, Floats, Ints
from hansa.search.store import Store
from hansa.search.table import COSTS, Table
from hansa.search.tables import open_table
from hansa.search.training import train_model
from hansa.seeding import derive, numpy_generator

Watch = Callable[[str, int, int], None]
_OWN = ("config.toml", "table.sqlite", "table.sqlite-wal", "table.sqlite-shm", "blocks")


@dataclass(frozen=True)
class Found:
    """What the stage made.

    Attributes:
        path: its folder.
        model: the number of the model.
        summary: what was found, as JSON values.
        report: the page about it.
        bundle: the model, None for a table of another space.
    """

    path: Path
    model: int
    summary: dict[str, Any]
    report: Path
    bundle: Path | None


def search(
    source: str | Path | Mapping[str, Any],
    *,
    overrides: Iterable[str] = (),
    out: str | Path | None = None,
    watch: Watch | None = None,
) -> Found:
    """Search a model within limits, by a table or by training.

    Args:
        source: a configuration in TOML, or its values.
        overrides: ``key=value`` with dotted keys, such as ``limits.latency=2``.
        out: the folder to make or to go on in; by default ``OUTPUT/NAME-seedSEED``.
        watch: called with what is being done, how much of it is done, and of how much.

    Raises:
        InputError: input that cannot be used; limits that no model keeps.
    """
    options = load(source, overrides)
    path = (
        Path(out)
        if out is not None
        else Path(options.output) / f"{options.name}-seed{options.seed}"
    )
    stage = _Stage(options, path, watch or (lambda what, done, total: None))
    stage.check()
    claim(path, (path / "config.toml").is_file(), _OWN, "a search's")
    with locked(path), one_thread():
        return stage.run()


def load(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> SearchOptions:
    """Read and validate a configuration.

    Raises:
        InputError: naming the first key that is wrong, what was found and what is allowed.
    """
    values = values_of(source, overrides)
    try:
        return SearchOptions.model_validate(values)
    except ValidationError as error:
        raise explain(error, SearchOptions, values) from error


class _Stage:
    def __init__(self, options: SearchOptions, path: Path, watch: Watch) -> None:
        self.options, self.path, self.watch = options, path, watch
        self._known_prior: Floats | None = None

    def check(self) -> None:
        """Find what is wrong before anything is made."""
        options, table = self.options, self.table
        if options.recipe is not None and table is not None:
            if table.space != BLOX:
                raise InputError("recipe", options.recipe, f"none: models of {table.space.name}")
            if options.by == "training" and self.recipe != table.description:
                found = f"{options.recipe}, with a table made by {table.recipe}"
                raise InputError("recipe", found, "that of the table, whose costs are kept to")
        _ = self.feasible, self.groups, self.federations
        if self.recipe is not None and (self.options.train or self.options.by == "training"):
            _ = self.splits

    @cached_property
    def table(self) -> Table | None:
        name = self.options.table_name
        return open_table(name) if name else None

    @cached_property
    def recipe(self) -> Recipe | None:
        """How models are trained; None for a table of others."""
        if self.options.recipe is not None:
            return recipe_of(self.options.recipe)
        if self.table is not None:
            return self.table.description or RECIPES.get(self.table.recipe)
        raise InputError("recipe", "none", f"one of {', '.join(RECIPES)}, or a table")

    @cached_property
    def splits(self) -> Splits:
        assert self.recipe is not None  # noqa: S101 asked only where there is one
        return open_data(self.recipe, self.options.data)

    @cached_property
    def feasible(self) -> Bools:
        """Which candidates keep the limits: of the table's models, or of all."""
        limits = self.options.limits
        if self.table is not None:
            return limits.feasible(self.table)
        if limits.is_of_a_device:
            key = "fastest" if limits.latency is None else "latency"
            found = f"{getattr(limits, key)} without a table"
            raise InputError(f"limits.{key}", found, "a table with latencies")
        return limits.within(self.costs)

    @cached_property
    def costs(self) -> dict[str, Floats]:
        """Costs of the table's models, or of all."""
        if self.table is not None:
            return {name: self.table.column(name) for name in COSTS}
        assert self.recipe is not None  # noqa: S101 there is one where there is no table
        every, r = np.arange(NUM_MODELS), self.recipe
        adds = multiply_adds(every, r.width, r.side, r.classes, r.channels)
        found = {"parameters": parameters(every, r.width, r.classes, r.channels)}
        return {
            name: values.astype(float) for name, values in (found | {"multiply_adds": adds}).items()
        }

    @cached_property
    def candidates(self) -> Ints:
        every = np.arange(NUM_MODELS) if self.table is None else self.table.models
        found: Ints = every[self.feasible]
        return found

    @cached_property
    def groups(self) -> list[Group]:
        """Which clients train which model; none where no clients are named."""
        clients = self.options.clients
        if clients is None:
            return []
        if self.table is None:
            raise InputError("clients", "limits without a table", "a table with latencies")
        return groups(self.table, self.options.limits, clients.limits)

    def run(self) -> Found:
        options = self.options
        write_atomic(
            self.path / "config.toml",
            tomli_w.dumps(options.model_dump(mode="json", exclude_none=True)),
        )
        answers = self._searched()
        best = best_of(answers)
        summary: dict[str, Any] = {
            "name": options.name,
            "seed": options.seed,
            "by": options.by,
            "searcher": options.searcher,
            "space": self.table.space.name if self.table else BLOX.name,
            "recipe": self.table.recipe if self.table else self.recipe.name if self.recipe else "",
            "models": len(answers),
            "candidates": len(self.candidates),
            "model": best.model,
            "validation_accuracy": best.validation,
            "test_accuracy": best.test,
            "train_seconds": _known(sum(answer.seconds for answer in answers)),
            "limits": options.limits.model_dump(exclude_unset=True),
            "answers": [{**asdict(a), "seconds": _known(a.seconds)} for a in answers],
            "curve": [answer.test for answer in incumbents(answers)],
        }
        at = int(np.flatnonzero(self.candidates == best.model)[0])
        for name, values in self.costs.items():
            summary[name] = _known(values[self.feasible][at])
        if self.recipe is not None:
            summary["cells"] = describe(best.model)
            summary["arch_vec"] = vector_of(best.model)
        summary |= self._told_by_table(best.model)
        if options.proxies:
            summary["proxies"] = self._proxies()
        summary["groups"] = [asdict(group) for group in self.groups]
        made = self._bundle(best, summary)
        for name, text in self.federations.items():
            write_atomic(self.path / name, text)
        page = report(self.path / "report.html", summary, (self.path / "config.toml").read_text())
        write_atomic(self.path / "search.json", json.dumps(summary, indent=2) + "\n")
        return Found(self.path, best.model, summary, page, made)

    def _searched(self) -> list[Answer]:
        options = self.options
        space = self.table.space if self.table else BLOX
        searcher = self._searcher()
        self._known_prior = self._prior(searcher)
        search = searcher.begin(space, self.candidates, options.seed, self._known_prior)
        total = min(options.budget, len(self.candidates))
        answer = self._answer()
        answers = pursue(search, answer, total, lambda done: self.watch("searching", done, total))
        # Others who share the study may have found a better one, of which no test is known here.
        best = int(search.candidates[np.nanargmax(search.scores)])
        if best not in {each.model for each in answers}:
            answers.append(answer(best))
        return answers

    def _searcher(self) -> Searcher:
        """Return the searcher; a shared study is one of this table or recipe alone."""
        searcher = self.options.chosen
        if isinstance(searcher, Optuna):
            made = self.table.recipe if self.table else ""
            digest = self.recipe.digest if self.recipe else ""
            name = "-".join(filter(None, [searcher.study, self.options.by, made, digest]))
            return searcher.model_copy(update={"study": name})
        return searcher

    def _answer(self) -> Callable[[int], Answer]:
        """Return what finds out how good a model is."""
        if self.options.by == "training":
            return self._trained()
        assert self.table is not None  # noqa: S101 there is one by table
        return looked_up(self.table, self.options.seed)

    def _trained(self) -> Callable[[int], Answer]:
        recipe, seed = self.recipe, self.options.seed
        assert recipe is not None  # noqa: S101 checked before
        store = Store(self.path / "table.sqlite")
        store.add_recipe(recipe)
        done = {model: c for model, own, c in store.runs(recipe.name) if own == seed}

        def answer(model: int) -> Answer:
            if model not in done:
                store.add(recipe, [(model, seed)])
                done[model] = train_model(recipe.build(model, seed), recipe, self.splits, seed)
                store.finish(recipe.name, (model, seed), done[model])
            return answered(model, done[model], recipe)

        return answer

    def _prior(self, searcher: Searcher) -> Floats | None:
        """Return what the searcher is told before: a proxy's scores, or its own column."""
        prior = self.options.prior
        if prior in PRIORS:
            return self._trained_prior(prior)[self.candidates]
        if prior is not None:
            return self._scored(prior, self.candidates, "prior")
        if searcher.prior_column is None:
            return None
        values: Floats = self.costs[searcher.prior_column][self.feasible]
        return values

    def _trained_prior(self, name: str) -> Floats:
        options, recipe = self.options, self.recipe
        if recipe is None:
            raise InputError("prior", name, "none for a table of others: their models are not here")
        rng = numpy_generator(options.seed, "fitted")
        fitted = rng.permutation(self.candidates)[: options.priors.fitted]
        answer = self._answer()
        return prior_of(
            name,
            recipe,
            self.splits,
            self.path / "blocks",
            options.priors,
            options.seed,
            lambda models: np.array([answer(model).validation for model in models]),
            fitted,
            self.watch,
        )

    def _scored(self, name: str, models: Ints, what: str) -> Floats:
        """Return a proxy's scores of models at their first weights."""
        recipe = self.recipe
        if recipe is None:
            raise InputError(what, name, "none for a table of others: their models are not here")

        def watch(done: int) -> None:
            self.watch(f"{what} {name}", done, len(models))

        return proxy_scores(name, recipe, self.splits, models, self.options.seed, watch)

    def _told_by_table(self, model: int) -> dict[str, Any]:
        """Return what only a table can tell: the optimum, other seeds, the front."""
        table, options = self.table, self.options
        if table is None or options.by == "training":
            return {}
        rows = np.flatnonzero(self.feasible)
        test = table.column("test_accuracy")
        best = rows[test[rows].argmax()]
        cost = table.column("multiply_adds")
        told: dict[str, Any] = {"cost": "multiply-adds"}
        device = options.limits.device or (table.devices[0] if len(table.devices) == 1 else "")
        if (device, options.limits.batch) in table.profiled:
            cost = table.latencies(device, options.limits.batch) * 1000
            told = {"cost": f"ms on {device}, batch {options.limits.batch}"}
        front = table.front(cost, test, ~np.isnan(cost))
        return {
            **told,
            "optimum": {"model": int(table.models[best]), "test_accuracy": float(test[best])},
            "regret": float(test[best] - table.test_accuracy(model)),
            "front": [[float(cost[r]), float(test[r]), int(table.models[r])] for r in front],
            "all": [[float(c), float(t)] for c, t in zip(cost, test, strict=True) if c == c],
            "at": [_known(cost[table.row(model)]), table.test_accuracy(model)],
            "repeats": self._repeats(table),
        }

    def _repeats(self, table: Table) -> dict[str, Any]:
        """Search again by other seeds, and at random, which tells how much was luck."""
        options = self.options
        own = options.chosen
        if isinstance(own, Optuna):  # a shared study is for the search itself
            own = own.model_copy(update={"storage": None})
        both = {options.searcher: own, "random": SEARCHERS["random"]()}
        prior = None
        if self._known_prior is not None:
            prior = np.full(len(table), -np.inf)
            prior[self.feasible] = self._known_prior
        told = {}
        for number, (name, searcher) in enumerate(both.items() if options.repeats else (), 1):
            found = simulate(
                searcher,
                table.columns,
                options.repeats,
                options.budget,
                self.feasible,
                prior,
                derive(options.seed, "repeats"),
            )
            last = found.chosen[:, -1].tolist()
            told[name] = {
                "seeds": options.repeats,
                "mean": statistics.mean(last),
                "deviation": statistics.stdev(last) if len(last) > 1 else 0.0,
                "regret": float(found.regret[:, -1].mean()),
                "curve": found.chosen.mean(0).tolist(),
            }
            self.watch("other seeds", number, len(both))
        return told

    def _proxies(self) -> dict[str, Any]:
        table = self.table
        if table is None:
            raise InputError("proxies", "no table", "a table whose accuracies they are held to")
        rng = numpy_generator(self.options.seed, "proxies")
        rows = rng.permutation(len(table))[: self.options.proxy_models]
        models = table.models[rows]
        told = {}
        for name in self.options.proxies:
            scores = self._scored(name, models, "proxies")
            told[name] = {
                part: rank_correlation(scores, table.column(f"{part}_accuracy")[rows])
                for part in ("validation", "test")
            }
        return {"models": len(models), "correlations": told}

    def _bundle(self, best: Answer, summary: Mapping[str, Any]) -> Path | None:
        """Write the model, trained by its recipe or at its initial values."""
        recipe = self.recipe
        if recipe is None:
            return None
        seed = self.options.seed
        module = recipe.build(best.model, seed)
        metrics: dict[str, Any] = {"searched": {k: v for k, v in summary.items() if k in _METRICS}}
        if self.options.train:
            self.watch("training what was found", 0, 1)
            curves = train_model(module, recipe, self.splits, seed)
            metrics["test_accuracy"] = curves.test_correct[-1] / recipe.test
            self.watch("training what was found", 1, 1)
        bundle.write(
            self.path / "bundle",
            stage="search",
            weights=module.state_dict(),
            architecture=recipe.architecture(best.model).model_dump(mode="json", exclude_none=True),
            config=self.options.model_dump(mode="json", exclude_none=True, exclude={"output"}),
            seed=seed,
            data=recipe.digest,
            metrics=metrics,
        )
        return self.path / "bundle"

    @cached_property
    def federations(self) -> dict[str, str]:
        """File -> a configuration of ``hansa train``, for each federation of clients.

        Its model is of the width that was limited, unless the user's own is a Blox already.
        """
        clients, found = self.options.clients, {}
        for group in self.groups if clients is not None and clients.train is not None else ():
            values = values_of(clients.train)  # type: ignore[union-attr, arg-type]
            model = dict(values.get("model", {}))
            own = model.get("options", {}) if model.get("name") == "blox" else {"norm": "group"}
            width = {"width": self.recipe.width} if self.recipe else {}
            model |= {"name": "blox", "options": {**width, **own, "arch": group.model}}
            values["name"] = f"{values.get('name', 'run')}-{group.model}"
            values["model"] = model
            values["data"] = {**values.get("data", {}), "only": list(group.clients)}
            found[f"train-{group.model}.toml"] = load_training(values).as_toml()
        return found


def _known(value: float) -> float | None:
    """Return a number, or None for nan, which JSON does not have."""
    return None if np.isnan(value) else float(value)


_METRICS = (
    "recipe",
    "validation_accuracy",
    "test_accuracy",
    "models",
    "candidates",
    "limits",
    "regret",
)
