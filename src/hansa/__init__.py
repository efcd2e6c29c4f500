"""Hansa: train models together without pooling the data.

``hansa.train`` runs a configuration; ``hansa.Federation`` runs a module, clients and a method of
one's own.
"""

from hansa.bundle import Bundle
from hansa.bundle import read as read_bundle
from hansa.data.clients import Client
from hansa.errors import InputError
from hansa.federation.federation import Federation
from hansa.federation.history import History
from hansa.federation.methods import (
    FedAvg,
    FedAvgTuned,
    FedPer,
    FedProx,
    FedSelect,
    LocalOnly,
    Method,
)
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.tree import Tree
from hansa.runs import Run
from hansa.training import train

__all__ = [
    "Bundle",
    "Client",
    "FedAvg",
    "FedAvgTuned",
    "FedPer",
    "FedProx",
    "FedSelect",
    "Federation",
    "History",
    "InputError",
    "LocalOnly",
    "Method",
    "Participation",
    "Run",
    "Training",
    "Tree",
    "read_bundle",
    "train",
]
