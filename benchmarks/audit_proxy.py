"""What the tamper proxy costs on loopback: milliseconds of a request, and many connections at once.

    python benchmarks/audit_proxy.py [--json] [--requests 2000] [--connections 200] [--turns 25]

Service, proxy and client are three processes of one machine. Requests go in turn directly and
through the proxy, over one kept connection each, so that both meet the same load; the overhead is
the difference of the two requests of a pair. Every response is compared with what it should be.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from hansa.audit.domains import domain
from hansa.audit.inplace import edited
from hansa.audit.plan import read_plan
from hansa.audit.tamper import encoded

PLAN = """seed = 1
[[tamper]]
route = "/v1/*"
action = "shift"
path = "current.temp_c"
by = 7
unit = "c"
follow = {"current.temp_f" = "f"}
"""
BODY = encoded(domain("weather").cases[0].document)
ROUTES = {"edited": "/v1/current.json?q=Here", "untouched": "/v2/current.json?q=Here"}


def overhead(requests: int = 1000) -> dict[str, float]:
    """Return the overhead of an edited response against a direct connection.

    Args:
        requests: pairs of requests that are timed.

    Returns:
        ``p50`` and ``p95`` over the pairs, in milliseconds.
    """
    with running() as (service, proxy):
        return timed(service, proxy, "edited", requests)["overhead"]


def timed(service: int, proxy: int, what: str, requests: int) -> dict[str, dict[str, float]]:
    """Return percentiles in milliseconds: direct, through the proxy, and of the difference."""
    connections = [HTTPConnection("127.0.0.1", port, timeout=30) for port in (service, proxy)]
    wanted = (BODY, false_body() if what == "edited" else BODY)
    taken: list[list[float]] = [[], []]
    order = random.Random(0)  # noqa: S311 (no secret is drawn)
    for turn in range(requests + 50):
        for which in order.sample((0, 1), 2):
            start = time.perf_counter()
            connections[which].request("GET", ROUTES[what])
            body = connections[which].getresponse().read()
            seconds = time.perf_counter() - start
            if body != wanted[which]:
                raise RuntimeError(f"another body than expected: {body[:80]!r}")
            if turn >= 50:  # the first ones warm up
                taken[which].append(1000 * seconds)
    for connection in connections:
        connection.close()
    differences = [b - a for a, b in zip(*taken, strict=True)]
    names = ("direct", "proxy", "overhead")
    return {n: percentiles(v) for n, v in zip(names, (*taken, differences), strict=True)}


def false_body() -> bytes:
    """Return the body that the plan makes."""
    return edited(BODY, read_plan(tomllib.loads(PLAN)).apply(json.loads(BODY)).edits)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the 95th percentile."""
    ordered = sorted(values)
    return {f"p{share}": ordered[round(share / 100 * (len(ordered) - 1))] for share in (50, 95)}


def crowd(proxy: int, connections: int, turns: int) -> dict[str, Any]:
    """Return what came of many kept connections at once, each with so many requests in turn."""
    taken: list[float] = []
    errors: list[str] = []

    async def client(number: int) -> None:
        what = ("edited", "untouched")[number % 2]
        wanted = false_body() if what == "edited" else BODY
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy)
            for _ in range(turns):
                start = time.perf_counter()
                writer.write(f"GET {ROUTES[what]} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split()[0])
                body = await reader.readexactly(length)
                taken.append(1000 * (time.perf_counter() - start))
                if not head.startswith(b"HTTP/1.1 200 ") or body != wanted:
                    errors.append(head.decode("latin-1").splitlines()[0])
            writer.close()
        except (OSError, EOFError, ValueError) as error:
            errors.append(repr(error))

    async def run() -> None:
        await asyncio.gather(*(client(number) for number in range(connections)))

    start = time.perf_counter()
    asyncio.run(run())
    seconds = time.perf_counter() - start
    return {
        "connections": connections,
        "requests": len(taken),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "requests_per_second": len(taken) / seconds,
        **percentiles(taken or [float("nan")]),
    }


@contextmanager
def running() -> Iterator[tuple[int, int]]:
    """Run a service and the proxy before it; give their ports."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "plan.toml").write_text(PLAN)
        service = _start([str(Path(__file__).resolve()), "--serve"], folder)
        try:
            port = int(_line(service))
            upstream = f"http://127.0.0.1:{port}"
            command = ["-c", "from hansa.cli import main; main()", "audit", "proxy", "plan.toml"]
            options = ["--upstream", upstream, "--port", "0", "--log", "log.jsonl", "--json"]
            proxy = _start([*command, *options], folder)
            try:
                yield port, int(json.loads(_line(proxy))["url"].rpartition(":")[2])
            finally:
                proxy.terminate()
                proxy.wait()
        finally:
            service.terminate()
            service.wait()


def _start(arguments: list[str], folder: str) -> subprocess.Popen[str]:
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None  # noqa: S101
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a process ended before it was ready")
    return line


async def _serve() -> None:
    """Serve the body at any path: no framework, so that the service costs next to nothing."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}\r\n"
    answer = head.encode() + b"\r\n" + BODY

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
        except (EOFError, OSError):
            writer.close()

    server = await asyncio.start_server(answers, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(_serve())
        return
    with running() as (service, proxy):
        found: dict[str, Any] = {
            name: timed(service, proxy, name, given.requests) for name in ROUTES
        }
        found["crowd"] = crowd(proxy, given.connections, given.turns)
    if given.json:
        print(json.dumps(found))
        return
    for name in ROUTES:
        for which, row in found[name].items():
            print(f"{name:<10} {which:<9} p50 {row['p50']:.2f} ms, p95 {row['p95']:.2f} ms")
    row = found["crowd"]
    print(
        f"{row['connections']} connections, {row['requests']} requests, {row['errors']} errors: "
        f"{row['requests_per_second']:.0f} a second, p50 {row['p50']:.0f} ms, p95 "
        f"{row['p95']:.0f} ms"
    )


if __name__ == "__main__":
    main()
