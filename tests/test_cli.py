"""The real command: what it prints, and how it ends."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from hansa import cli_parts
from hansa.auditing import load as load_audit
from hansa.cli import main
from hansa.compare import _grid
from hansa.safeguard_config import load as load_safeguard
from hansa.searching import load as load_search

HANSA = str(Path(sys.executable).with_name("hansa"))
EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = ["--set", "rounds=2", "--set", "training.epochs=1"]


def hansa(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [HANSA, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_train_prints_one_json_object_and_nothing_else(tmp_path) -> None:
    done = hansa("train", EXAMPLES / "digits-fedselect.toml", *QUICK, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["method"] == "fedselect"
    assert result["rounds"] == 2
    assert result["metrics"]["accuracy"].keys() == {"mean", "std", "worst_tenth"}
    assert result["bytes"].keys() == {"up", "down", "csr"}
    assert result["seconds"] > 0
    ledger = pq.read_table(tmp_path / result["run"] / "ledger.parquet")
    assert result["bytes"]["up"] == sum(ledger["up"].to_pylist())


def test_train_then_resume_then_report(tmp_path) -> None:
    first = hansa("train", EXAMPLES / "digits-fedavg.toml", *QUICK, cwd=tmp_path)
    assert first.returncode == 0
    assert "fedavg" in first.stdout
    run = tmp_path / "runs" / "digits-fedavg-seed0"
    resumed = hansa("train", "--resume", run, "--set", "rounds=3", "--json", cwd=tmp_path)
    assert json.loads(resumed.stdout)["rounds"] == 3
    page = hansa("report", run, "--json", cwd=tmp_path)
    assert json.loads(page.stdout) == {"report": str(run / "report.html")}
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_compare_prints_figures_and_tests_and_goes_on(tmp_path) -> None:
    arguments = ("compare", EXAMPLES / "digits-fedselect.toml", *QUICK, "--seeds", "0,1")
    methods = ("--methods", "local, fedselect", "--processes", "2")
    done = hansa(*arguments, *methods, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["methods"].keys() == {"local", "fedselect"}
    assert result["pairs"][0].keys() == {"first", "second", "difference", "wins", "losses", "p"}
    assert Path(tmp_path, result["report"]).read_text().startswith("<!doctype html>")
    again = hansa(*arguments, *methods, cwd=tmp_path)
    assert "- local" in again.stdout
    assert len(list((tmp_path / "runs" / "digits-fedselect").iterdir())) == 5
    wrong = hansa(*arguments[:-1], "0,x", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == ("hansa: --seeds: found '0,x'; allowed: whole numbers, such as 0,1,2\n")


def test_export_writes_a_bundle(tmp_path) -> None:
    hansa("train", EXAMPLES / "digits-fedselect.toml", *QUICK, cwd=tmp_path)
    run = Path("runs/digits-fedselect-seed0")
    done = hansa("export", run, "client-3", cwd=tmp_path)
    assert done.stdout == f"bundle: {run}/clients/client-3\n"
    assert (tmp_path / run / "clients" / "client-3" / "masks.safetensors").exists()
    wrong = hansa("export", run, "client-77", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("hansa: client: found 'client-77'; allowed: one of client-0")


def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(tmp_path) -> None:
    command = [HANSA, "train", EXAMPLES / "digits-local.toml", "--set", "rounds=10000"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    checkpoint = tmp_path / "runs" / "digits-local-seed0" / "checkpoint.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if checkpoint.exists() and json.loads(checkpoint.read_text())["round"] >= 1:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == (
        "hansa: stopped; the same command again, or train --resume RUN, goes on from here\n"
    )


def test_every_example_is_a_valid_configuration() -> None:
    for path in EXAMPLES.glob("*.toml"):
        if path.name.startswith("safeguard"):  # a stage with a configuration of its own
            assert load_safeguard(path).chain
            continue
        if path.name.startswith("audit"):
            assert load_audit(path).chosen
            continue
        if path.name.startswith("search"):
            assert load_search(path).chosen
            continue
        grid, _ = _grid(path, ["local"], [0], ())
        assert len(grid) == 1
    grid, _ = _grid(EXAMPLES / "digits-personalised.toml", [], [0, 1], ())
    assert len(grid) == 14


def _wrong_files(folder: Path) -> None:
    (folder / "ok.toml").write_text("rounds = 1\n[data]\nclients = 2\n")
    (folder / "broken.toml").write_text("rounds = = 1")
    (folder / "text.parquet").write_text("no parquet")
    (folder / "images" / "a").mkdir(parents=True)
    (folder / "images" / "b").mkdir()
    for name in [f"{label}/{k}.png" for label in "ab" for k in range(8)]:
        (folder / "images" / name).write_text("no image")
    image = [{"bytes": b"GIF", "path": None}] * 4
    table = pa.table({"image": image, "label": pa.array([0, 1, 7, 1])})
    pq.write_table(table, folder / "label.parquet")


CASES = {
    "no configuration": ([], "CONFIG: found nothing"),
    "missing file": (["none.toml"], "none.toml: found no such file"),
    "no TOML": (["broken.toml"], "broken.toml: found no TOML"),
    "unknown key": (["ok.toml", "--set", "data.client=3"], "data.client: found an unknown key"),
    "unknown option": (["ok.toml", "--sett", "a=b"], "No such option"),
    "negative rate": (["ok.toml", "--set", "training.lr=-0.1"], "training.lr: found -0.1; allowed"),
    "word for a number": (["ok.toml", "--set", "rounds=many"], "rounds: found 'many'; allowed"),
    "unknown method": (["ok.toml", "--set", "method.name=x"], "method.name: found 'x'; allowed"),
    "option of another method": (
        ["ok.toml", "--set", "method={name='fedavg', mu=1}"],
        "method.mu: found an unknown key; allowed: name, weighting",
    ),
    "unknown source": (["ok.toml", "--set", "data.source=mnist"], "data.source: found 'mnist'"),
    "missing data file": (
        ["ok.toml", "--set", "data.source=parquet:none.parquet"],
        "data.source: found no Parquet file at none.parquet",
    ),
    "data file of another kind": (
        ["ok.toml", "--set", "data.source=parquet:text.parquet"],
        "data.source text.parquet: found no Parquet",
    ),
    "image that is no image": (
        ["ok.toml", "--set", "data.source=folder:images"],
        "images/a/0.png: found something that is no image",
    ),
    "label outside the classes": (
        ["ok.toml", "--set", "data={source='parquet:label.parquet', classes=['x', 'y']}"],
        "row 2: found the label 7; allowed: a class: 0 to 1",
    ),
    "more clients than samples": (
        ["ok.toml", "--set", "data.clients=2000"],
        "data.clients: found 2000; allowed: at most the 1797 samples",
    ),
    "more classes than there are": (
        ["ok.toml", "--set", "data.partition={kind='shards', classes=11}"],
        "data.partition.classes: found 11; allowed: 1 to 10",
    ),
    "loss that is no number": (
        ["ok.toml", "--set", "training={lr=1e30, epochs=2}"],
        "training.lr: found 1e+30, with which the loss is nan in round 1 at client-0",
    ),
    "unknown engine": (
        ["ok.toml", "--set", "engine.kind=fast"],
        "'sequential', 'stacked', 'compiled' or 'flower'",
    ),
    "device that is not there": (
        ["ok.toml", "--set", "engine.device=cuda:99"],
        "engine.device: found 'cuda:99', where PyTorch sees",
    ),
    "unknown model": (["ok.toml", "--set", "model.name=vgg"], "model.name: found 'vgg'"),
    "option of another model": (
        ["ok.toml", "--set", "model.options.depth=3"],
        "model.options.depth: found an unknown option; allowed: hidden",
    ),
    "bundle that is none": (
        ["ok.toml", "--set", "model.bundle=images"],
        "images/card.json: found no such file",
    ),
    "run that is none": (["--resume", "images"], "images: found no run"),
    "truth for a number": (["ok.toml", "--set", "rounds=true"], "rounds: found True; allowed"),
    "list for a name": (["ok.toml", "--set", "method.name=[1]"], "method.name: found [1]; allowed"),
    "number too large": (
        ["ok.toml", "--set", "training.batch_size=99999999999999999999999"],
        "training.batch_size: found 99999999999999999999999; allowed: less than 2147483648",
    ),
    "null character": (["ok.toml", "--set", 'output="a\\u0000b"'], "output: found 'a\\x00b'"),
    "empty layers": (
        ["ok.toml", "--set", "model={name='cnn', options={channels=[4, 0]}}"],
        "model.",
    ),
    "name too long for a file": (
        ["ok.toml", "--set", f"data.source='parquet:{'x' * 300}'"],
        "File name too long",
    ),
    "output that is a file": (
        ["ok.toml", "--set", "output=ok.toml"],
        "output: found ok.toml (Not a directory)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_ends_in_status_2_and_one_line(
    tmp_path, case: str, monkeypatch, capsys
) -> None:
    """In this process, which has imported everything: a command of its own takes seconds."""
    _wrong_files(tmp_path)
    arguments, message = CASES[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hansa", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert err.startswith("hansa: ")
    assert message in err
    assert err.count("\n") == 1
    assert (ended.value.code, out) == (2, "")


def test_the_real_command_ends_so_as_well(tmp_path) -> None:
    _wrong_files(tmp_path)
    arguments, message = CASES["unknown key"]
    done = hansa("train", *arguments, cwd=tmp_path)
    assert message in done.stderr
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_reporting_into_a_folder_ends_in_status_2(tmp_path) -> None:
    hansa("train", EXAMPLES / "digits-local.toml", "--set", "rounds=1", cwd=tmp_path)
    done = hansa("report", "runs/digits-local-seed0", "--out", ".", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "hansa: --out: found '.', a folder; allowed: a file to write\n",
    )


def test_reporting_a_run_that_is_none_ends_in_status_2(tmp_path) -> None:
    done = hansa("report", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"hansa: {tmp_path}: found no run; allowed: the folder of a run, with its config.toml\n"
    )


def test_progress_is_shown_before_its_length_is_known(monkeypatch) -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=80)
    monkeypatch.setattr(cli_parts, "Console", lambda stderr: terminal)
    with cli_parts.progress("attack") as lines:
        task = lines.add_task("attacking", total=None, note="")
        lines.refresh()
        lines.update(task, completed=1, total=3, note="full")
    assert "attack 0/?" in shown.getvalue()
    assert "attack 1/3" in shown.getvalue()
