import json
from pathlib import Path
from typing import Any

import pytest

from hansa.errors import InputError
from hansa.pipeline import pipeline, profiling
from hansa.search.tables import open_table

NAMED = {"device": "mine", "batches": [1], "rounds": 40, "models": 2, "force": True}


def line(latency: float, **profile: Any) -> dict[str, Any]:
    search = {"budget": 4, "repeats": 0, "train": False, "limits": {"latency": latency}}
    return {
        "stages": [
            {"kind": "profile", "config": {**NAMED, **profile}},
            {"kind": "search", "config": search},
        ]
    }


def refuse(*_: Any, **__: Any) -> None:
    raise InputError("profile", "latencies that do not repeat", "an idle machine")


def test_a_search_keeps_to_latencies_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = pipeline(line(1e6, max_drift=1e6, min_agreement=-1))
    table = open_table(made.path / made.stages[0].folder / "table.parquet")
    mine = {row["model"] for row in table.profiles if row["device"] == "mine"}
    costs = table.column("multiply_adds")
    least, most = costs.argmin(), costs.argmax()
    assert mine == {int(table.models[least]), int(table.models[most])}, "both ends of the costs"
    found = json.loads((made.path / made.stages[1].folder / "search.json").read_text())
    assert found["candidates"] == 2
    assert found["limits"]["device"] == "mine"
    with pytest.raises(InputError, match=r"stages.search.limits.latency: found 1e-06 ms"):
        pipeline(line(1e-6, max_drift=1e6, min_agreement=-1))


def test_latencies_that_do_not_repeat_stop_it_or_leave_those_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiling, "profile_table", refuse)
    with pytest.raises(InputError, match=r"stages.profile.profile: found latencies that do not"):
        pipeline(line(3.0))
    made = pipeline(line(3.0, on_refusal="table"))
    assert "stand in" in caplog.text
    theirs = open_table().profiles[0]["device"]
    assert made.stages[0].figures["device"] == theirs  # type: ignore[index]
    found = json.loads((made.path / made.stages[1].folder / "search.json").read_text())
    assert found["limits"]["device"] == theirs
    fitting = 1000 * open_table().latencies(theirs, 1) <= 3.0
    assert found["candidates"] == fitting.sum()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"models": -1}, "models: found -1"),
        ({"on_refusal": "go"}, "on_refusal: found 'go'; allowed: stop or table"),
        ({"rounds": 3}, "rounds: found 3"),
    ],
)
def test_wrong_options_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        profiling.ProfileStage.of(wrong)
