"""The methods, one file each, and the registry by which a configuration names them."""

from hansa.federation.methods.base import Method
from hansa.federation.methods.fedavg import FedAvg
from hansa.federation.methods.fedavg_tuned import FedAvgTuned
from hansa.federation.methods.fedper import FedPer
from hansa.federation.methods.fedprox import FedProx
from hansa.federation.methods.fedselect import FedSelect
from hansa.federation.methods.local import LocalOnly

METHODS: dict[str, type[Method]] = {
    kind.name: kind for kind in (LocalOnly, FedAvg, FedAvgTuned, FedProx, FedPer, FedSelect)
}

__all__ = [
    "METHODS",
    "FedAvg",
    "FedAvgTuned",
    "FedPer",
    "FedProx",
    "FedSelect",
    "LocalOnly",
    "Method",
]
