"""The proxy as a server: bound to the loopback, for a stated time, ended by Ctrl-C."""

import asyncio
import errno
import importlib.util
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn

from hansa.audit.proxy import Proxy
from hansa.audit.proxy_options import Upstream, check_bind
from hansa.errors import InputError

_ENDING = 5  # seconds that answers under way have when the proxy ends
_KEPT = 75  # seconds for which an idle connection of the application is kept


@dataclass
class Deadline:
    """The end of the proxy's time, which no clock that is set back and no sleep makes later.

    Attributes:
        seconds: from now.
    """

    seconds: float
    _clock: float = field(default_factory=time.time)
    _steady: float = field(default_factory=time.monotonic)

    def passed(self, grace: float = 0.0) -> bool:
        """Tell whether it has passed, by so many seconds."""
        elapsed = max(time.time() - self._clock, time.monotonic() - self._steady)
        return elapsed >= self.seconds + grace


def bind(host: str, port: int, off_loopback: bool = False) -> socket.socket:
    """Return a socket that listens; 0 is any free port.

    Raises:
        InputError: an address that others can reach, or a port that cannot be had.
    """
    check_bind(host, off_loopback)
    if not 0 <= port < 1 << 16:
        raise InputError("--port", port, "0 (any) to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named in full, or asyncio does not see that it may send small packets at once.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError("--host", f"{host}, not of this machine", "127.0.0.1") from error
        found = "in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise InputError("--port", f"{port}, {found}", "a free port, or 0 for any") from error
    return listening


def address(listening: socket.socket) -> str:
    """Return the base URL that an application is given."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_no_loop(upstream: Upstream, listening: socket.socket) -> None:
    """Refuse a proxy that stands before itself.

    Raises:
        InputError: it does.
    """
    own = listening.getsockname()[:2]
    if upstream.port == own[1] and upstream.host in ("localhost", own[0]):
        raise InputError("--upstream", f"{upstream.origin}, the proxy itself", "another service")


def serve(
    proxy: Proxy, listening: socket.socket, deadline: Deadline, ready: Callable[[], None]
) -> bool:
    """Serve until the deadline or a signal, and tell whether it was the deadline.

    Args:
        proxy: what answers.
        listening: where.
        deadline: when it ends; ``options.grace`` seconds more are answered with 503.
        ready: called when it is about to answer.
    """
    if importlib.util.find_spec("sniffio") is None:
        # httpcore asks for it at every request, which is a search through the whole path.
        sys.modules.setdefault("sniffio", None)  # type: ignore[arg-type]
    # Requests with their queries and headers, which no log is to hold.
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    config = uvicorn.Config(
        proxy,
        access_log=False,
        log_level="error",
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=_KEPT,
        timeout_graceful_shutdown=_ENDING,
    )
    server = _Server(config, deadline, proxy.options.grace)

    async def run() -> None:
        ready()
        await server.serve(sockets=[listening])
        await proxy.aclose()

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run())
    return deadline.passed()


class _Server(uvicorn.Server):
    """Ends at a deadline; a signal ends it, and no more: it is the usual way to do so."""

    def __init__(self, config: uvicorn.Config, deadline: Deadline, grace: float) -> None:
        super().__init__(config)
        self._deadline, self._grace = deadline, grace

    async def on_tick(self, counter: int) -> bool:
        if self._deadline.passed(self._grace):
            self.should_exit = True
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # as a test runs it: no other thread can listen to signals
            return
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
