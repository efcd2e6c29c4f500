"""The methods, one file each, and the registry by which a configuration names them."""

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
]
