"""A server of one folder of runs, for the browser of the person at this machine.

It listens on the loopback address and answers GET and HEAD, to requests that name that address:
so a page from elsewhere, whose own name was made to lead here (DNS rebinding), gets nothing. It
reads what is below the folder and writes nothing. Pages of runs are served without any right to
run scripts or to load anything.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from hansa.errors import InputError
from hansa.ui.shelf import Shelf
from hansa.ui.views import Views

ADDRESS = "127.0.0.1"
PORT = 8321
_NAMES = {ADDRESS, "localhost"}
"""What a request may call this server; the port may differ, as it does through a tunnel."""
_OWN = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_REPORT = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; form-action 'none'; "
    "base-uri 'none'; frame-ancestors 'none'; sandbox"
)
_ASSETS = {
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/app.css": ("app.css", "text/css; charset=utf-8"),
    **dict.fromkeys(("/", "/run", "/compare"), ("page.html", "text/html; charset=utf-8")),
}
_log = logging.getLogger(__name__)


class Server(ThreadingHTTPServer):
    """The server of one folder; ``serve_forever`` runs it.

    Attributes:
        views: what it answers with.
    """

    daemon_threads = True

    def __init__(self, folder: str | Path, port: int = PORT) -> None:
        """Listen on a port of the loopback address, any free one where it is 0.

        Raises:
            InputError: no folder there, or a port that cannot be had.
        """
        self.views = Views(Shelf(folder))
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError("--port", f"{port} ({error})", "a free port, or 0 for any") from error

    def handle_error(self, request: object, client_address: object) -> None:
        """Pass over what a browser no longer waits for; show what else went wrong."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            _log.exception("a request of %s", client_address)

    @property
    def url(self) -> str:
        """Where it is found."""
        return f"http://{ADDRESS}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    server_version, sys_version = "hansa", ""
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        """Answer a request."""
        self._answer()

    do_HEAD = do_GET  # noqa: N815

    def _refuse(self) -> None:
        self.close_connection = True
        allowed = {"Allow": "GET, HEAD"}
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET and HEAD\n", more=allowed)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse  # noqa: N815

    def _answer(self) -> None:
        if not _is_ours(self.headers.get_all("Host") or []):
            self._send(HTTPStatus.MISDIRECTED_REQUEST, b"not this host\n")
            return
        try:
            path, query = unquote(urlsplit(self.path).path), urlsplit(self.path).query
            asked = parse_qs(query, max_num_fields=100)
        except ValueError:
            self._send(HTTPStatus.BAD_REQUEST, b"no address\n")
            return
        views = self.server.views
        calls: dict[str, Callable[[], object]] = {
            "/api/runs": views.runs,
            "/api/run": lambda: views.run(asked.get("path", [""])[-1]),
            "/api/compare": lambda: views.compare(asked.get("run", [])),
        }
        if path in calls:
            self._json(calls[path])
        elif path in _ASSETS:
            name, kind = _ASSETS[path]
            content = files("hansa.ui").joinpath("pages", name).read_bytes()
            self._send(HTTPStatus.OK, content, kind, more={"Content-Security-Policy": _OWN})
        elif path == "/favicon.ico":
            # For reports too, which are of no origin.
            more = {"Cross-Origin-Resource-Policy": "cross-origin"}
            self._send(HTTPStatus.NO_CONTENT, b"", more=more)
        elif path.startswith("/report/"):
            self._page(path.removeprefix("/report/"))
        else:
            self._send(HTTPStatus.NOT_FOUND, b"nothing there\n")

    def _json(self, call: Callable[[], object]) -> None:
        try:
            status, told = HTTPStatus.OK, call()
        except InputError as error:
            status, told = HTTPStatus.NOT_FOUND, {"error": str(error)}
        except Exception:  # one run must not take the others' pages with it
            _log.exception("%s", self.path)
            status, told = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "see the terminal"}
        content = json.dumps(told, allow_nan=False, default=str).encode()
        self._send(status, content, "application/json")

    def _page(self, path: str) -> None:
        """Send a report, and no other file."""
        try:
            file = self.server.views.shelf.find(path)
            if file.name != "report.html" or not file.is_file():
                raise InputError(path, "no report", "the page of a run")
            content = file.read_bytes()
        except (InputError, OSError):
            self._send(HTTPStatus.NOT_FOUND, b"nothing there\n")
            return
        more = {"Content-Security-Policy": _REPORT}
        self._send(HTTPStatus.OK, content, "text/html; charset=utf-8", more=more)

    def _send(
        self,
        status: HTTPStatus,
        content: bytes,
        kind: str = "text/plain; charset=utf-8",
        more: dict[str, str] | None = None,
    ) -> None:
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        if status == HTTPStatus.OK and self.headers.get("If-None-Match") == tag:
            status, content = HTTPStatus.NOT_MODIFIED, b""
        self.send_response(status)
        headers = {
            "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
            "Cache-Control": "no-cache",
            "ETag": tag,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            **(more or {}),
        }
        if status not in (HTTPStatus.NOT_MODIFIED, HTTPStatus.NO_CONTENT):
            headers |= {"Content-Type": kind, "Content-Length": str(len(content))}
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Tell of requests only where somebody listens."""
        _log.debug(format, *args)


def _is_ours(hosts: Sequence[str]) -> bool:
    """Tell whether a request's one Host header is a name of this server, with or without port."""
    if len(hosts) != 1:
        return False
    name, _, port = hosts[0].lower().partition(":")
    return name in _NAMES and (not port or port.isdigit())
