import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hansa import demo
from hansa.cli import app
from hansa.pipeline import plan
from scenes import SMALLEST


@pytest.mark.slow(40)
@pytest.mark.filterwarnings("ignore")  # of tiny runs: NaN in means of one
def test_the_demo_runs_the_shipped_pipelines_and_leaves_out_what_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SMALLER", {"edge": SMALLEST, "language": ()})
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name)
    )
    done = CliRunner().invoke(app, ["demo", "--json"])
    assert done.exit_code == 0, done.output
    (made,) = json.loads(done.stdout.splitlines()[-1])["pipelines"]
    assert made["path"] == "runs/edge-demo-seed0"
    assert {stage["state"] for stage in made["stages"]} == {"done"}
    assert Path(made["report"]).is_file()
    assert "pip install 'hansa[language]'" in caplog.text


def test_what_the_demo_overrides_is_there_to_be_overridden() -> None:
    for name, smaller in demo.SMALLER.items():
        assert plan(name, overrides=smaller)
