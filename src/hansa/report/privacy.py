"""What a run's [privacy] asked for, and what was spent of it."""

from hansa.report.parts import Part, table
from hansa.runs import Run

_BY = {"clients": "each client", "central": "the root, once for all"}


def spending(runs: dict[str, Run]) -> list[Part]:
    """Return a table of the runs whose clients are private, nothing where there are none."""
    rows = []
    for label, run in runs.items():
        options = run.config.privacy
        if options is None:
            continue
        spent = [value for value in run.history.epsilons().values() if value is not None]
        budget = "-" if options.epsilon is None else f"{options.epsilon:g}"
        hidden = "a sample" if options.unit == "gradient" else "all that a client has"
        rows.append(
            [
                label,
                _BY[options.where],
                hidden,
                f"{options.clip:g}",
                f"{options.noise:g}",
                f"{max(spent):.2f}" if spent else "infinite",
                budget,
                f"{options.delta:g}",
            ]
        )
    if not rows:
        return []
    return [
        table(
            "Differential privacy",
            ["method", "noise by", "hides", "clip", "noise", "epsilon spent", "budget", "delta"],
            rows,
            "Epsilon is the most that a client has spent. Noise by the root hides a client from "
            "whoever sees the models, and not from the root. Noise came from the run's seed: such "
            "a run shows what privacy costs.",
        )
    ]
