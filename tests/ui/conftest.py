import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hansa
from browser import opened
from hansa.report import report
from support import config


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened() as made:
        yield made


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three finished runs, one of them stopped before its end, and a pipeline under way."""
    folder = tmp_path_factory.mktemp("shelf")
    for name, method in (("one", "fedavg"), ("two", "fedselect")):
        made = config(folder, name=name, rounds=2, participation={}, method={"name": method})
        report([hansa.train(made)])
    third = hansa.train(config(folder, name="third", rounds=3, participation={}))
    (third.path / "summary.json").unlink()
    line = folder / "line-seed0"
    inner = config(line, name="train-12345678", rounds=1, method={"name": "fedavg"})
    report([hansa.train(inner)])
    about = {"kind": "train", "start": None, "key": "", "digest": None, "bundle": None}
    stages = [
        {**about, "name": "train", "state": "done", "folder": "train-12345678-seed0",
         "bundle": "train-12345678-seed0/bundle", "digest": "ab" * 32, "seconds": 1.5,
         "report": "train-12345678-seed0/report.html", "figures": {"accuracy": "50 %"}},
        {**about, "name": "own", "kind": "personalise", "state": "waiting", "folder": "",
         "start": "train", "report": None, "seconds": None, "figures": None},
    ]  # fmt: skip
    told = {"format": 1, "name": "line", "seed": 0, "stages": stages, "finished": False}
    (line / "pipeline.json").write_text(json.dumps(told))
    from hansa.report.pipeline import report as about_line

    about_line(line)
    return folder
