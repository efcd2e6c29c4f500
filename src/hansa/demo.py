"""The demo: both pipelines that come with Hansa, smaller, one after the other."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

from hansa.pipeline import Piped, pipeline

Watch = Callable[[str, str, int, int], None]
_log = logging.getLogger("hansa")

SMALLER: dict[str, tuple[str, ...]] = {
    "edge": (
        *("profile.models=8", "search.budget=8", "search.repeats=0", "search.proxies=[]"),
        "search.limits.fastest=0.5",
        *("train.rounds=5", "train.training.epochs=2"),
        *("personalise.rounds=2", "personalise.training.epochs=1"),
    ),
    "language": (
        *("base.rounds=5", "base.training.lr_rounds=5", "base.score_every=2"),
        *("train.rounds=5", "train.training.lr_rounds=5", "train.score_every=2"),
        "safeguard.controls={ never={ path='bundle:base' } }",
        "redteam.attacks=[{ name='full', steps=50, lrs=[1e-3] }]",
        *("redteam.probes=[10, 50]", "audit.cases=32"),
    ),
}
"""What is overridden, so that both take minutes together."""


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
