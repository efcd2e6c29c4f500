"""The number that runs are compared by: accuracy of classifiers, perplexity of language models."""

from collections.abc import Mapping
from dataclasses import dataclass

from hansa.config import RunConfig
from hansa.runs import Run


@dataclass(frozen=True)
class Measure:
    """What is compared, and how it is written.

    Attributes:
        key: what the history calls it.
        sign: 1 where higher is better, -1 where lower is.
        over: who is scored.
        one: one of them.
        scale: what values are shown times.
        digits: decimals that are shown.
        unit: stands behind a value.
        points: stands behind a difference.
    """

    key: str
    sign: int
    over: str
    one: str
    scale: float = 1.0
    digits: int = 2
    unit: str = ""
    points: str = ""

    def spread(self, values: Mapping[str, float] | None) -> str:
        """Return mean and standard deviation as a text, a dash where there is none."""
        if values is None:
            return "-"
        mean, std = (f"{self.scale * values[k]:.{self.digits}f}" for k in ("mean", "std"))
        return f"{mean} ± {std}{self.unit}"

    def difference(self, value: float) -> str:
        """Return a difference with its sign, in the measure's units."""
        return f"{self.scale * value:+.{self.digits}f}"


ACCURACY = Measure("accuracy", 1, "clients", "client", 100, 1, " %", " points")
PERPLEXITY = Measure("perplexity", -1, "leaves", "leaf")


def measure_of(config: RunConfig) -> Measure:
    """Return what a run is compared by."""
    return ACCURACY if config.text is None else PERPLEXITY


def scored_by(run: Run, split: str, key: str) -> dict[int, dict[str, float]]:
    """Return round -> node -> value, over clients or, of a language model, over leaves."""
    by_round = run.history.scored(split, key)
    if run.config.text is None:
        return by_round
    leaves = run.history.leaves()
    return {
        number: {node: value for node, value in row.items() if node in leaves}
        for number, row in by_round.items()
    }
