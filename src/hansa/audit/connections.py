"""Connections to a service: each request takes one that is free, or opens another.

The pool of ``httpx`` looks at every pair of its connections for each request, which at two hundred
of them is most of the work. Here each has a pool of its own, with nothing to look for.
"""

import ssl
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

import httpx

from hansa.errors import InputError

_KEPT = 2.0
"""Seconds for which a free one is kept: less than services do, so that none ends as it is used."""


class Connections(httpx.AsyncBaseTransport):
    """A transport, without proxies or credentials of the environment's.

    Args:
        ca: certificates that those of services may be signed with, in the place of the usual ones.

    Raises:
        InputError: a file that holds none.
    """

    def __init__(self, ca: Path | None = None) -> None:
        try:
            self._verify = ssl.create_default_context(cafile=ca) if ca else _usual()
        except (OSError, ssl.SSLError) as error:
            raise InputError("--ca", f"{ca} ({error})", "certificates in PEM") from error
        self._free: deque[tuple[httpx.AsyncHTTPTransport, float]] = deque()
        """Those that are free, with the time since when; the last one is taken first."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Return the answer to a request; its connection is free again when it is closed."""
        one = self._free.pop()[0] if self._free else self._new()
        try:
            response = await one.handle_async_request(request)
        except BaseException:
            await self._release(one)
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)  # noqa: S101
        response.stream = _Body(self, one, response.stream)
        return response

    async def aclose(self) -> None:
        """Close the connections that are free."""
        while self._free:
            await self._free.pop()[0].aclose()

    def _new(self) -> httpx.AsyncHTTPTransport:
        limits = httpx.Limits(max_connections=1, keepalive_expiry=_KEPT)
        return httpx.AsyncHTTPTransport(verify=self._verify, trust_env=False, limits=limits)

    async def _release(self, one: httpx.AsyncHTTPTransport) -> None:
        now = time.monotonic()
        self._free.append((one, now))
        while self._free and now - self._free[0][1] > _KEPT:
            await self._free.popleft()[0].aclose()


class _Body(httpx.AsyncByteStream):
    """The body of an answer, which holds a connection until it is closed."""

    def __init__(
        self, pool: Connections, one: httpx.AsyncHTTPTransport, body: httpx.AsyncByteStream
    ) -> None:
        self._pool, self._one, self._body = pool, one, body
        self._is_open = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._body:
            yield part

    async def aclose(self) -> None:
        if self._is_open:
            self._is_open = False
            try:
                await self._body.aclose()
            finally:
                await self._pool._release(self._one)


def _usual() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)
