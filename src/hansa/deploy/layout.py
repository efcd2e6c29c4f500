"""What ``hansa deploy init`` writes: a folder for every party, and one README for all of them."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from hansa.deploy.certificates import (
    LOOPBACK,
    LOOPBACK_DAYS,
    write_authority,
    write_node_key,
    write_server,
)
from hansa.deploy.charter import FILE, Charter
from hansa.deploy.holding import ruled
from hansa.deploy.options import Deployment, ServerOptions, charter_of, check_together
from hansa.deploy.party import Party, Server, Upward
from hansa.errors import InputError
from hansa.federation.tree import ROOT, name_of
from hansa.files import write_atomic

_INNER = 2000  # between a server's port and that of its SuperLink
_RUNTIME = 1000  # between a server's port and the first of its members' runtime ports
_TEXTS = Environment(  # nosec B701 # see autoescape
    loader=PackageLoader("hansa.deploy"),
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,  # noqa: S701 the texts are shell, TOML, YAML and Markdown, for no browser
)


def init(deployment: Deployment, folder: Path) -> list[Path]:
    """Write the folders of all parties.

    Args:
        deployment: what to write.
        folder: a new folder, or an empty one.

    Returns:
        The parties' folders, federations before their members.

    Raises:
        InputError: the folder holds something, or a method or model does not fit.
    """
    _check_new(folder)
    charters = {path: charter_of(deployment, path) for path in deployment.servers}
    for path, charter in charters.items():
        if path != ROOT:
            check_together(charters[path.rpartition("/")[0]], charter)
    for path, rules in deployment.rules.items():
        if deployment.trains(path):
            trained_in = path if path in charters else path.rpartition("/")[0]
            ruled(charters[trained_in], path, rules, f"{deployment.key(path)}.")
    try:
        paths = list(deployment.tree.walk())
        for number, path in enumerate(paths):
            _party(deployment, charters, folder / name_of(path), path, number)
        parties = [folder / name_of(path) for path in paths]
        _text(folder / "README.md", "README.md", _facts(deployment, parties))
        _text(folder / "compose.yaml", "compose.yaml", {"parties": [p.name for p in parties]})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # all of it, or nothing
        raise
    return parties


def write_app(deployment: Deployment, folder: Path) -> int:
    """Write a Flower app for a simulation, with all clients as nodes of one server.

    Returns:
        The number of nodes.

    Raises:
        InputError: the folder holds something, a client has data elsewhere, or a method or model
            does not fit.
    """
    _check_new(folder)
    if deployment.texts:
        found = "nodes with text"
        raise InputError("nodes", found, "images; texts by `hansa train CONFIG --engine flower`")
    if deployment.rules:
        key = f"{deployment.key(min(deployment.rules))}.privacy"
        raise InputError(key, "private nodes", "none, to simulate an app")
    for name, party in deployment.options.parties.items():
        if party.data is not None:
            raise InputError(f"deploy.parties.{name}.data", "data of its own", "none, to simulate")
    leaves = tuple(deployment.tree.leaves())
    charter = charter_of(deployment, ROOT)
    output = str(folder.resolve() / "results")
    config = charter.config.model_copy(update={"output": output})
    _app(folder, replace(charter, config=config, children=leaves, clients=leaves))
    return len(leaves)


def _check_new(folder: Path) -> None:
    """Refuse a folder in which something is.

    Raises:
        InputError: it is.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(str(folder), "something there already", "a new folder")


def _party(
    deployment: Deployment,
    charters: Mapping[str, Charter],
    folder: Path,
    path: str,
    number: int,
) -> None:
    """Write one party's folder; its federation's is there already."""
    folder.mkdir(parents=True, mode=0o700)
    server, upward = None, None
    if path in charters:
        options = deployment.servers[path]
        server = Server(
            host=options.host,
            port=_set(options.port),
            inner_port=_set(options.port) + _INNER,
            deadline=_set(options.deadline),
            wait=options.wait,
            bind="127.0.0.1" if options.host in ("127.0.0.1", "localhost") else "0.0.0.0",  # noqa: S104 # nosec B104 # members call from elsewhere
        )
        write_authority(folder / "tls", charters[path].name)
        write_server(folder / "tls", options.host)
        write_authority(folder / "tls", "loopback", LOOPBACK_DAYS, LOOPBACK)
        write_server(folder / "tls", "localhost", LOOPBACK_DAYS, LOOPBACK)
        _app(folder / "app", charters[path])
        (folder / "keys").mkdir()
    if path != ROOT:
        above = path.rpartition("/")[0]
        options = deployment.servers[above]
        upward = Upward(
            superlink=f"{options.host}:{options.port}",
            patience=_patience(deployment.servers, path, above),
            runtime_port=_set(deployment.servers[ROOT].port) + _RUNTIME + number,
            look=options.look,
        )
        public = write_node_key(folder / "member" / "node.key")
        parent = folder.parent / name_of(above)
        (parent / "keys" / f"{folder.name}.pub").write_text(f"{public} {folder.name}\n")
        shutil.copy(parent / "tls" / "ca.crt", folder / "member" / "superlink-ca.crt")
    party = deployment.options.parties.get(name_of(path))
    own = deployment.rules.get(path)
    if own is not None and not deployment.trains(path):
        own = own.model_copy(update={"privacy": None})  # handed down already
    Party(
        path=path,
        server=server,
        upward=upward,
        data=party.data if party else None,
        text=deployment.texts.get(path),
        rules=own.model_dump(mode="json", exclude_none=True) or None if own else None,
    ).write(folder)
    facts = {"name": folder.name, "folder": str(folder.resolve())}
    for target, template in (
        ("start.sh", "start.sh"),
        (f"hansa-{folder.name}.service", "service"),
        ("compose.yaml", "party-compose.yaml"),
    ):
        _text(folder / target, template, facts)
    (folder / "start.sh").chmod(0o755)


def _app(folder: Path, charter: Charter) -> None:
    """Write a federation's Flower app."""
    folder.mkdir(parents=True)
    charter.write(folder / FILE)
    _text(folder / "pyproject.toml", "pyproject.toml", {})
    _text(folder / "app.py", "app.py", {})


def _patience(servers: Mapping[str, ServerOptions], path: str, above: str) -> float:
    """Return a member's time, between its own federation's deadline and that of the one above."""
    limit = _set(servers[above].deadline)
    below = _set(servers[path].deadline) if path in servers else limit
    return (below + limit) / 2


def _set(value: int | float | None) -> int | float:
    assert value is not None  # noqa: S101 `read_deployment` leaves nothing open
    return value


def _facts(deployment: Deployment, parties: list[Path]) -> dict[str, object]:
    return {
        "name": deployment.configs[ROOT].name,
        "parties": [party.name for party in parties],
        "servers": {
            name_of(path): f"{server.host}:{server.port}"
            for path, server in deployment.servers.items()
        },
    }


def _text(path: Path, template: str, facts: Mapping[str, object]) -> None:
    write_atomic(path, _TEXTS.get_template(f"{template}.j2").render(**facts))
