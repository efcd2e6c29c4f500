"""``hansa audit proxy``: the tamper proxy between one's own application and a service."""

import json
import logging
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from hansa.errors import InputError


def proxy(
    plan: Annotated[Path, typer.Argument(help="What to edit, in TOML or JSON.")],
    upstream: Annotated[str, typer.Option(help="The service: https://api.example.com/v1")],
    allow: Annotated[
        list[str] | None, typer.Option(help="A host beside this machine that it may speak to.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen at; 0 for any.")] = 8765,
    off_loopback: Annotated[
        bool, typer.Option("--off-loopback", help="Let --host be one that others can reach.")
    ] = False,
    minutes: Annotated[float, typer.Option(help="How long it works before it ends.")] = 60.0,
    log: Annotated[Path, typer.Option(help="File for a line an edit.")] = Path("audit-proxy.jsonl"),
    largest: Annotated[int, typer.Option(help="Bytes of the largest body that is edited.")] = 8
    << 20,
    over: Annotated[str, typer.Option(help="A larger one: pass or refuse.")] = "pass",
    patience: Annotated[float, typer.Option(help="Seconds that the service has.")] = 60.0,
    sample: Annotated[
        Path | None, typer.Option(help="A response to check the plan's paths against.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(help="Certificates that the service's own is signed with.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON, a line an event.")] = False,
) -> None:
    """Stand between your own application and a service, and edit responses by a plan.

    The application's base URL is the address that is printed. TLS is not intercepted. Ctrl-C ends
    it, and so does the end of its time.
    """
    try:
        from hansa.audit import proxy_server
        from hansa.audit.connections import Connections
        from hansa.audit.proxy import Proxy
    except ImportError as error:
        found = f"no library {(error.name or '').partition('.')[0]!r}"
        raise InputError("audit proxy", found, "pip install hansa[audit]") from error
    from hansa.audit.plan import read_plan
    from hansa.audit.proxy_log import ProxyLog
    from hansa.audit.proxy_options import ProxyOptions, upstream_of
    from hansa.audit.redact import Hide, Redactor

    options = ProxyOptions(minutes, largest, over, patience)  # type: ignore[arg-type]
    service, tampering = upstream_of(upstream, allow or ()), read_plan(plan)
    if sample is not None:
        tampering.check(_document(sample))
    redactor, transport = Redactor(), Connections(ca)
    with proxy_server.bind(host, port, off_loopback) as listening:
        proxy_server.check_no_loop(service, listening)
        deadline = proxy_server.Deadline(60 * options.minutes)
        written = ProxyLog(log, redactor)
        made = Proxy(
            service,
            tampering,
            written,
            options=options,
            hosts=None if off_loopback else tuple(allow or ()),
            expired=deadline.passed,
            transport=transport,
        )
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("hansa: %(message)s"))
        handler.addFilter(Hide(redactor))
        logger = logging.getLogger("hansa.audit.proxy")
        logger.addHandler(handler)
        url = proxy_server.address(listening)
        until = datetime.now() + timedelta(minutes=options.minutes)

        def ready() -> None:
            about = {"url": url, "upstream": service.origin, "until": f"{until:%Y-%m-%d %H:%M:%S}"}
            routes = sorted({rule.route for rule in tampering.rules})
            text = (
                f"listening at {url} for {service.origin}{service.base} until {until:%H:%M:%S}; "
                f"{len(tampering.rules)} rules on {', '.join(routes)}; Ctrl-C ends it"
            )
            _tell(about, text, json_)

        try:
            is_over = proxy_server.serve(made, listening, deadline, ready)
        finally:
            logger.removeHandler(handler)
            written.close()
    counts = {
        key: written.counts[key] for key in ("edited", "passed", "refused", "failed", "other")
    }
    text = (
        f"{'its time is over' if is_over else 'ended'}: {counts['edited']} responses edited, "
        f"{counts['passed']} passed though a rule is for them, {counts['refused']} refused, "
        f"{counts['failed']} failed, {counts['other']} others passed; log: {log}"
    )
    _tell({"ended": "time" if is_over else "signal", **counts, "log": str(log)}, text, json_)


def _document(path: Path) -> Any:
    from hansa.audit.tamper import decoded

    try:
        body = path.read_bytes()
    except OSError as error:
        raise InputError("--sample", f"{path} ({error.strerror})", "a file") from error
    return decoded(body, str(path))


def _tell(values: dict[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(values) if as_json else text, flush=True)
