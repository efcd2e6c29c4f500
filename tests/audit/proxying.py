"""A service on a socket, and the proxy before it in a thread, for tests of the proxy."""

import contextlib
import gzip
import http.client
import json
import ssl
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hansa.audit.connections import Connections
from hansa.audit.plan import read_plan
from hansa.audit.proxy import Proxy
from hansa.audit.proxy_log import ProxyLog
from hansa.audit.proxy_options import ProxyOptions, upstream_of
from hansa.audit.proxy_server import Deadline, bind, serve

BODY = b'{"current": {"temp_c": 21.50, "temp_f": 70.7, "note": "caf\\u00e9"}}'
FALSE = b'{"current": {"temp_c": 28.5, "temp_f": 83.3, "note": "caf\\u00e9"}}'
PLAN = {
    "seed": 3,
    "tamper": [
        {
            "action": "shift",
            "path": "current.temp_c",
            "by": 7,
            "unit": "c",
            "follow": {"current.temp_f": "f"},
            "route": "/v1/*",
        }
    ],
}


class Handler(BaseHTTPRequestHandler):
    """Answers by the last part of the path; it remembers what it was asked."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path, list(self.headers.items())))
        kind = self.path.partition("?")[0].rpartition("/")[2]
        getattr(self, f"send_{kind}", self.send_plain)()

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = b""
        if "chunked" in self.headers.get("transfer-encoding", ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.asked.append((self.command, self.path, list(self.headers.items())))
        self.answer(json.dumps({"length": len(body), "sum": zlib.crc32(body)}).encode())

    do_PATCH = do_POST  # noqa: N815

    def answer(self, body=BODY, status=200, kind="application/json", chunks=False, **more) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in more.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Set-Cookie", "a=1")
        self.send_header("Set-Cookie", "b=2")
        if chunks:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for start in range(0, len(body), 7):
                piece = body[start : start + 7]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_plain(self) -> None:
        self.answer(ETag='"7"', X_Custom="kept")

    def send_gzip(self) -> None:
        self.answer(gzip.compress(BODY, mtime=0), Content_Encoding="gzip")

    def send_deflate(self) -> None:
        self.answer(zlib.compress(BODY), Content_Encoding="deflate")

    def send_rawdeflate(self) -> None:
        deflater = zlib.compressobj(wbits=-15)
        self.answer(deflater.compress(BODY) + deflater.flush(), Content_Encoding="deflate")

    def send_chunks(self) -> None:
        self.answer(chunks=True)

    def send_gzipchunks(self) -> None:
        self.answer(gzip.compress(BODY, mtime=0), chunks=True, Content_Encoding="gzip")

    def send_binary(self) -> None:
        self.answer(bytes(range(256)) * 300, kind="image/png", Connection="X-Hop", X_Hop="no")

    def send_page(self) -> None:
        self.answer(b"<p>21.5</p>", kind="text/html")

    def send_missing(self) -> None:
        self.answer(status=404)

    def send_other(self) -> None:
        self.answer(b'{"current": {"temp": 21.5}}')

    def send_endless(self) -> None:
        self.answer(b'{"current": {"temp_c": 1e999, "temp_f": NaN}}')

    def send_deep(self) -> None:
        self.answer(BODY[:-1] + b', "x": ' + b"[" * 900 + b"]" * 900 + b"}")

    def send_text(self) -> None:
        self.answer(b'{"current": {"temp_c": "private words", "temp_f": 1}}')

    def send_zstd(self) -> None:
        self.answer(b"(\xb5/\xfd", Content_Encoding="zstd")

    def send_torn(self) -> None:
        self.answer(gzip.compress(BODY, mtime=0)[:-9], Content_Encoding="gzip")

    def send_notjson(self) -> None:
        self.answer(b"{'current'")

    def send_huge(self) -> None:
        self.answer(BODY + b" " * 5000, chunks=True)

    def send_bomb(self) -> None:
        self.answer(gzip.compress(BODY + b" " * 50_000, mtime=0), Content_Encoding="gzip")

    def send_nocontent(self) -> None:
        self.send_response(204)
        self.end_headers()

    def send_same(self) -> None:
        self.send_response(304)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()

    def send_half(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(BODY[:10])
        self.close_connection = True

    def send_slow(self) -> None:
        self.server.going.wait(10)
        self.answer()

    def send_events(self) -> None:
        """Send an event, and another each time that ``going`` is set, until nobody listens."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            while True:
                self.wfile.write(b'data: {"current": {"temp_c": 1}}\n\n')
                self.wfile.flush()
                self.server.going.wait(0.02)
                if self.server.going.is_set():
                    return
        except OSError:
            self.server.left.set()


class Service(ThreadingHTTPServer):
    """The service; ``asked`` is what it was asked."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, certificate=None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.asked, self.going, self.left = [], threading.Event(), threading.Event()

    @property
    def port(self) -> int:
        return self.server_address[1]


@contextlib.contextmanager
def service(certificate=None):
    """Run the service, over TLS where a file with key and certificate is given."""
    with Service(certificate) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.going.set()
            server.shutdown()
            thread.join()


class Running:
    """A proxy that runs; ``log()`` is what it wrote."""

    def __init__(self, port: int, proxy: Proxy, deadline: Deadline, thread) -> None:
        self.port, self.proxy, self.deadline, self.thread = port, proxy, deadline, thread

    def log(self) -> list[dict]:
        return [json.loads(line) for line in self.proxy.log.path.read_text().splitlines()]


@contextlib.contextmanager
def proxying(port: int, folder, plan=PLAN, origin="http://127.0.0.1", ca=None, **options):
    """Run a proxy before a port of this machine."""
    listening = bind("127.0.0.1", 0)
    deadline, log = Deadline(600), ProxyLog(folder / "proxy.jsonl")
    proxy = Proxy(
        upstream_of(f"{origin}:{port}"),
        read_plan(plan),
        log,
        options=ProxyOptions(**{"grace": 0.0, **options}),
        expired=lambda: deadline.passed(),
        transport=Connections(ca),
    )
    started = threading.Event()
    own = listening.getsockname()[1]
    thread = threading.Thread(target=serve, args=(proxy, listening, deadline, started.set))
    thread.start()
    started.wait(10)
    try:
        yield Running(own, proxy, deadline, thread)
    finally:
        deadline.seconds = -1e6
        thread.join(20)
        log.close()
        listening.close()
    assert not thread.is_alive()


def ask(port: int, path: str, method: str = "GET", body=None, headers=None, **more):
    """Return (status, end-to-end headers, body as it came)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body, headers or {}, **more)
        answer = connection.getresponse()
        raw = answer.read()
        hop = ("date", "connection", "transfer-encoding", "keep-alive")
        kept = [(k.lower(), v) for k, v in answer.getheaders() if k.lower() not in hop]
        return answer.status, kept, raw
    finally:
        connection.close()


def until(condition, seconds: float = 10.0) -> bool:
    """Wait for a condition, and tell whether it came."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())
