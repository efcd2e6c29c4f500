"""The methods, one file each, and the registry by which a configuration names them."""

import inspect

from hansa.classes import import_class
from hansa.errors import InputError
from hansa.federation.methods.base import Method
from hansa.federation.methods.centralised import Centralised
from hansa.federation.methods.controls import HeadMask, LeastChange, RandomMask
from hansa.federation.methods.diloco import DiLoCo
from hansa.federation.methods.ditto import Ditto
from hansa.federation.methods.fedavg import FedAvg
from hansa.federation.methods.fedavg_tuned import FedAvgTuned
from hansa.federation.methods.fedbabu import FedBABU
from hansa.federation.methods.fedper import FedPer
from hansa.federation.methods.fedprox import FedProx
from hansa.federation.methods.fedrep import FedRep
from hansa.federation.methods.fedselect import FedSelect
from hansa.federation.methods.hierfavg import HierFAVG
from hansa.federation.methods.lgfedavg import LGFedAvg
from hansa.federation.methods.local import LocalOnly
from hansa.federation.methods.lotteryfl import LotteryFL
from hansa.federation.methods.pfedme import PFedMe
from hansa.federation.methods.scaffold import Scaffold
from hansa.federation.methods.sparsyfed import SparsyFed
from hansa.federation.methods.swat import Swat
from hansa.federation.methods.worldlm import WorldLM
from hansa.federation.methods.zerofl import ZeroFL

METHODS: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (
        LocalOnly,
        FedAvg,
        FedAvgTuned,
        FedProx,
        Scaffold,
        FedPer,
        FedRep,
        LGFedAvg,
        FedBABU,
        Ditto,
        PFedMe,
        LotteryFL,
        FedSelect,
        RandomMask,
        LeastChange,
        HeadMask,
        Swat,
        ZeroFL,
        SparsyFed,
        HierFAVG,
        DiLoCo,
        WorldLM,
        Centralised,
    )
}


def method_class(name: object) -> type[Method]:
    """Return the class that ``method.name`` of a configuration names.

    Args:
        name: a key of ``METHODS``, or ``module:Class`` of the user's own.

    Raises:
        InputError: no such method, or a class that is no whole method with a name of its own.
    """
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    allowed = f"{', '.join(METHODS)} or module:Class"
    if not isinstance(name, str):
        raise InputError("method.name", repr(name), allowed)
    kind = import_class(name, "method.name", allowed)
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise InputError("method.name", f"{name!r}, which is no method", "a subclass of Method")
    if inspect.isabstract(kind):
        lacks = ", ".join(sorted(kind.__abstractmethods__))
        raise InputError("method.name", f"{name!r}, which lacks {lacks}", "a whole method")
    own = vars(kind).get("name")
    if not isinstance(own, str) or not own or own in METHODS:
        # Tables and pages would show it as the method that it stands on.
        found = f"{name!r} with {'no name of its own' if own is None else f'the name {own!r}'}"
        raise InputError("method.name", found, 'a new one: name: ClassVar[str] = "..."')
    return kind


def named(method: Method) -> str:
    """Return what a configuration calls a method: the inverse of ``method_class``."""
    kind = type(method)
    known = METHODS.get(kind.name) is kind
    return kind.name if known else f"{kind.__module__}:{kind.__qualname__}"


__all__ = [
    "METHODS",
    "Centralised",
    "DiLoCo",
    "Ditto",
    "FedAvg",
    "FedAvgTuned",
    "FedBABU",
    "FedPer",
    "FedProx",
    "FedRep",
    "FedSelect",
    "HeadMask",
    "HierFAVG",
    "LGFedAvg",
    "LeastChange",
    "LocalOnly",
    "LotteryFL",
    "Method",
    "PFedMe",
    "RandomMask",
    "Scaffold",
    "SparsyFed",
    "Swat",
    "WorldLM",
    "ZeroFL",
    "method_class",
    "named",
]
