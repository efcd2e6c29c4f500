"""Acceptance test 9: the order of methods on digits over three seeds.

The setting is one in which the common model is still on its first plateau while clients of few
classes are long through with theirs: an MLP of two narrow layers on pixel values in [0, 1], full
batches, a small learning rate. docs/results/personalisation.md shows what larger steps change.
"""

from statistics import mean

import torch

import hansa
from hansa.data.clients import Client
from hansa.data.federate import DataOptions, federate
from hansa.data.partition import Shards
from hansa.federation.methods import (
    Ditto,
    FedAvg,
    FedAvgTuned,
    FedRep,
    FedSelect,
    LeastChange,
    LocalOnly,
)
from hansa.models.images import MLP
from hansa.seeding import global_stream

SELECT = {"rate": 0.25, "limit": 0.8}


class UnitMLP(MLP):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward((inputs + 1) / 2)


def accuracies(classes: int, **methods: hansa.Method) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in methods}
    for seed in (0, 1, 2):
        options = DataOptions(
            source="digits",
            clients=10,
            validation=0.2,
            test=0.5,
            train_per_class=5,
            partition=Shards(classes=classes),
        )
        data: dict[str, Client] = dict(federate(options, seed).clients)
        for name, method in methods.items():
            with global_stream(seed, "model"):
                model = UnitMLP((1, 8, 8), 10, (32, 32))
            federation = hansa.Federation(
                model,
                data,
                method,
                hansa.Training(lr=0.03, batch_size=10, epochs=5),
                seed=seed,
                compare_up_to=0,
            )
            summary = federation.run(20, score_every=0).summary()
            found[name].append(100 * summary["metrics"]["accuracy"]["mean"])
    return {name: mean(values) for name, values in found.items()}


def test_two_classes_per_client() -> None:
    two = accuracies(
        2,
        select=FedSelect(**SELECT),
        local=LocalOnly(),
        fedavg=FedAvg(),
        tuned=FedAvgTuned(),
        ditto=Ditto(mu=1.0),
        least=LeastChange(**SELECT),
    )
    margins = {"fedavg": 30, "tuned": 20, "ditto": 10, "least": 10, "local": -2}
    short = {
        name: two[name] for name, points in margins.items() if two["select"] < two[name] + points
    }
    assert not short, two


def test_four_classes_per_client() -> None:
    four = accuracies(4, select=FedSelect(**SELECT), fedavg=FedAvg(), fedrep=FedRep())
    assert four["select"] >= four["fedavg"] + 3
    assert four["select"] >= four["fedrep"] - 2
