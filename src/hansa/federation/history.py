"""What a run measured, as tables, and their summary."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hansa.federation.engines.engine import RoundResult
from hansa.federation.tree import name_of

SCHEMAS: dict[str, pa.Schema] = {
    # One row per scored leaf, split and metric; divide sum by count for the value.
    "scores": pa.schema(
        [
            ("round", pa.int32()),
            ("node", pa.string()),
            ("split", pa.string()),
            ("metric", pa.string()),
            ("sum", pa.float64()),
            ("count", pa.float64()),
        ]
    ),
    # One row per child asked: bytes as encoded, those of its reply as papers on sparse training
    # count them (csr), and the metrics of its local training.
    "ledger": pa.schema(
        [
            ("round", pa.int32()),
            ("node", pa.string()),
            ("fate", pa.string()),
            ("down", pa.int64()),
            ("up", pa.int64()),
            ("csr", pa.int64()),
            ("simulated_seconds", pa.float64()),
            ("loss_sum", pa.float64()),
            ("accuracy_sum", pa.float64()),
            ("count", pa.float64()),
            ("error", pa.string()),
        ]
    ),
    # One row per ordered pair of clients (accuracy) or per two of them (iou), see RoundResult.
    "pairs": pa.schema(
        [
            ("round", pa.int32()),
            ("first", pa.string()),
            ("second", pa.string()),
            ("metric", pa.string()),
            ("sum", pa.float64()),
            ("count", pa.float64()),
        ]
    ),
    # One row per figure that a node noted, about another node or none (empty).
    "figures": pa.schema(
        [
            ("round", pa.int32()),
            ("node", pa.string()),
            ("other", pa.string()),
            ("name", pa.string()),
            ("value", pa.float64()),
        ]
    ),
    # One row per round: wall seconds, samples that clients trained on, and how it was done.
    "rounds": pa.schema(
        [
            ("round", pa.int32()),
            ("seconds", pa.float64()),
            ("samples", pa.float64()),
            ("engine", pa.string()),
        ]
    ),
}


def tables_of(result: RoundResult) -> dict[str, pa.Table]:
    """Return one round as tables."""
    scores = [
        (result.number, node, split, metric, total, count)
        for node, splits in result.scores.items()
        for split, metrics in splits.items()
        for metric, (total, count) in metrics.items()
    ]
    ledger = []
    for visit in result.visits:
        loss, count = visit.metrics.get("loss", (0.0, 0.0))
        accuracy, _ = visit.metrics.get("accuracy", (0.0, 0.0))
        about = (visit.path, visit.fate, visit.down, visit.up, visit.csr, visit.seconds)
        ledger.append((result.number, *about, loss, accuracy, count, visit.error))
    rows: dict[str, list[tuple[Any, ...]]] = {
        "scores": scores,
        "ledger": ledger,
        "pairs": [(result.number, *pair) for pair in result.pairs],
        "figures": [(result.number, *figure) for figure in result.figures],
        "rounds": [(result.number, result.seconds, result.samples, result.engine)],
    }
    return {
        name: pa.Table.from_pylist(
            [dict(zip(schema.names, row, strict=True)) for row in rows[name]], schema
        )
        for name, schema in SCHEMAS.items()
    }


class History:
    """The tables of a run, round by round."""

    def __init__(self, tables: Iterable[dict[str, pa.Table]] = ()) -> None:
        self._parts: dict[str, list[pa.Table]] = {
            name: [schema.empty_table()] for name, schema in SCHEMAS.items()
        }
        for table in tables:
            self.add(table)

    def add(self, tables: dict[str, pa.Table]) -> None:
        """Append the tables of one round or of several."""
        for name, table in tables.items():
            self._parts[name].append(table)

    def table(self, name: str) -> pa.Table:
        """Return one table whole: by its name in ``SCHEMAS``."""
        self._parts[name] = [pa.concat_tables(self._parts[name])]
        return self._parts[name][0]

    @property
    def num_rounds(self) -> int:
        """The last round recorded, 0 before the first."""
        rounds = self.table("rounds")["round"].to_numpy()
        return int(rounds.max()) if len(rounds) else 0

    def scored(self, split: str, metric: str) -> dict[int, dict[str, float]]:
        """Return round -> node name -> value, for one metric on one split.

        ``perplexity`` is the exponential of the mean loss of a node.
        """
        if metric == "perplexity":
            losses = self.scored(split, "loss").items()
            return {number: {n: perplexity(v) for n, v in row.items()} for number, row in losses}
        values: dict[int, dict[str, float]] = {}
        table = self.table("scores")
        chosen = (table["split"].to_numpy() == split) & (table["metric"].to_numpy() == metric)
        for row in table.filter(pa.array(chosen)).to_pylist():
            if row["count"]:
                leaf = name_of(row["node"])
                values.setdefault(row["round"], {})[leaf] = row["sum"] / row["count"]
        return values

    def epsilons(self) -> dict[str, float | None]:
        """Return private node -> epsilon that it has spent, as it was last told.

        A federation of a deployment tells the sum over its members, which is nobody's: None.
        """
        found: dict[str, float | None] = {}
        told = (pc.field("split") == "state") & (pc.field("metric") == "epsilon")
        for row in self.table("scores").filter(told).to_pylist():  # in the order of the rounds
            if row["count"]:
                found[name_of(row["node"])] = row["sum"] if row["count"] == 1 else None
        return found

    @property
    def is_language(self) -> bool:
        """Whether what was scored is a language model."""
        return "bits_per_byte" in pc.unique(self.table("scores")["metric"]).to_pylist()

    def leaves(self) -> set[str]:
        """Return the names of the nodes that stand above no other."""
        tables = self.table("ledger"), self.table("scores")
        nodes = {node for table in tables for node in pc.unique(table["node"]).to_pylist()}
        above = {node.rpartition("/")[0] for node in nodes}
        return {name_of(node) for node in nodes - above}

    def pairs(self, metric: str) -> dict[tuple[str, str], float]:
        """Return (first, second) -> value of the last round in which clients were compared."""
        table = self.table("pairs")
        if not len(table):
            return {}
        last = table["round"].to_numpy().max()
        return {
            (name_of(row["first"]), name_of(row["second"])): row["sum"] / row["count"]
            for row in table.to_pylist()
            if row["round"] == last and row["metric"] == metric and row["count"]
        }

    def bytes(self) -> dict[int, tuple[int, int]]:
        """Return round -> (up, down), bytes summed over all edges of the tree."""
        totals: dict[int, tuple[int, int]] = {}
        ledger = self.table("ledger")
        columns = (ledger[name].to_pylist() for name in ("round", "up", "down"))
        for number, up, down in zip(*columns, strict=True):
            before = totals.get(number, (0, 0))
            totals[number] = (before[0] + up, before[1] + down)
        return totals

    def excluded(self) -> dict[str, int]:
        """Return name of a node -> rounds in which its reply was of no use; those with any."""
        ledger = self.table("ledger")
        names = ledger["node"].filter(pc.equal(ledger["fate"], "excluded")).to_pylist()
        return dict(sorted(Counter(map(name_of, names)).items()))

    def chosen_round(self) -> int | None:
        """Return the scored round that does best on validation data, the first among equals.

        That is the one of the highest mean accuracy, or of a language model the one of the lowest
        mean loss over leaves.

        Returns:
            None where no client holds validation data.
        """
        metric, sign = ("loss", -1) if self.is_language else ("accuracy", 1)
        leaves = self.leaves() if self.is_language else None
        means = {
            number: sign * float(np.mean(chosen))
            for number, values in self.scored("validation", metric).items()
            if (chosen := [v for leaf, v in values.items() if leaves is None or leaf in leaves])
        }
        return max(means, key=lambda number: (means[number], -number)) if means else None

    def summary(self) -> dict[str, Any]:
        """Return the run in a few numbers: test scores over clients, bytes, speed.

        Metrics are those of the last scored round, and under ``..._chosen`` of the round that does
        best on validation data. A language model has two moments: after the aggregation, and
        ``..._after_local_steps``. ``csr`` is the upload as papers on sparse training count it
        (``wire.csr_size``). ``excluded`` names nodes whose replies were of no use, with the number
        of rounds, where there are any; ``epsilon`` is the most that a private node has spent.
        """
        metrics = self._of_language() if self.is_language else self._of_classes()
        totals = self.bytes().values()
        excluded = self.excluded()
        spent = [value for value in self.epsilons().values() if value is not None]
        return {
            "rounds": self.num_rounds,
            "metrics": metrics,
            "bytes": {
                "up": sum(up for up, _ in totals),
                "down": sum(down for _, down in totals),
                "csr": sum(self.table("ledger")["csr"].to_pylist()),
            },
            "speed": self._speed(),
            "seconds": round(sum(self.table("rounds")["seconds"].to_pylist()), 3),
            **({"excluded": excluded} if excluded else {}),
            **({"epsilon": max(spent)} if spent else {}),
        }

    def _of_classes(self) -> dict[str, Any]:
        """Return accuracy and loss over clients."""
        metrics: dict[str, Any] = {}
        for metric in ("accuracy", "loss"):
            by_round = self.scored("test", metric)
            if by_round:
                last = list(by_round[max(by_round)].values())
                metrics[metric] = spread(last, higher_is_better=metric == "accuracy")
            if by_round and metric == "accuracy" and (chosen := self.chosen_round()) is not None:
                values = list(by_round[chosen].values())
                metrics["accuracy_chosen"] = {"round": chosen, **spread(values)}
        return metrics

    def _of_language(self) -> dict[str, Any]:
        """Return perplexity and bits per byte over leaves, at both moments."""
        metrics: dict[str, Any] = {}
        leaves = self.leaves()
        for split, suffix in (("test", ""), ("test:trained", "_after_local_steps")):
            for metric in ("perplexity", "bits_per_byte"):
                rows = self.scored(split, metric).items()
                # A round in which leaves were scored: they may have spent their budgets.
                by_round = {k: row for k, row in rows if leaves & row.keys()}
                if by_round:
                    last = by_round[max(by_round)]
                    values = [value for leaf, value in last.items() if leaf in leaves]
                    metrics[metric + suffix] = spread(values, higher_is_better=False)
        chosen, perplexity = self.chosen_round(), self.scored("test", "perplexity")
        if chosen is not None and chosen in perplexity:
            values = [value for leaf, value in perplexity[chosen].items() if leaf in leaves]
            metrics["perplexity_chosen"] = {"round": chosen, **spread(values, False)}
        return metrics

    def _speed(self) -> dict[str, Any]:
        """Return rounds a minute, samples a second, and how the work was done."""
        trained = pc.field("round") > 0  # not what came before the first round
        rounds = self.table("rounds").filter(trained).to_pydict()
        seconds = sum(rounds["seconds"])
        rate = 1 / seconds if seconds else 0.0
        return {
            "rounds_per_minute": round(60 * len(rounds["round"]) * rate, 1),
            "samples_per_second": round(sum(rounds["samples"]) * rate, 1),
            # In the order in which the engines were first used.
            "engine": " then ".join(dict.fromkeys(rounds["engine"])),
        }


def perplexity(loss: float) -> float:
    """Return the perplexity of a mean loss in nats per token."""
    return math.exp(min(loss, 700.0))  # beyond that no float holds it


def spread(values: list[float], higher_is_better: bool = True) -> dict[str, float]:
    """Return mean, standard deviation and worst tenth over clients.

    The worst tenth is the mean over the worst tenth of the clients, rounded up to a whole client.
    """
    ranked = np.sort(values) if higher_is_better else np.sort(values)[::-1]
    worst = ranked[: -(-len(ranked) // 10)]
    return {
        "mean": float(np.mean(ranked)),
        "std": float(np.std(ranked)),
        "worst_tenth": float(np.mean(worst)),
    }
