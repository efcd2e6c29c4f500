"""The demo: both pipelines that come with Hansa, smaller, one after the other."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hansa.pipeline import Piped, pipeline

Watch = Callable[[str, str, int, int], None]
_log = logging.getLogger("hansa")

SMALLER: dict[str, tuple[str, ...]] = {
    "edge": (
        *("profile.models=12", "search.budget=12", "search.repeats=0", "search.proxies=[]"),
        *("train.rounds=4", "personalise.rounds=2"),
    ),
    "language": (
        *("base.rounds=5", "base.training.lr_rounds=5", "base.score_every=0"),
        *("train.rounds=4", "train.training.lr_rounds=4"),
    ),
}
"""What is overridden, so that both take minutes together."""

METHODS: dict[str, dict[str, Any]] = {
    "local": {},
    "fedavg": {},
    "fedavg-tuned": {},
    "fedselect": {"rate": 0.05, "limit": 0.3},
}
"""Methods of the small comparison that ``examples/digits-*.toml`` and a benchmark stand on."""


def config_of(method: str) -> dict[str, Any]:
    """Return the configuration of one of them: ten clients with two classes of digits each."""
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


def demo(output: Path, seed: int = 0, watch: Watch | None = None) -> list[Piped]:
    """Run both pipelines and return what they made; stages that are done are kept.

    Without ``transformers`` the language pipeline is left out, with a warning.

    Args:
        output: the folder that their own are made in.
        seed: of both.
        watch: called with a stage's name, what it does, how much of it is done, and of how much.
    """
    made = []
    for name, smaller in SMALLER.items():
        if name == "language" and importlib.util.find_spec("transformers") is None:
            _log.warning("the language pipeline is left out: pip install 'hansa[language]'")
            continue
        own = (f"output={output}", f"seed={seed}", f"name={name}-demo")
        made.append(pipeline(name, overrides=[*own, *smaller], watch=watch))
    return made
