"""The audit as a task of Inspect, offline against a loopback endpoint."""

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hansa.audit.domains import domain
from hansa.audit.manipulate import Arm
from hansa.audit.paths import exists, look
from hansa.audit.tamper import encoded

ROOT = Path(__file__).parents[2]
TASK = f"{ROOT / 'src' / 'hansa' / 'audit' / 'inspect_task.py'}@audit"
CASES = domain("weather").cases[:10]
ZEROS = dict.fromkeys(("correct", "adopted", "lost", "abstained", "flagged"), 0.0)
needs_inspect = pytest.mark.skipif(
    importlib.util.find_spec("inspect_ai") is None,
    reason="Inspect is not installed: pip install hansa[inspect], in an environment of its own",
)


class Trusting(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that calls the tool, then repeats what it says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        asked = json.loads(self.rfile.read(length))
        last = asked["messages"][-1]
        message = {"role": "assistant", "content": ""}
        if last["role"] == "tool":
            user = next(m for m in asked["messages"] if m["role"] == "user")
            message["content"] = answer(user["content"], last["content"])
        else:
            call = {"name": asked["tools"][0]["function"]["name"], "arguments": '{"query": "now"}'}
            message["tool_calls"] = [{"id": "call_1", "type": "function", "function": call}]
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        about = {"id": "1", "object": "chat.completion", "created": 1, "model": "reader"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        body = json.dumps({**about, "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def answer(question: str, response: str) -> str:
    """Return what the response's field says, preferring an inserted correction."""
    if isinstance(question, list):
        question = question[0]["text"]
    if not response.startswith("{"):
        return response
    (case,) = [case for case in CASES if case.question == question]
    path = case.fields[0].path
    document = json.loads(response)
    for place in (("correction", path[-1]), path):
        if exists(document, place):
            return str(look(document, place))
    return "not given"


@contextlib.contextmanager
def endpoint():
    with ThreadingHTTPServer(("127.0.0.1", 0), Trusting) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def inspect(folder: Path, url: str, *command: str) -> list[dict]:
    """Run a command of Inspect's environment, and return the logs that it wrote, in order."""
    kept = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment = {**kept, "TOY_BASE_URL": url, "TOY_API_KEY": "planted-secret-7"}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "INSPECT_LOG_FORMAT": "json"}
    environment |= {"INSPECT_LOG_DIR": str(folder / "logs"), "INSPECT_DISPLAY": "none"}
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    texts = [path.read_text() for path in sorted((folder / "logs").rglob("*.json"))]
    assert not any("planted-secret-7" in text for text in texts)
    return [json.loads(text) for text in texts]


def scores(log: dict) -> dict[str, float]:
    return {each["name"]: each["metrics"]["mean"]["value"] for each in log["results"]["scores"]}


@needs_inspect
def test_inspect_runs_offline_and_its_log_holds_what_was_done(tmp_path) -> None:
    model = ("--model", "openai-api/toy/reader")
    with endpoint() as url:
        (substitution,) = inspect(
            tmp_path, url, "-m", "inspect_ai", "eval", TASK, *model, "-Tcases=10", "-Tseed=5"
        )
    assert substitution["status"] == "success"
    assert scores(substitution) == {**ZEROS, "adopted": 1.0, "lost": 1.0}
    for sample, case in zip(substitution["samples"], CASES, strict=True):
        made = domain("weather").tamper(case, Arm("substitution"), 5)
        (entry,) = sample["scores"]["adoption"]["metadata"]["tampering"]
        events = [e["data"] for e in sample["events"] if e["event"] == "info"]
        assert events == [entry]
        assert entry["before"] == hashlib.sha256(encoded(case.document)).hexdigest()
        assert entry["after"] == hashlib.sha256(encoded(made.document)).hexdigest()
        assert entry["seed"] == 5
        assert {each["operator"] for each in entry["edits"]} == {"substitution"}
        assert len(entry["edits"]) == len(made.edits)
        (said,) = [m["content"] for m in sample["messages"] if m["role"] == "tool"]
        assert json.loads(said) == made.document


@needs_inspect
def test_other_arms_a_defence_and_a_plan(tmp_path) -> None:
    rule = '[[tamper]]\naction = "set"\npath = "current.temp_c"\nvalue = 99\nroute = "service"\n'
    (tmp_path / "plan.toml").write_text("seed = 8\n" + rule)
    code = (
        "from inspect_ai import eval\n"
        "from hansa.audit.inspect_task import audit\n"
        "for number, given in enumerate(({'operator': 'none'}, {'plan': 'plan.toml'},\n"
        "                                {'operator': 'deletion', 'defence': 'schema'})):\n"
        "    eval(audit(cases=10, **given), model='openai-api/toy/reader',\n"
        "         log_format='json', log_dir=f'logs/{number}')\n"
    )
    with endpoint() as url:
        none, plan, schema = inspect(tmp_path, url, "-c", code)
    assert scores(none) == {**ZEROS, "correct": 1.0}
    assert scores(schema) == {**ZEROS, "lost": 1.0, "abstained": 1.0}
    for sample, case in zip(plan["samples"], CASES, strict=True):
        (entry,) = sample["scores"]["adoption"]["metadata"]["tampering"]
        assert entry["edits"] == [{"operator": "substitution", "path": "current.temp_c"}]
        assert (entry["seed"], entry["false"]["value"]) == (8, 99)
        is_asked = case.fields[0].path == ("current", "temp_c")
        assert sample["scores"]["adoption"]["value"]["adopted"] == float(is_asked)


def test_the_core_needs_neither_inspect_nor_pytorch() -> None:
    code = (
        "import sys\n"
        "for name in ('inspect_ai', 'torch', 'scipy', 'starlette', 'httpx'):\n"
        "    sys.modules[name] = None\n"
        "import hansa.audit.plan, hansa.audit.application, hansa.audit.inplace\n"
        "import hansa.audit.coding, hansa.audit.proxy_log, hansa.audit.proxy_options\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
