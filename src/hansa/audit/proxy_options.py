"""What the proxy may be told, and what it refuses."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from hansa.audit.redact import Redactor
from hansa.audit.urls import web_url
from hansa.errors import InputError

Over = Literal["pass", "refuse"]
OVER: tuple[Over, ...] = get_args(Over)
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Upstream:
    """The service that the proxy stands before.

    Attributes:
        scheme: http or https.
        host: its name or address.
        port: its port.
        base: what its paths begin with, such as ``/v1``; empty where they begin with nothing.
    """

    scheme: str
    host: str
    port: int
    base: str = ""

    @property
    def origin(self) -> str:
        """Scheme, host and, where it is not the usual one, port: all that may be shown."""
        return f"{self.scheme}://{self.authority}"

    @property
    def authority(self) -> str:
        """What ``Host`` says."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == _PORTS[self.scheme] else f"{name}:{self.port}"


@dataclass(frozen=True)
class ProxyOptions:
    """How the proxy behaves.

    Attributes:
        minutes: how long it works; then it answers 503, and ends.
        largest: bytes of a body, with and without its encoding, that it holds in order to edit it.
        over: what becomes of a larger one that a rule is for: ``pass`` as it is, or ``refuse``.
        patience: seconds that the service has for a connection, and for each piece of an answer.
        grace: seconds for which it answers 503 before it ends.
    """

    minutes: float = 60.0
    largest: int = 8 << 20
    over: Over = "pass"
    patience: float = 60.0
    grace: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 24 * 60:
            raise InputError("--minutes", self.minutes, "more than 0, at most a day (1440)")
        if self.largest < 1:
            raise InputError("--largest", self.largest, "at least a byte")
        if self.over not in OVER:
            raise InputError("--over", repr(self.over), ", ".join(OVER))
        if not self.patience > 0:
            raise InputError("--patience", self.patience, "more than 0 seconds")


def upstream_of(url: str, hosts: Sequence[str] = ()) -> Upstream:
    """Return the service of a URL.

    Args:
        url: such as ``https://api.example.com/v1``.
        hosts: hosts that the proxy may speak to beside those of this machine.

    Raises:
        InputError: a URL that is none, or holds more than a place; a host that is not listed.
    """
    parts = web_url(url)
    if parts is None:
        raise InputError("--upstream", repr(Redactor().text(url)), "http:// or https:// and a host")
    scheme, host, port = parts.scheme, parts.hostname or "", parts.port
    if parts.username is not None or parts.query or parts.fragment:
        found = f"{host} with a user, a query or a fragment"
        raise InputError("--upstream", found, "a base URL alone; the application adds the rest")
    if not is_loopback(host) and host not in {each.lower() for each in hosts}:
        allowed = ", ".join((*hosts, "hosts of this machine"))
        raise InputError("--upstream", f"{host}, which is not listed", f"{allowed}, --allow HOST")
    return Upstream(scheme, host, port or _PORTS[scheme], parts.path.rstrip("/"))


def is_loopback(host: str) -> bool:
    """Tell whether a name or an address is this machine's own and no other's."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(host: str, off_loopback: bool) -> None:
    """Refuse an address that others can reach.

    Raises:
        InputError: it is one, and nothing says that this is meant; or it is no address.
    """
    if is_loopback(host):
        return
    try:
        ipaddress.ip_address(host)
    except ValueError as error:
        raise InputError("--host", repr(host), "an address such as 127.0.0.1") from error
    if not off_loopback:
        allowed = "an address of the loopback, or --off-loopback with it"
        raise InputError("--host", f"{host}, which others can reach", allowed)
