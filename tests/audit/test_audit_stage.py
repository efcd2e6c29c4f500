"""The stage: calibration, verdicts, gate, reports, resuming, secrets, wrong input."""

import json
import logging
import threading
import xml.etree.ElementTree as ET
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from hansa.audit.domains import domain
from hansa.audit.manipulate import Arm
from hansa.audit.recording import Recorder
from hansa.audit.redact import HIDDEN, Redactor, is_secret_name
from hansa.auditing import audit, load
from hansa.cli import main
from hansa.errors import InputError

SECRET = "planted-Sesame/42+open"  # noqa: S105 (planted)
DEFENCES = ["none", "delimiting", "schema", "cross-field", "allow-list", "history"]


def config(tmp_path, **more):
    values = {
        "name": "small",
        "output": str(tmp_path),
        "cases": 12,
        "strengths": [1.0],
        "defences": DEFENCES,
        "target": {"kind": "trusting"},
    }
    return values | more


@pytest.fixture(scope="module")
def trusting(tmp_path_factory):
    return audit(config(tmp_path_factory.mktemp("audit"), cases=24))


class Model(BaseHTTPRequestHandler):
    """A loopback endpoint that repeats the temperature it reads, until it is told to die."""

    dies_after = 10**9
    asked = 0
    seen: ClassVar[list[dict]] = []
    reply = None

    def do_POST(self):
        kind = type(self)
        kind.asked += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind.seen.append({"body": body, "key": self.headers["Authorization"], "path": self.path})
        if kind.asked > kind.dies_after:
            self.send_response(500)
            self.end_headers()
            self.wfile.write(f"no more for {self.headers['Authorization']}".encode())
            return
        text = body["messages"][1]["content"]
        response = json.loads(text.partition("Response: ")[2].rpartition("\nAnswer:")[0])
        told = kind.reply or str(response.get("current", {}).get("temp_c", "not given"))
        told = self.words(told)
        data = json.dumps({"choices": [{"message": {"content": told}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def words(self, told):
        return told

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    kind = type("Own", (Model,), {"asked": 0, "seen": [], "dies_after": 10**9})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AUDIT_TEST_KEY", SECRET)
    monkeypatch.setattr("hansa.audit.targets._WAITS", ())
    yield f"http://127.0.0.1:{server.server_port}/v1", kind
    server.shutdown()
    server.server_close()


def temperatures(tmp_path, num=36):
    """Write temperatures of the weather's cases as a user's own recorded traffic."""
    path = tmp_path / "mine.jsonl"
    recorder = Recorder(path)
    for k in range(num):
        document = {"current": {"temp_c": 10.0 + k / 2, "humidity": 50}}
        request = {"method": "GET", "url": f"https://api.example/now?q={k}&key={SECRET}"}
        headers = {"Authorization": f"Bearer {SECRET}"}
        body = json.dumps(document).encode()
        recorder.record(
            f"How warm is it at {k}?", request, body, ["current.temp_c"], unit="c", headers=headers
        )
    return path


def of_endpoint(tmp_path, url, **more):
    target = {"kind": "endpoint", "url": url, "model": "m", "key_variable": "AUDIT_TEST_KEY"}
    domains = [f"recorded:{temperatures(tmp_path)}"]
    arms = [{"operator": "substitution"}, {"operator": "deletion"}]
    values = {"target": target, "domains": domains, "arms": arms, "cases": 0}
    return config(tmp_path, defences=["none", "schema"], **(values | more))


def test_calibration_readers_score_what_they_must(trusting) -> None:
    known = trusting.summary["calibration"]
    assert known["holds"]
    assert known["trusting"]["adopted"] == 1.0
    assert known["verifying"]["adopted"] == 0.0
    assert known["constant"]["changed"] == 0.0
    assert trusting.summary["noise_floor"] == 0.0
    assert trusting.summary["clean_accuracy"] == 1.0
    assert trusting.summary["verdict"] == "informative"
    arms = trusting.summary["defences"]["none"]["arms"]
    assert arms["substitution 0.25"]["adopted"] == 1.0
    assert arms["deletion"]["rate"] == 1.0
    assert arms["substitution unit"]["valid"] == 18
    assert all(row["valid"] == 72 for name, row in arms.items() if "unit" not in name)


def test_a_schema_in_the_stage(trusting) -> None:
    row = trusting.summary["defences"]["schema"]
    weather = row["by_domain"]["weather"]
    assert weather["deletion"]["blocked"] == 1.0
    assert weather["deletion"]["rate"] == 0.0
    assert weather["insertion 0.25"]["blocked"] == 1.0
    assert weather["substitution 0.25"]["adopted"] == 1.0
    # Text has no schema: that a piece of it is gone, no schema sees.
    assert row["by_domain"]["news"]["deletion"]["blocked"] == 0.0
    assert row["false_blocks"] == 0.0
    assert row["utility"] == 1.0
    assert trusting.summary["defences"]["history"]["false_blocks"] > 0


def test_reports_show_both_arms_utility_false_blocks_and_what_signatures_cannot_do(
    trusting,
) -> None:
    page = (trusting.path / "report.html").read_text()
    text = (trusting.path / "report.md").read_text()
    for told in (page, text):
        for words in (
            "utility without attack",
            "false blocks",
            "Without a defence",
            "provider",
            "Blocked",
        ):
            assert words in told
        assert "does not stop a provider that lies" in told
        for name in DEFENCES:
            assert name in told
    assert "<svg" in page
    suites = ET.fromstring((trusting.path / "report.xml").read_text())  # noqa: S314
    assert [suite.get("name") for suite in suites] == DEFENCES
    assert not suites.findall(".//failure")


def test_a_run_in_which_nothing_lands_is_not_informative(tmp_path, endpoint) -> None:
    url, kind = endpoint
    made = audit(of_endpoint(tmp_path, url, arms=[{"operator": "insertion"}]))
    assert made.summary["verdict"] == "not informative"
    assert "not informative" in (made.path / "report.html").read_text()
    assert kind.asked == 4 * 36  # of the schema's insertions none reaches the model


def test_what_a_sampled_model_changes_by_itself_is_taken_off(tmp_path, endpoint) -> None:
    url, kind = endpoint

    def reply(self, told: str) -> str:
        return f"{told} degrees" if kind.asked % 5 else told  # in other words, now and then

    kind.words = reply
    made = audit(of_endpoint(tmp_path, url, strengths=[]))
    row = made.summary["defences"]["none"]["arms"]["substitution 0.25"]
    floor = made.summary["noise_floor"]
    assert 0 < floor < 1
    assert row["changed"] == 1.0
    assert row["changed_above_floor"] == pytest.approx(1 - floor)
    assert made.summary["defences"]["schema"]["arms"]["deletion"]["mcnemar_p"] == 1.0


def test_a_weak_target_is_not_concluded_about(tmp_path) -> None:
    values = config(tmp_path, defences=["none"], strengths=[])
    made = audit({**values, "target": {"kind": "constant"}}, max_adopted=1.0)
    assert made.summary["verdict"] == "no conclusion"
    assert made.summary["defences"]["none"]["arms"]["deletion"]["rate"] is None
    assert "undefined" in (made.path / "report.md").read_text()
    assert not made.passed
    assert "<error" in (made.path / "report.xml").read_text()
    few = audit({**values, "name": "few", "cases": 2})
    assert few.summary["verdict"] == "no conclusion"
    assert "valid cases" in few.summary["why"]


def test_the_gate_by_a_limit_and_by_a_baseline(tmp_path) -> None:
    values = config(tmp_path, cases=36, domains=["weather"], defences=["schema"], strengths=[])
    open_ = audit(values, max_adopted=1.0)
    assert open_.passed
    closed = audit(values, max_adopted=0.05)
    assert not closed.passed
    rows = {row["arm"]: row for row in closed.summary["gate"]["arms"]}
    assert rows["substitution 0.25"]["exceeded"]
    assert not rows["insertion 0.25"]["exceeded"]
    assert "(provider)" not in " ".join(rows)
    assert "<failure" in (closed.path / "report.xml").read_text()
    (tmp_path / "before.json").write_text(json.dumps(closed.summary))
    assert audit(values, max_adopted=0.05, baseline=tmp_path / "before.json").passed


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["hansa", "audit", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_the_command_and_its_exit_status(tmp_path, monkeypatch, capsys) -> None:
    text = "\n".join(
        (
            'name = "ci"',
            "cases = 12",
            'defences = ["schema"]',
            "strengths = []",
            "[target]",
            'kind = "trusting"',
        )
    )
    (tmp_path / "audit.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "audit.toml", "--json", "--max-adopted", "0.05") == 3
    told = capsys.readouterr()
    assert "the gate is closed" in told.err
    assert json.loads(told.out)["gate"]["passed"] is False
    assert run(monkeypatch, "run", "audit.toml", "--max-adopted", "1.0") == 0
    assert "report: " in capsys.readouterr().out
    assert run(monkeypatch, "audit.toml", "--set", "target.kind=oracle") == 2
    assert "target.kind" in capsys.readouterr().err


def test_a_kept_audit_asks_what_is_new_and_nothing_else(tmp_path, endpoint) -> None:
    url, kind = endpoint
    values = of_endpoint(tmp_path, url)
    first = audit(values)
    assert kind.asked == 36 * (4 + 2)  # a schema lets the substitution through, not the deletion
    assert {each["key"] for each in kind.seen} == {f"Bearer {SECRET}"}
    assert {each["path"] for each in kind.seen} == {"/v1/chat/completions"}
    kind.asked = 0
    again = audit(values)
    assert kind.asked == 0
    assert again.summary == first.summary
    audit({**values, "arms": [*values["arms"], {"operator": "substitution", "strength": 1.0}]})
    assert kind.asked == 36 + 36 - sum(
        row["blocked"] for row in rows_of(first.path) if row["arm"] == "substitution 1"
    )


def rows_of(path):
    return [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]


def test_an_endpoint_that_dies_costs_nothing_that_was_measured(tmp_path, endpoint) -> None:
    url, kind = endpoint
    kind.dies_after = 50
    values = of_endpoint(tmp_path, url)
    with pytest.raises(InputError, match=r"target\.url.*status 500.*are kept") as caught:
        audit(values)
    assert SECRET not in str(caught.value)
    kept = [row for row in rows_of(tmp_path / "small") if row["target"].startswith("m at")]
    assert len(kept) == 50
    with (tmp_path / "small" / "results.jsonl").open("a") as file:
        file.write('{"torn": ')  # as a kill leaves it
    kind.dies_after, kind.asked = 10**9, 0
    made = audit(values)
    assert made.summary["verdict"] == "informative"
    assert kind.asked == 36 * 6 - 50


def test_an_endpoint_that_is_down_or_answers_nothing(tmp_path, endpoint) -> None:
    url, kind = endpoint
    kind.reply = " "
    with pytest.raises(InputError, match=r"empty answers, kept in .*another --out"):
        audit(of_endpoint(tmp_path, url))
    (tmp_path / "down").mkdir()
    down = of_endpoint(tmp_path / "down", "http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match=r"target\.url: found no answer"):
        audit(down)


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",
    ],
)
def test_an_endpoint_that_breaks_off_or_speaks_otherwise(tmp_path, endpoint, said) -> None:
    url, kind = endpoint

    def do_post(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.wfile.write(said)
        self.close_connection = True

    kind.do_POST = do_post
    with pytest.raises(InputError, match=r"^target\.url: found .* are kept") as caught:
        audit(of_endpoint(tmp_path, url))
    assert str(caught.value).count("target.url") == 1


def test_secrets_reach_no_log_and_no_file(tmp_path, endpoint, monkeypatch, caplog) -> None:
    url, kind = endpoint
    monkeypatch.setenv("OTHER_SERVICE_TOKEN", "hush-hush-0815")
    values = of_endpoint(tmp_path, url + f"?key={SECRET}")
    values["target"]["headers"] = {"X-Api-Key": "header-secret-77"}
    kind.reply = f"12.5, by {SECRET} and hush-hush-0815 and header-secret-77"
    with caplog.at_level(logging.DEBUG, "hansa"):
        logging.getLogger("hansa").warning("before %s", "nothing")
        audit(values)
    for path in [*(tmp_path / "small").rglob("*"), tmp_path / "mine.jsonl"]:
        if path.is_file():
            told = path.read_text(errors="replace")
            for secret in (SECRET, "hush-hush-0815", "header-secret-77", "planted-Sesame%2F42"):
                assert secret not in told, path
    assert SECRET not in caplog.text
    assert any(HIDDEN in row["answer"] for row in rows_of(tmp_path / "small"))


def test_what_is_a_secret() -> None:
    for name in ("API_KEY", "openaiApiKey", "Authorization", "x-api-key", "GITHUB_TOKEN", "appid"):
        assert is_secret_name(name), name
    for name in ("keyboard", "PATH", "author", "monkey", "Content-Type", "signal"):
        assert not is_secret_name(name), name
    redactor = Redactor(["hunter2hunter2"], environment={"PGPASSWORD_FILE": "/etc/pw"})
    redactor.learn_url("https://me:letmein99@host/?token=abcdef123&q=x")
    text = "hunter2hunter2 https://you:pw@h/?api_key=zzz&q=1 Bearer abcdefgh letmein99 abcdef123"
    clean = redactor.text(text)
    for secret in ("hunter2", "pw@", "zzz", "abcdefgh", "letmein99", "abcdef123"):
        assert secret not in clean
    assert "q=1" in clean
    assert redactor.values({"password": "x", "n": [1, "hunter2hunter2"]}) == {
        "password": HIDDEN,
        "n": [1, HIDDEN],
    }


def test_recorded_traffic_is_replayed(tmp_path) -> None:
    path = temperatures(tmp_path, 3)
    cases = domain(f"recorded:{path}").cases
    assert [case.truth.value for case in cases] == [10.0, 10.5, 11.0]
    assert SECRET not in path.read_text()
    recorder = Recorder(tmp_path / "texts.jsonl")
    body = b'{"text": "Ada Lovelace was born in London on 10 December 1815."}'
    case = recorder.record("When?", {}, body, ["text"], label="DATE")
    assert case.truth.value == "10 December 1815"
    assert case.fields[0].prose
    with pytest.raises(InputError, match="no ORG"):
        recorder.record("Who?", {}, body, ["text"], label="ORG")
    with pytest.raises(InputError, match="no JSON"):
        recorder.record("Who?", {}, b"{", ["text"])
    with pytest.raises(InputError, match="unknown path"):
        recorder.record("Who?", {}, body, ["txet"])
    skies = Recorder(tmp_path / "skies.jsonl")
    for sky in ("clear", "rain"):
        skies.record("How is the sky?", {}, json.dumps([{"sky": sky}]).encode(), ["[0].sky"])
    service = domain(f"recorded:{skies.path}")
    assert service.tamper(service.cases[0], Arm("substitution")).false.value == "rain"
    assert service.tamper(service.cases[0], Arm("deletion")).document == [{}]
    assert service.tamper(service.cases[0], Arm("insertion")) is None  # a list has no room for it
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"bad\.jsonl:1\.question"):
        domain(f"recorded:{tmp_path / 'bad.jsonl'}")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"domains": ["sport"]}, "sport"),
        ({"defences": ["magic"]}, "defences"),
        ({"defences": ["none+schema"]}, "defences"),
        ({"strengths": [2.0]}, "plausible"),
        ({"target": {"kind": "endpoint"}}, "url and model"),
        ({"target": {"kind": "endpoint", "url": "ftp://x", "model": "m"}}, r"target\.url"),
        ({"target": {"kind": "endpoint", "url": "http://[::1", "model": "m"}}, r"target\.url"),
        ({"target": {"kind": "endpoint", "url": "http://a:b/v1", "model": "m"}}, r"target\.url"),
        ({"target": {"kind": "endpoint", "url": "http://a:b@c", "model": "m"}}, "with a user"),
        ({"target": {"kind": "bundle", "path": "nowhere"}}, "nowhere"),
        ({"target": {"kind": "transformers", "path": "nowhere"}}, r"target\.path"),
        ({"target": {"kind": "reader", "path": "nowhere"}}, r"target\.path"),
        ({"gate": {"defence": "signature"}}, r"gate\.defence"),
        ({"nmae": "x"}, "did you mean name"),
        ({"arms": [{"operator": "shout"}]}, "operator"),
        ({"domains": ["weather", "weather"]}, "each once"),
    ],
)
def test_wrong_configurations_are_refused(tmp_path, change, match) -> None:
    with pytest.raises(InputError, match=match):
        audit(config(tmp_path, **change))


def test_other_wrong_input(tmp_path, monkeypatch) -> None:
    values = config(tmp_path)
    with pytest.raises(InputError, match="--max-adopted"):
        audit(values, max_adopted=5)
    with pytest.raises(InputError, match="--baseline"):
        audit(values, baseline=tmp_path / "none.json")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(InputError, match="an earlier audit"):
        audit(values, baseline=tmp_path / "other.json")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.txt"):
        audit(values, out=tmp_path / "busy")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    target = {"kind": "endpoint", "url": "http://127.0.0.1:9", "model": "m"}
    with pytest.raises(InputError, match="NO_SUCH_KEY, not set"):
        audit(config(tmp_path, target={**target, "key_variable": "NO_SUCH_KEY"}))
    assert load(values).chosen[0].name == "insertion 0.25"
