import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from attacked import WORLD, architecture, built

from hansa.errors import InputError
from hansa.safeguard.harness import check, evaluate
from hansa.safeguard.models import Loaded
from hansa.safeguard.redteam_options import Harness
from hansa.safeguard.world import World

ASKED = Harness(tasks=("wmdp_bio", "mmlu"), shots=5, limit=10, template=True)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand for the library, which is not installed here, and keep what it was asked."""
    asked: dict[str, Any] = {}

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        if "unheard_of" in given["tasks"]:
            raise KeyError("unheard_of")
        asked.update(given)
        results = {
            "wmdp_bio": {"alias": "wmdp_bio", "acc,none": 0.25, "acc_stderr,none": 0.1},
            "mmlu": {"exact_match,none": 0.5, "exact_match_stderr,none": "N/A"},
        }
        return {"results": results}

    top, models = ModuleType("lm_eval"), ModuleType("lm_eval.models")
    inner = ModuleType("lm_eval.models.huggingface")
    inner.HFLM = lambda **given: SimpleNamespace(**given)  # type: ignore[attr-defined]
    models.huggingface = inner  # type: ignore[attr-defined]
    top.__dict__.update(simple_evaluate=simple_evaluate, models=models, __version__="0.4")
    for module in (top, models, inner):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    world = World(WORLD)
    return Loaded(built(world), architecture(world), own_tokenizer=object())


def test_tasks_shots_and_template_are_passed_on_and_told(
    library: dict[str, Any], loaded: Loaded
) -> None:
    told = evaluate(ASKED, loaded.model, loaded)
    assert told == {
        "version": "0.4",
        "shots": 5,
        "limit": 10,
        "template": True,
        "tasks": {"wmdp_bio": 0.25, "mmlu": 0.5},
    }
    assert library["tasks"] == ["wmdp_bio", "mmlu"]
    assert (library["num_fewshot"], library["limit"]) == (5, 10)
    assert library["apply_chat_template"] is True
    assert library["model"].pretrained is loaded.model
    assert library["model"].tokenizer is loaded.own_tokenizer


def test_a_task_that_is_not_there(library: dict[str, Any], loaded: Loaded) -> None:
    with pytest.raises(InputError, match="unheard_of"):
        evaluate(Harness(tasks=("unheard_of",)), loaded.model, loaded)


def test_a_model_without_a_tokenizer(library: dict[str, Any], loaded: Loaded) -> None:
    for text in ("", '{"kind": "bytes"}'):
        with pytest.raises(InputError, match=r"redteam\.harness"):
            check(Loaded(loaded.model, loaded.architecture, tokenizer=text))


def test_without_the_library(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"hansa\[harness\]"):
        check(loaded)
