import fcntl
import http.client
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from hansa.errors import InputError
from hansa.runs import is_locked, locked
from hansa.ui import Server
from hansa.ui.shelf import Shelf
from hansa.ui.views import Views
from serving import serving


@pytest.fixture(scope="module")
def server(shelf: Path) -> Iterator[Server]:
    with serving(shelf) as made:
        yield made


def ask(
    server: Server, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_it_listens_on_the_loopback_address_alone(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"


OTHERS = ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost@evil.example"]
OTHERS += ["127.0.0.1:80:80", "127.0.0.1:x", "", "0.0.0.0"]  # noqa: S104


@pytest.mark.parametrize("host", OTHERS)
@pytest.mark.parametrize("path", ["/", "/api/runs", "/report/one-seed0/report.html"])
def test_a_request_by_another_name_gets_nothing(server: Server, host: str, path: str) -> None:
    status, _, body = ask(server, path, Host=host)
    assert status == 421
    assert body == "not this host\n"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9"])
def test_a_tunnel_s_port_may_differ(server: Server, host: str) -> None:
    assert ask(server, "/api/runs", Host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_written(server: Server, method: str) -> None:
    status, headers, _ = ask(server, "/api/runs", method)
    assert status == 405
    assert headers["Allow"] == "GET, HEAD"


def test_head_is_get_without_its_body(server: Server) -> None:
    _, whole, body = ask(server, "/api/runs")
    status, headers, nothing = ask(server, "/api/runs", "HEAD")
    assert (status, nothing) == (200, "")
    assert int(headers["Content-Length"]) == len(body.encode()) == int(whole["Content-Length"])


def test_what_has_not_changed_is_not_sent_again(server: Server) -> None:
    tag = ask(server, "/api/runs")[1]["ETag"]
    assert ask(server, "/api/runs", If_None_Match=tag)[0] == 304
    assert ask(server, "/api/runs", If_None_Match='"other"')[0] == 200


PATHS = [
    "../secret/report.html", "%2e%2e/secret/report.html", "one-seed0/../../secret/report.html",
    "/etc/passwd", "//etc/passwd", "one-seed0//report.html", "one-seed0\\report.html",
    "one-seed0/%00", ".hidden/report.html", "out/report.html", "linked.html", "one-seed0",
    "one-seed0/config.toml", "one-seed0/checkpoint.json", "one-seed0/bundle/card.json", "",
    "one-seed0/report.html/", "%252e%252e/secret/report.html", "line-seed0/link/report.html",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_nothing_but_reports_below_the_folder_is_served(shelf: Path, path: str) -> None:
    secret = shelf.parent / "secret"
    for folder in (secret, shelf / ".hidden"):
        folder.mkdir(exist_ok=True)
        (folder / "report.html").write_text("secret")
    links = {shelf / "out": secret, shelf / "line-seed0" / "link": secret}
    links[shelf / "linked.html"] = secret / "report.html"
    try:
        for link, to in links.items():
            link.symlink_to(to)
        with serving(shelf) as server:
            status, _, body = ask(server, f"/report/{path}")
            assert status == 404
            assert "secret" not in body
            assert ask(server, f"/api/run?path={path}")[0] in (200, 404)
            assert "out" not in [run["name"] for run in
                                 json.loads(ask(server, "/api/runs")[2])["runs"]]  # fmt: skip
    finally:
        for link in links:
            link.unlink()
        shutil.rmtree(shelf / ".hidden")


def test_a_report_may_run_and_load_nothing(server: Server) -> None:
    status, headers, body = ask(server, "/report/one-seed0/report.html")
    assert status == 200
    assert body.startswith("<!doctype html>")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert policy.endswith("sandbox")
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/run", "/compare", "/app.js", "/app.css", "/api/runs"])
def test_every_answer_has_a_policy_and_stays_here(server: Server, path: str) -> None:
    status, headers, _ = ask(server, path)
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "'unsafe-inline'" not in policy.partition("style-src")[0]
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_the_list_tells_what_each_is_and_how_far_it_came(server: Server) -> None:
    runs = {run["path"]: run for run in json.loads(ask(server, "/api/runs")[2])["runs"]}
    assert set(runs) == {"one-seed0", "two-seed0", "third-seed0", "line-seed0",
                         "line-seed0/train-12345678-seed0"}  # fmt: skip
    one, third, line = (runs[f"{name}-seed0"] for name in ("one", "third", "line"))
    assert (one["kind"], one["method"], one["state"]) == ("train", "fedavg", "done")
    assert (one["done"], one["total"], one["report"]) == (2, 2, "one-seed0/report.html")
    assert one["result"].startswith("accuracy ")
    assert one["bytes"] > 0
    assert (third["state"], third["done"], third["report"]) == ("stopped", 3, None)
    assert (line["kind"], line["state"], line["done"], line["total"]) == (
        "pipeline", "stopped", 1, 2)  # fmt: skip
    assert line["result"] == "train: accuracy 50 %"
    assert runs["line-seed0/train-12345678-seed0"]["within"] == "line-seed0"


def test_a_locked_run_is_running_and_looking_keeps_nobody_out(shelf: Path) -> None:
    folder = shelf / "third-seed0"
    assert not is_locked(folder)
    with locked(folder):
        assert is_locked(folder)
        assert Shelf(shelf).entry("third-seed0").state == "running"
    assert Shelf(shelf).entry("third-seed0").state == "stopped"
    assert not is_locked(shelf / "line-seed0"), "where nobody ever was at work"


def test_runs_are_compared_by_curves_summaries_and_configurations(server: Server) -> None:
    status, _, body = ask(server, "/api/compare?run=one-seed0&run=two-seed0")
    told = json.loads(body)
    assert status == 200
    assert [plot["title"] for plot in told["plots"]] == [
        "Test accuracy over rounds", "Bytes over rounds"]  # fmt: skip
    assert all(name in told["plots"][0]["svg"] for name in ("one-seed0", "two-seed0"))
    summaries, differences = told["tables"]
    assert [row[0] for row in summaries["rows"]] == ["one-seed0", "two-seed0"]
    changed = {row[0]: row[1:] for row in differences["rows"]}
    assert changed["method.name"] == ["fedavg", "fedselect"]
    assert "rounds" not in changed


ONE = "run=one-seed0"


@pytest.mark.parametrize(
    "query", ["", ONE, f"{ONE}&{ONE}", f"{ONE}&run=line-seed0", f"{ONE}&run=../x"]
)
def test_what_cannot_be_compared_is_told(server: Server, query: str) -> None:
    status, _, body = ask(server, f"/api/compare?{query}")
    assert status == 404
    assert "allowed" in json.loads(body)["error"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"round": "x"}', "[" * 100_000, "\udcff"])
def test_what_cannot_be_read_is_listed_as_such(shelf: Path, tmp_path: Path, content: str) -> None:
    for name, file in (("bad", "checkpoint.json"), ("worse", "pipeline.json"), ("w", "audit.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    shutil.copytree(shelf / "one-seed0", tmp_path / "one-seed0")
    with serving(tmp_path) as server:
        told = json.loads(ask(server, "/api/runs")[2])["runs"]
        states = {run["name"]: run["state"] for run in told}
        assert states == {"bad": "unreadable", "worse": "unreadable", "w": "unreadable",
                          "one-seed0": "done"}  # fmt: skip
        for name in ("bad", "worse"):
            status, _, body = ask(server, f"/api/run?path={name}")
            assert status == 200
            assert json.loads(body)["problem"]


def test_no_folder_and_no_port_are_refused(tmp_path: Path, shelf: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(InputError, match="folder"):
            Server(folder, 0)
    with Server(shelf, 0) as first, pytest.raises(InputError, match="--port"):
        Server(shelf, first.server_port)


def test_who_looks_keeps_nobody_out(shelf: Path) -> None:
    folder = shelf / "third-seed0"
    with locked(folder):
        pass
    with (folder / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as one does that looks, at the very moment
        timer = threading.Timer(0.02, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        with locked(folder):
            assert is_locked(folder)
        timer.join()


def test_what_has_not_changed_is_not_drawn_again(shelf: Path) -> None:
    views = Views(Shelf(shelf))
    first = views.run("one-seed0")
    assert views.run("one-seed0")["plots"] is first["plots"]
    assert views.compare(["one-seed0", "two-seed0"])["plots"] is not first["plots"]


def test_the_command_serves_until_it_is_ended(shelf: Path) -> None:
    command = [sys.executable, "-m", "hansa.cli", "ui", str(shelf), "--port", "0", "--no-browser"]
    # A job in the background of a shell ignores Ctrl-C, and its children with it.
    ready = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=ready) as process:
        try:
            address = process.stdout.readline().split(" ")[0]
            connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
            connection.request("GET", "/api/runs")
            assert len(json.loads(connection.getresponse().read())["runs"]) == 5
            connection.close()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
    none = subprocess.run(
        [*command[:4], str(shelf / "none")], capture_output=True, text=True, check=False
    )
    assert none.returncode == 2
    assert "no folder" in none.stderr
    assert len(none.stderr.splitlines()) == 1
