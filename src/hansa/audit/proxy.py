"""The tamper proxy: a reverse proxy between one's own application and a service that it calls.

The application's base URL points here. Responses on routes that a rule of the plan is for are
edited; all others pass byte by byte, with their encoding and their end-to-end headers.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from hansa.audit.coding import TooLarge, acceptable, decode, encode, encodings, known
from hansa.audit.connections import Connections
from hansa.audit.inplace import edited
from hansa.audit.plan import Plan
from hansa.audit.proxy_log import Asked, ProxyLog
from hansa.audit.proxy_options import ProxyOptions, Upstream, is_loopback
from hansa.audit.proxy_traffic import (
    Answer,
    Broken,
    Headers,
    Upload,
    end_to_end,
    host_of,
)
from hansa.audit.tamper import Edit, decoded, digest
from hansa.errors import InputError

logger = logging.getLogger(__name__)

_JSON = ("json", "text/plain", "text/javascript")
"""What a type of content holds where its body may be JSON."""
_AGAIN = ("GET", "HEAD", "OPTIONS")
_THREAD = 1 << 18
"""Bytes from which on an edit is made in a thread, so that other connections do not wait."""
_CONNECT = 10.0  # seconds, at most


class Proxy:
    """An ASGI application.

    Args:
        upstream: the service.
        plan: what is edited.
        log: where edits are written down.
        options: limits.
        hosts: names under which applications may ask for the service, beside those of this machine;
            None for any.
        expired: tells whether its time is over.
        transport: reaches the service; ``Connections()`` by default.
    """

    def __init__(
        self,
        upstream: Upstream,
        plan: Plan,
        log: ProxyLog,
        *,
        options: ProxyOptions | None = None,
        hosts: tuple[str, ...] | None = (),
        expired: Callable[[], bool] = lambda: False,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.upstream, self.plan, self.log = upstream, plan, log
        self.options = options or ProxyOptions()
        self.expired = expired
        self._hosts = hosts
        self._transport = transport or Connections()
        self._url = httpx.URL(f"{upstream.origin}/")
        self._warned: set[str] = set()

    async def aclose(self) -> None:
        """Close what reaches the service."""
        await self._transport.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        query = scope["query_string"].decode("latin-1")
        asked = Asked(request.method, scope["path"], query, request.headers)
        if refusal := self._refusal(request):
            await refusal(scope, receive, send)
            return
        is_touched = self.plan.touches(scope["path"])
        try:
            response = await self._ask(request, is_touched)
        except httpx.TransportError as error:
            status = 504 if isinstance(error, httpx.TimeoutException) else 502
            what = f"no answer from {self.upstream.origin} ({type(error).__name__})"
            self.log.failed(asked, what)
            await PlainTextResponse(f"{what}\n", status)(scope, receive, send)
            return
        except ClientDisconnect:
            return
        answer = Answer(request, response, send)
        try:
            if is_touched:
                await self._edit(asked, answer)
            else:
                self.log.other()
                await answer.stream()
        except Broken as error:
            what = f"{self.upstream.origin} broke off ({error})"
            self.log.failed(asked, what)
            if not answer.is_begun:
                await PlainTextResponse(f"{what}\n", 502)(scope, receive, send)
            # Otherwise nothing more is sent, and the application sees that a part is missing.
        finally:
            await response.aclose()

    def _refusal(self, request: Request) -> PlainTextResponse | None:
        if self.expired():
            text = "the time of this proxy is over\n"
            return PlainTextResponse(text, 503, {"connection": "close"})
        host = host_of(request.headers.get("host", "localhost"))
        is_own = self._hosts is None or is_loopback(host) or host in self._hosts
        if request.method == "CONNECT" or not is_own:
            self.log.counts["refused"] += 1
            return PlainTextResponse("a host that is not listed\n", 421)
        return None

    async def _ask(self, request: Request, is_touched: bool) -> httpx.Response:
        """Return the service's answer to a request, its body not yet read."""
        sent = request.scope["headers"]
        has_body = any(name in (b"content-length", b"transfer-encoding") for name, _ in sent)
        headers: Headers = [(b"host", self.upstream.authority.encode())]
        for name, value in end_to_end(sent):
            if name in (b"host", b"expect"):
                continue
            if name == b"accept-encoding" and is_touched:
                value = acceptable(value.decode("latin-1")).encode("latin-1")
            headers.append((name, value))
        if any(name == b"transfer-encoding" for name, _ in sent):
            headers = [each for each in headers if each[0] != b"content-length"]
            headers.append((b"transfer-encoding", b"chunked"))
        target = self.upstream.base.encode() + request.scope["raw_path"]
        if query := request.scope["query_string"]:
            target += b"?" + query
        patience = self.options.patience
        timeout = dict.fromkeys(("read", "write"), patience)
        timeout |= {"connect": min(patience, _CONNECT), "pool": None}  # type: ignore[dict-item]
        attempts = 2 if request.method in _AGAIN and not has_body else 1
        for attempt in range(attempts):
            try:
                return await self._transport.handle_async_request(
                    httpx.Request(
                        request.method,
                        self._url,
                        headers=headers,
                        stream=Upload(request) if has_body else httpx.ByteStream(b""),
                        # As sent: what the application asks for is what the service is asked.
                        extensions={"target": target, "timeout": timeout},
                    )
                )
            except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
                # A kept connection that the service closed meanwhile; a new one is not.
                if attempt + 1 == attempts:
                    raise
        raise AssertionError

    async def _edit(self, asked: Asked, answer: Answer) -> None:
        """Send an answer that a rule is for: edited, or as it came where that cannot be done."""
        status = answer.response.status_code
        if asked.method == "HEAD":
            # How long the body would be after the edit, nobody knows.
            self.log.passed(asked, status, "an answer without a body")
            await answer.stream(drop=(b"content-length",))
            return
        if reason := _unfit(answer.response):
            self._pass(asked, status, reason)
            await answer.stream()
            return
        names = encodings(answer.response.headers.get("content-encoding", ""))
        body, is_whole = await answer.read(self.options.largest)
        try:
            if not is_whole:
                raise TooLarge
            decoded_body = decode(body, names, self.options.largest)
            made, edits = await self._tampered(asked, decoded_body)
        except TooLarge:
            await self._over(asked, answer, body)
            return
        except InputError as error:
            # Other errors say what stood in the body.
            reason = str(error.found) if error.key == "path" else "not what a rule can edit"
            self._pass(asked, status, reason)
            await answer.stream(body)
            return
        except ValueError:
            self._pass(asked, status, f"no {', '.join(names)} body")
            await answer.stream(body)
            return
        before, after = digest(decoded_body), digest(made)
        self.log.edited(
            asked, status=status, edits=edits, before=before, after=after, seed=self.plan.seed
        )
        await answer.whole(encode(made, names, body))

    async def _tampered(self, asked: Asked, body: bytes) -> tuple[bytes, tuple[Edit, ...]]:
        """Return a body with the plan's edits, which depend on the seed and the body alone."""

        def make() -> tuple[bytes, tuple[Edit, ...]]:
            made = self.plan.apply(decoded(body), asked.route, digest(body))
            return edited(body, made.edits), made.edits

        return await asyncio.to_thread(make) if len(body) > _THREAD else make()

    async def _over(self, asked: Asked, answer: Answer, body: bytes) -> None:
        reason = f"a body of more than {self.options.largest} bytes"
        if self.options.over == "refuse":
            self.log.refused(asked, reason)
            other = PlainTextResponse(f"{reason}\n", 502)
            await other(answer.request.scope, answer.request.receive, answer.send)
        else:
            self._pass(asked, answer.response.status_code, reason)
            await answer.stream(body)

    def _pass(self, asked: Asked, status: int, reason: str) -> None:
        self.log.passed(asked, status, reason)
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning("passed without an edit: %s", reason)


def _unfit(response: httpx.Response) -> str:
    """Return why an answer cannot be edited, nothing where it may be."""
    headers: Mapping[str, str] = response.headers
    status = response.status_code
    if not 200 <= status < 300 or status in (204, 206):
        return f"status {status}"
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and not any(part in kind for part in _JSON):
        return f"content of type {kind}"
    unknown = set(encodings(headers.get("content-encoding", ""))) - set(known())
    return f"encoded as {', '.join(sorted(unknown))}" if unknown else ""
