"""The door of a federation: ``python -m hansa.deploy.gate FOLDER`` lets members in, nobody else.

Flower's SuperLink has one port for its members, who show a key, and for those who start runs and
register keys, who show nothing. So it listens on the loopback alone, and this forwards from the
federation's port what members have to say, and only that.
"""

import sys
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from hansa.deploy.party import Party
from hansa.errors import InputError

MEMBERS = "/v1/fleet/"
"""What a SuperNode calls. Every call there carries the time, signed with the node's key, which says
who calls; what is said is not signed, and rests on TLS."""
_HOP = {"connection", "host", "content-length", "transfer-encoding", "keep-alive", "te", "upgrade"}
_PATIENCE = 60.0  # seconds that the SuperLink has to answer
_LARGEST = 64 << 20  # bytes of one call; Flower sends 5 MB at a time


def gate(client: httpx.AsyncClient) -> Starlette:
    """Return the application.

    Args:
        client: reaches the SuperLink.
    """

    async def forward(request: Request) -> Response:
        # As sent, not as decoded: what is checked is what is forwarded.
        path = request.scope["raw_path"].decode("ascii", "replace")
        if not path.startswith(MEMBERS) or ".." in path or "%" in path:
            return PlainTextResponse("for members only", 403)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > _LARGEST:
                return PlainTextResponse("too large", 413)
        headers = [(k, v) for k, v in request.headers.items() if k not in _HOP]
        try:
            answer = await client.request(
                request.method, path, headers=headers, content=bytes(body)
            )
        except httpx.HTTPError as error:
            return PlainTextResponse(f"no SuperLink: {type(error).__name__}", 503)
        kept = {k: v for k, v in answer.headers.items() if k not in _HOP | {"content-encoding"}}
        return Response(answer.content, answer.status_code, kept)

    methods = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]
    return Starlette(routes=[Route("/{path:path}", forward, methods=methods)])


def main(folder: Path) -> None:
    """Serve until the process is ended.

    Raises:
        InputError: the party has no server.
    """
    server = Party.read(folder).server
    if server is None:
        raise InputError(str(folder), "a party without [server]", "that of a federation")
    tls = folder / "tls"
    client = httpx.AsyncClient(
        base_url=f"https://127.0.0.1:{server.inner_port}",
        verify=str(tls / "loopback-ca.crt"),
        timeout=_PATIENCE,
        limits=httpx.Limits(max_connections=None),
    )
    uvicorn.run(
        gate(client),
        host=server.bind,
        port=server.port,
        ssl_certfile=str(tls / "server.crt"),
        ssl_keyfile=str(tls / "server.key"),
        log_level="warning",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
