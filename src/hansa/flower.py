"""Hansa's methods in Flower apps.

``strategy`` and ``client_app`` are for an app of one's own, ``secure_apps`` makes one whose server
sees no single update, ``apps`` one of a federation's
settings, as ``hansa deploy`` writes them. PyTorch is imported where it is needed: Flower starts a
process for every message, and a member's only passes it on to one that stays.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hansa.deploy.mailbox import Mailbox
from hansa.deploy.party import VARIABLE, Party, Server, tell
from hansa.errors import InputError
from hansa.federation.engines.flower.apps import (
    Answering,
    ClientApp,
    Context,
    Grid,
    ServerApp,
    server_app,
)
from hansa.federation.engines.flower.apps import client_app as _client_app
from hansa.federation.engines.flower.exchange import Answer, Request

if TYPE_CHECKING:
    from hansa.deploy.charter import Charter
    from hansa.deploy.holding import Holding
    from hansa.federation.engines.flower.secure import SecureOptions, secure_apps
    from hansa.federation.engines.flower.strategy import HansaStrategy as strategy  # noqa: N813
    from hansa.federation.engines.flower.strategy import node_app as client_app

__all__ = ["SecureOptions", "apps", "client_app", "secure_apps", "strategy"]
_HELLO = 60.0  # seconds that what stays has to say that it is there


def __getattr__(name: str) -> Any:
    if name in ("secure_apps", "SecureOptions"):
        from hansa.federation.engines.flower import secure

        return getattr(secure, name)
    if name not in ("strategy", "client_app"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hansa.federation.engines.flower import strategy as module

    return module.HansaStrategy if name == "strategy" else module.node_app


class Apps(NamedTuple):
    """The two apps of a federation."""

    server: ServerApp
    client: ClientApp


def apps(path: str | Path) -> Apps:
    """Return the apps of a federation, for its server and for its members.

    In a deployment the environment names the party's folder; without one the nodes are simulated,
    and results lie in the folder that the settings name as ``output``.

    Args:
        path: the federation's settings, ``federation.toml``.
    """
    settings = Path(path)

    def lead(grid: Grid) -> None:
        folder = Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None
        if folder is not None:  # at once: of a run that tells nothing another one is started
            tell(folder, "run", state="starting", what="", pid=os.getpid())
        from hansa.deploy.charter import Charter
        from hansa.deploy.serve import serve

        try:
            charter = Charter.read(settings)
            if folder is None:
                folder = Path(charter.config.output)
                folder.mkdir(parents=True, exist_ok=True)
            server, keys, holding = _server(charter, folder)
            serve(charter, server, folder, grid, keys, holding)
        except InputError as error:
            if folder is not None:
                tell(folder, "run", state="failed", what=str(error), pid=os.getpid())
            raise

    def site(context: Context) -> Answering:
        if VARIABLE in os.environ:
            return _passing_on(Path(os.environ[VARIABLE]), settings)
        from hansa.deploy.charter import Charter
        from hansa.deploy.holding import Holding
        from hansa.deploy.member import ClientSite

        charter = Charter.read(settings)
        member = charter.children[int(context.node_config["partition-id"])]
        folder = Path(charter.config.output) / "state" / member
        return ClientSite(charter, Holding(member, folder)).answer

    return Apps(server_app(lead), _client_app(site))


def _server(
    charter: "Charter", folder: Path
) -> tuple[Server, Mapping[bytes, str] | None, "Holding | None"]:
    """Return a server's settings, its members' keys and what it holds; a simulation has neither."""
    from hansa.deploy.certificates import public_key
    from hansa.deploy.holding import Holding
    from hansa.federation.tree import name_of

    if VARIABLE not in os.environ:
        return Server(host="", port=1, inner_port=1, deadline=3600.0, wait=300.0), None, None
    party = Party.read(folder)
    if party.server is None:
        raise InputError(str(folder), "a party without [server]", "that of a federation")
    keys = {public_key(folder / "keys" / f"{name_of(p)}.pub"): p for p in charter.children}
    return party.server, keys, Holding.of(party, folder)


def _passing_on(folder: Path, settings: Path) -> Answering:
    """Return what passes requests on: to a client's worker, or to the federation below."""
    party, mailbox = Party.read(folder), Mailbox(folder / "mailbox")
    patience = party.upward.patience if party.upward else _HELLO

    def answer(request: Request) -> Answer:
        if party.server is None:
            mailbox.hand_out(settings)
        seconds = min(patience, _HELLO) if request.kind == "hello" else patience
        reply = mailbox.ask(request, seconds)
        if reply is None:
            late = f"no answer within {seconds:g} s"
            return Answer(party.path, request.round, "refused", late)
        return reply

    return answer
