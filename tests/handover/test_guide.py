"""The commands of the guide run, and what it tells of the card is what there is."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from hansa.bundle import read_bundle
from hansa.cli import main

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "bundles.md").read_text()
TRACKING = (ROOT / "docs" / "configuration.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def do(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in block.splitlines():
        monkeypatch.setattr("sys.argv", shlex.split(command))
        with pytest.raises(SystemExit) as caught:
            main()
        assert not caught.value.code, command


@pytest.mark.slow(60)
@pytest.mark.filterwarnings("ignore")  # what transformers, ONNX and MLflow warn of is theirs
def test_the_commands_of_the_guides_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    verify_and_show, export = blocks(GUIDE, "bash")
    do(verify_and_show, monkeypatch)
    assert "runs/digits-fedavg-seed0/bundle" in capsys.readouterr().out
    do(export, monkeypatch)
    (code,) = blocks(GUIDE, "python")
    exec(code, {})  # noqa: S102
    assert "torch.Size([1, 4, 256])" in capsys.readouterr().out
    card = read_bundle("runs/worldlm-seed0/bundle").card
    keys = set(re.findall(r"`([a-z]+)`", "".join(re.findall(r"^\| (`.*?`) \|", GUIDE, re.M))))
    assert set(card) - {"format"} <= keys
    assert (tmp_path / "runs" / "pruned" / "bundle" / "card.json").exists()

    (command,) = [block for block in blocks(TRACKING, "bash") if "tracking" in block]
    do(command, monkeypatch)
    assert (tmp_path / "runs" / "digits-fedavg-seed0-2" / "tensorboard").is_dir()
    assert (tmp_path / "runs" / "mlruns" / "mlflow.db").is_file()
