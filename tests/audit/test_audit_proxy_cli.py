"""``hansa audit proxy`` as it is called: what it prints, how it ends, what it refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from proxying import BODY, FALSE, ask, service

from hansa.cli import main

ROOT = Path(__file__).parents[2]
PLAN = """seed = 3
[[tamper]]
action = "shift"
path = "current.temp_c"
by = 7
unit = "c"
follow = { "current.temp_f" = "f" }
route = "/v1/*"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("plan.toml").write_text(PLAN)
    Path("sample.json").write_bytes(BODY)
    return tmp_path


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, None])
def test_it_serves_until_it_is_ended(folder, end) -> None:
    command = [sys.executable, "-m", "hansa.cli", "audit", "proxy", "plan.toml"]
    command += [
        "--port",
        "0",
        "--sample",
        "sample.json",
        "--minutes",
        "0.02" if end is None else "9",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with service() as upstream:
        command += ["--upstream", f"http://127.0.0.1:{upstream.port}", "--json"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            told = json.loads(process.stdout.readline())
            port = int(told["url"].rpartition(":")[2])
            if end is not None:
                assert ask(port, "/v1/plain")[2] == FALSE
                assert ask(port, "/v2/plain")[2] == BODY
                assert ask(port, "/v1/other")[0] == 200
                process.send_signal(end)
            out, err = process.communicate(timeout=60)
    ended = json.loads(out)
    assert process.returncode == 0
    counts = [ended[key] for key in ("edited", "passed", "refused", "failed", "other")]
    if end is None:
        assert (ended["ended"], counts, err) == ("time", [0, 0, 0, 0, 0], "")
        return
    assert (ended["ended"], counts) == ("signal", [1, 1, 0, 0, 1])
    assert err == "hansa: passed without an edit: unknown path 'current.temp_c'\n"
    lines = Path(ended["log"]).read_text().splitlines()
    assert [json.loads(line)["result"] for line in lines] == ["edited", "passed"]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["none.toml"], "none.toml: found unreadable"),
        (["plan.toml", "--upstream", "https://api.example.com"], "which is not listed"),
        (["plan.toml", "--host", "0.0.0.0"], "--off-loopback"),  # noqa: S104
        (["plan.toml", "--port", "TAKEN"], "in use"),
        (["plan.toml", "--port", "99999"], "0 (any) to 65535"),
        (["plan.toml", "--sample", "other.json"], "unknown path 'current.temp_c'"),
        (["plan.toml", "--sample", "plan.toml"], "no JSON"),
        (["plan.toml", "--sample", "none.json"], "none.json"),
        (["plan.toml", "--minutes", "0"], "--minutes"),
        (["plan.toml", "--over", "cut"], "pass, refuse"),
        (["plan.toml", "--log", "none/log.jsonl"], "none/log.jsonl"),
        (["plan.toml", "--ca", "plan.toml"], "certificates in PEM"),
        (["plan.toml", "--upstream", "http://localhost:TAKEN", "--port", "TAKEN"], "in use"),
    ],
)
def test_wrong_input_is_one_line(folder, monkeypatch, capsys, arguments, found) -> None:
    Path("other.json").write_text('{"current": {"temp": 1}}')
    with service() as upstream:
        given = [each.replace("TAKEN", str(upstream.port)) for each in arguments]
        if "--upstream" not in given:
            given += ["--upstream", f"http://127.0.0.1:{upstream.port}"]
        monkeypatch.setattr("sys.argv", ["hansa", "audit", "proxy", "--port", "0", *given])
        with pytest.raises(SystemExit) as ended:
            main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1
    assert error.startswith("hansa: ")
    assert found in error
