"""What goes through the proxy: requests to the service, and its answers on their way back."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
from starlette.requests import Request
from starlette.types import Send

Headers = list[tuple[bytes, bytes]]
_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)


class Broken(Exception):  # noqa: N818 (the service's half of an answer, no error here)
    """The service stopped in the middle of a body."""


class Answer:
    """The service's answer on its way to the application."""

    def __init__(self, request: Request, response: httpx.Response, send: Send) -> None:
        self.request, self.response = request, response
        self.send, self.is_begun = send, False
        self._parts = self._raw()

    async def read(self, largest: int) -> tuple[bytes, bool]:
        """Return the body as it is sent, and whether that is all of it: no more than needed."""
        length = self.response.headers.get("content-length", "")
        if length.isdigit() and int(length) > largest:
            return b"", False
        body = bytearray()
        async for part in self._parts:
            body += part
            if len(body) > largest:
                return bytes(body), False
        return bytes(body), True

    async def whole(self, body: bytes) -> None:
        """Send another body, with its own length."""
        await self._start(self._headers(length=len(body)))
        await self.send({"type": "http.response.body", "body": body})

    async def stream(self, read: bytes = b"", drop: tuple[bytes, ...] = ()) -> None:
        """Send the answer as it comes, after what was read of it; end when nobody listens."""
        await self._start([each for each in self._headers() if each[0].lower() not in drop])
        if self.response.headers.get("content-length", "").isdigit():
            await self._pour(read)
            return
        pouring = asyncio.ensure_future(self._pour(read))
        leaving = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait((pouring, leaving), return_when=asyncio.FIRST_COMPLETED)
            if pouring.done():
                pouring.result()
        finally:
            pouring.cancel()
            leaving.cancel()
            await asyncio.gather(pouring, leaving, return_exceptions=True)

    async def _start(self, headers: Headers) -> None:
        self.is_begun = True
        start = {"status": self.response.status_code, "headers": headers}
        await self.send({"type": "http.response.start", **start})

    async def _pour(self, read: bytes) -> None:
        if read:
            await self.send({"type": "http.response.body", "body": read, "more_body": True})
        async for part in self._parts:
            await self.send({"type": "http.response.body", "body": part, "more_body": True})
        await self.send({"type": "http.response.body", "body": b""})

    async def _raw(self) -> AsyncIterator[bytes]:
        assert isinstance(self.response.stream, httpx.AsyncByteStream)  # noqa: S101
        try:
            async for part in self.response.stream:
                yield part
        except httpx.TransportError as error:
            raise Broken(type(error).__name__) from error

    async def _gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def _headers(self, length: int | None = None) -> Headers:
        is_empty = self.response.status_code in (204, 304)
        headers: Headers = []
        for name, value in end_to_end(self.response.headers.raw):
            if name.lower() != b"content-length" or (length is None and not is_empty):
                headers.append((name, value))
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        return headers


class Upload(httpx.AsyncByteStream):
    """The body of a request, passed on as it comes."""

    def __init__(self, request: Request) -> None:
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._request.stream():
            if part:
                yield part


def host_of(header: str) -> str:
    """Return the name in a ``Host``."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


def end_to_end(headers: Any) -> Headers:
    """Return headers without those that are for one connection alone."""
    named = {
        part.strip().lower()
        for name, value in headers
        if name.lower() == b"connection"
        for part in value.split(b",")
    }
    return [(n, v) for n, v in headers if n.lower() not in _HOP and n.lower() not in named]
