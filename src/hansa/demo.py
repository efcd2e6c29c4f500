"""The demo: four methods on handwritten digits, held by ten clients of two classes each."""

from pathlib import Path
from typing import Any

from hansa.report import report
from hansa.runs import Run
from hansa.training import Watch, train

METHODS: dict[str, dict[str, Any]] = {
    "local": {},
    "fedavg": {},
    "fedavg-tuned": {},
    "fedselect": {"rate": 0.05, "limit": 0.3},
}


def config_of(method: str) -> dict[str, Any]:
    """Return the configuration of one of the demo's runs; ``examples/`` holds the same as files."""
    return {
        "name": f"digits-{method}",
        "rounds": 20,
        "data": {
            "source": "digits",
            "clients": 10,
            "validation": 0.2,
            "test": 0.5,
            "train_per_class": 5,
            "partition": {"kind": "shards", "classes": 2},
        },
        "model": {"name": "mlp", "options": {"hidden": [64]}},
        "training": {"lr": 0.1, "batch_size": 5, "epochs": 5},
        "method": {"name": method, **METHODS[method]},
    }


def demo(output: Path, seed: int = 0, watch: Watch | None = None) -> tuple[list[Run], Path]:
    """Run the demo and return its runs and the page that compares them."""
    runs = []
    for method in METHODS:
        config = {**config_of(method), "output": str(output), "seed": seed}
        runs.append(train(config, watch=watch))
    return runs, report(runs, output / "report.html")
