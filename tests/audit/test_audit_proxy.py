"""The tamper proxy on real sockets: what it edits, what it leaves alone, what it refuses."""

import asyncio
import gzip
import hashlib
import http.client
import json
import logging
import socket
import zlib
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from proxying import BODY, FALSE, ask, proxying, service, until

from hansa.audit.connections import Connections
from hansa.audit.proxy_log import Asked
from hansa.audit.proxy_options import ProxyOptions, check_bind, upstream_of
from hansa.audit.proxy_server import Deadline, bind, check_no_loop
from hansa.audit.redact import Redactor
from hansa.errors import InputError


@pytest.fixture(scope="module")
def upstream():
    with service() as server:
        yield server


@pytest.fixture(scope="module")
def proxy(upstream, tmp_path_factory):
    with proxying(upstream.port, tmp_path_factory.mktemp("proxy"), largest=4096) as running:
        yield running


@pytest.mark.parametrize(
    "path", ["plain", "gzip", "deflate", "chunks", "gzipchunks", "binary", "zstd", "nocontent"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_routes_without_a_rule_pass_byte_by_byte(upstream, proxy, path, method) -> None:
    target = f"/v2/a%2Fb//{path}?x=1&y=%20+%7C"
    sent = {"Accept-Encoding": "br;q=1, gzip", "X-Mine": "a b", "User-Agent": "mine"}
    direct, through = (ask(p, target, method, headers=sent) for p in (upstream.port, proxy.port))
    hop = [each for each in direct[1] if each[0] != "x-hop"]
    assert through == (direct[0], hop, direct[2])
    # What the service is asked is what the application asked, but for the name of the host.
    (first, second) = upstream.asked[-2:]
    assert first[:2] == second[:2] == (method, target)
    assert sorted(k.lower() for k, _ in first[2]) == sorted(k.lower() for k, _ in second[2])
    assert {k.lower(): v for k, v in first[2]} == {k.lower(): v for k, v in second[2]}


def test_an_answer_that_says_nothing_is_new_passes(proxy) -> None:
    status, headers, body = ask(proxy.port, "/v2/same")
    assert (status, body) == (304, b"")
    assert "content-length" not in dict(headers)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_bodies_of_requests_pass(proxy, method, chunked) -> None:
    body = bytes(range(256)) * 700
    pieces = iter([body[:100_000], body[100_000:]]) if chunked else body
    _, _, answer = ask(proxy.port, "/v2/post", method, pieces, encode_chunked=chunked)
    assert json.loads(answer) == {"length": len(body), "sum": zlib.crc32(body)}


@pytest.mark.parametrize("path", ["plain", "chunks", "gzip", "gzipchunks", "deflate", "rawdeflate"])
def test_a_rule_edits_its_field_in_every_encoding(upstream, proxy, path) -> None:
    num = len(proxy.log())
    status, headers, raw = ask(
        proxy.port, f"/v1/{path}", headers={"Accept-Encoding": "zstd, br;q=0.5, gzip, deflate"}
    )
    kept = dict(headers)
    assert status == 200
    assert int(kept["content-length"]) == len(raw)
    undo = {"gzip": gzip.decompress, "deflate": zlib.decompress, None: bytes}
    undo["rawdeflate"] = lambda body: zlib.decompress(body, -15)
    name = "rawdeflate" if path == "rawdeflate" else kept.get("content-encoding")
    assert (name is None) == (path in ("plain", "chunks"))
    assert undo[name](raw) == FALSE
    asked = {k.lower(): v for k, v in upstream.asked[-1][2]}
    assert "zstd" not in asked["accept-encoding"]
    assert "gzip, deflate" in asked["accept-encoding"]
    assert [v for k, v in headers if k == "set-cookie"] == ["a=1", "b=2"]
    line = proxy.log()[num]
    assert line.pop("id")
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "method": "GET",
        "route": f"/v1/{path}",
        "result": "edited",
        "status": 200,
        "seed": 3,
        "before": hashlib.sha256(BODY).hexdigest(),
        "after": hashlib.sha256(FALSE).hexdigest(),
        "edits": [
            {"operator": "substitution", "path": "current.temp_c"},
            {"operator": "substitution", "path": "current.temp_f"},
        ],
    }


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("page", "content of type text/html"),
        ("missing", "status 404"),
        ("nocontent", "status 204"),
        ("other", "unknown path 'current.temp_c'"),
        ("text", "not what a rule can edit"),
        ("endless", "not what a rule can edit"),
        ("deep", "not what a rule can edit"),
        ("zstd", "encoded as zstd"),
        ("torn", "no gzip body"),
        ("notjson", "not what a rule can edit"),
        ("huge", "a body of more than 4096 bytes"),
        ("bomb", "a body of more than 4096 bytes"),
    ],
)
def test_what_cannot_be_edited_passes_as_it_came_and_the_log_says_why(
    upstream, proxy, path, reason
) -> None:
    direct, through = (ask(p, f"/v1/{path}") for p in (upstream.port, proxy.port))
    assert through == direct
    assert (proxy.log()[-1]["result"], proxy.log()[-1]["reason"]) == ("passed", reason)


def test_a_head_request_tells_no_length_that_would_be_wrong(proxy) -> None:
    status, headers, body = ask(proxy.port, "/v1/plain", "HEAD")
    assert (status, body) == (200, b"")
    assert "content-length" not in dict(headers)
    assert dict(headers)["etag"] == '"7"'


def own_certificate(folder):
    """Write a key and a certificate of ``localhost`` that is signed with it; return the file."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1)
    made = made.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    made = made.add_extension(names, critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    pem = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8
    held = key.private_bytes(pem, form, serialization.NoEncryption())
    path = folder / "own.pem"
    path.write_bytes(held + made.sign(key, hashes.SHA256()).public_bytes(pem))
    return path


def test_a_service_over_tls_and_one_whose_certificate_is_not_known(tmp_path) -> None:
    own = own_certificate(tmp_path)
    with service(own) as server:
        origin = "https://localhost"
        with proxying(server.port, tmp_path, origin=origin, ca=own) as running:
            assert gzip.decompress(ask(running.port, "/v1/gzip")[2]) == FALSE
            assert ask(running.port, "/v2/plain")[2] == BODY
        with proxying(server.port, tmp_path, origin=origin) as running:
            status, _, body = ask(running.port, "/v1/plain")
            assert (status, body.count(b"\n")) == (502, 1)
        with proxying(server.port, tmp_path, origin="https://127.0.0.1", ca=own) as running:
            assert ask(running.port, "/v2/plain")[0] == 502  # a certificate of another name


def test_bodies_that_are_too_large_are_refused_on_demand(upstream, tmp_path) -> None:
    with proxying(upstream.port, tmp_path, largest=4096, over="refuse") as running:
        for path in ("huge", "bomb"):
            status, _, body = ask(running.port, f"/v1/{path}")
            assert (status, body) == (502, b"a body of more than 4096 bytes\n")
            assert running.log()[-1]["result"] == "refused"
        assert ask(running.port, "/v1/plain")[2] == FALSE
        assert ask(running.port, "/v2/huge")[0] == 200
    assert running.proxy.log.counts == {"refused": 2, "edited": 1, "other": 1}


def test_a_stream_of_events_passes_as_it_comes_and_ends_when_nobody_listens(tmp_path) -> None:
    with service() as server, proxying(server.port, tmp_path) as running:
        with socket.create_connection(("127.0.0.1", running.port), 10) as connection:
            connection.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            got = b""
            while got.count(b"data: ") < 3:
                got += connection.recv(4096)
            assert not server.going.is_set()
        assert server.left.wait(10)
        assert running.log()[-1]["reason"] == "content of type text/event-stream"


def test_a_service_that_is_down_slow_or_breaks_off(upstream, tmp_path) -> None:
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with proxying(port, tmp_path) as running:
        status, _, body = ask(running.port, "/v1/plain")
        assert status == 502
        assert body == f"no answer from http://127.0.0.1:{port} (ConnectError)\n".encode()
        assert running.log()[-1]["result"] == "failed"
    with proxying(upstream.port, tmp_path, patience=0.2) as running:
        assert ask(running.port, "/v1/slow")[0] == 504
        status, _, body = ask(running.port, "/v1/half")
        assert status == 502
        assert body.count(b"\n") == 1
        # Its head was sent already: the application sees that the body is not whole.
        with pytest.raises(http.client.IncompleteRead):
            ask(running.port, "/v2/half")
        assert "broke off" in running.log()[-1]["reason"]
        assert ask(running.port, "/v1/plain")[2] == FALSE


def test_other_hosts_and_tunnels_are_refused(upstream, proxy) -> None:
    num = len(upstream.asked)
    for head in (
        b"GET http://other.example/v1/plain HTTP/1.1\r\nHost: other.example\r\n\r\n",
        b"GET /v1/plain HTTP/1.1\r\nHost: rebound.example:80\r\n\r\n",
        b"CONNECT other.example:443 HTTP/1.1\r\nHost: other.example:443\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", proxy.port), 10) as connection:
            connection.sendall(head)
            status = int(connection.recv(4096).split()[1])
            assert status in (400, 421)
    assert len(upstream.asked) == num


def test_it_expires_and_ends(upstream, tmp_path) -> None:
    with proxying(upstream.port, tmp_path, grace=1.0) as running:
        assert ask(running.port, "/v1/plain")[0] == 200
        running.deadline.seconds = 0.0
        status, _headers, body = ask(running.port, "/v1/plain")
        assert (status, body) == (503, b"the time of this proxy is over\n")
        assert until(lambda: not running.thread.is_alive())
        with pytest.raises(OSError, match="refused"):
            ask(running.port, "/v1/plain")
    assert [line["result"] for line in running.log()] == ["edited"]


def test_a_deadline_holds_though_a_clock_stands_still(monkeypatch) -> None:
    deadline = Deadline(60)
    assert not deadline.passed()
    before = deadline._steady
    monkeypatch.setattr("time.monotonic", lambda: before + 61)
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert deadline.passed()
    assert not deadline.passed(grace=2)


def test_secrets_reach_no_log(upstream, tmp_path, caplog, monkeypatch) -> None:
    planted = ["env-secret-41", "header-secret-42", "query-secret-43", "cookie-secret-44"]
    monkeypatch.setenv("WEATHER_API_KEY", planted[0])
    caplog.set_level(logging.DEBUG)
    with proxying(upstream.port, tmp_path) as running:
        for kind in ("plain", "text", "other", "half", "slow"):
            upstream.going.set()
            ask(
                running.port,
                f"/v1/{planted[0]}/{planted[1]}/4f6Zq81LmXw09PdTtR2u/{kind}?key={planted[2]}&q=Oslo",
                headers={"Authorization": f"Bearer {planted[1]}", "Cookie": planted[3]},
            )
        upstream.going.clear()
    lines = running.proxy.log.path.read_text()
    assert len(lines.splitlines()) == 5
    for secret in (*planted, "4f6Zq81L", "Oslo", "private words", "21.5", "28.5", "Bearer"):
        assert secret not in lines + caplog.text
    assert running.log()[0]["route"] == "/v1/[secret]/[secret]/[secret]/plain"
    assert Asked("GET", "/v1/current.json", "", {}).shown(Redactor()) == "/v1/current.json"


def test_connections_are_used_again_and_old_ones_closed(upstream, monkeypatch) -> None:
    async def ask_all(num: int) -> int:
        pool = Connections()

        async def one() -> bytes:
            url = f"http://127.0.0.1:{upstream.port}/plain"
            response = await pool.handle_async_request(httpx.Request("GET", url))
            body = await response.aread()
            await response.aclose()
            return body

        for _ in range(3):
            assert await asyncio.gather(*(one() for _ in range(num))) == [BODY] * num
        free = len(pool._free)
        await pool.aclose()
        return free

    assert asyncio.run(ask_all(8)) == 8
    monkeypatch.setattr("hansa.audit.connections._KEPT", -1.0)
    assert asyncio.run(ask_all(8)) == 0


def test_two_hundred_connections_at_once(upstream, proxy) -> None:
    async def client(number: int) -> list[bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        bodies = []
        for turn in range(3):
            kind = ("gzip", "plain", "chunks")[(number + turn) % 3]
            route = "v1" if kind != "chunks" else "v2"
            writer.write(f"GET /{route}/{kind} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            if kind == "chunks":
                body = b""
                while size := int(await reader.readline(), 16):
                    body += (await reader.readexactly(size + 2))[:-2]
                await reader.readline()
            else:
                lower = head.lower()
                size = int(lower.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                body = await reader.readexactly(size)
            bodies.append(gzip.decompress(body) if kind == "gzip" else body)
        writer.close()
        return bodies

    async def all_of_them() -> list[list[bytes]]:
        return await asyncio.gather(*(client(number) for number in range(200)))

    for number, bodies in enumerate(asyncio.run(all_of_them())):
        for turn, body in enumerate(bodies):
            assert body == (BODY if (number + turn) % 3 == 2 else FALSE)


@pytest.mark.parametrize(
    ("url", "hosts", "key"),
    [
        ("https://api.example.com/v1", (), "api.example.com, which is not listed"),
        ("https://api.example.com", ("other.example.com",), "which is not listed"),
        ("ftp://127.0.0.1", (), "http:// or https://"),
        ("http://127.0.0.1:99999", (), "http:// or https://"),
        ("http://[::1", (), "http:// or https://"),
        ("http://me:hunter2secret@localhost", (), "with a user"),
        ("http://localhost/?key=hunter2secret", (), "a query"),
    ],
)
def test_services_that_are_refused(url, hosts, key) -> None:
    with pytest.raises(InputError) as caught:
        upstream_of(url, hosts)
    assert key in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_services_that_are_not() -> None:
    listed = upstream_of("https://API.example.com/v1/", ("api.example.com",))
    assert (listed.origin, listed.base) == ("https://api.example.com", "/v1")
    assert upstream_of("http://[::1]:8000").authority == "[::1]:8000"


def test_addresses_that_are_refused(proxy) -> None:
    for host in ("0.0.0.0", "192.0.2.1", "::", "", "example.com"):  # noqa: S104
        with pytest.raises(InputError, match="--host"):
            check_bind(host, off_loopback=False)
    check_bind("0.0.0.0", off_loopback=True)  # noqa: S104
    with pytest.raises(InputError, match="in use"):
        bind("127.0.0.1", proxy.port)
    with pytest.raises(InputError, match="not of this machine"):
        bind("192.0.2.1", 0, off_loopback=True)
    with bind("127.0.0.1", 0) as listening:
        own = upstream_of(f"http://localhost:{listening.getsockname()[1]}")
        with pytest.raises(InputError, match="the proxy itself"):
            check_no_loop(own, listening)
    for wrong in ({"minutes": 0}, {"largest": 0}, {"over": "cut"}, {"patience": 0}):
        with pytest.raises(InputError, match="--"):
            ProxyOptions(**wrong)


def test_what_is_drawn_depends_on_the_body_and_the_seed_alone(upstream, tmp_path) -> None:
    rule = {"action": "shift", "path": "current.temp_c", "unit": "c", "strength": 0.5}
    told = []
    for number, seed in enumerate((1, 1, 2)):
        (tmp_path / str(number)).mkdir()
        plan = {"seed": seed, "tamper": [{**rule}]}
        with proxying(upstream.port, tmp_path / str(number), plan) as running:
            told.append([ask(running.port, f"/{kind}")[2] for kind in ("plain", "chunks")])
    assert told[0] == told[1]
    assert told[0][0] == told[0][1]
    # Strength 0.5 is 20 degrees; which way is drawn, and two of the seeds go either way.
    values = [json.loads(bodies[0])["current"]["temp_c"] for bodies in told]
    assert sorted(set(values)) == [1.5, 41.5]
