"""Small federations that tests share: seconds matter, so everything here is tiny."""

import fcntl
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import nn

from hansa.data.clients import Client
from hansa.federation.engines.engine import RoundResult
from hansa.federation.engines.local import LocalEngine
from hansa.federation.message import State
from hansa.federation.methods import METHODS
from hansa.federation.methods.base import Method
from hansa.federation.node import Setup
from hansa.federation.optimizer import Training
from hansa.federation.tree import Tree
from hansa.federation.wire import encode
from hansa.models.task import Task
from hansa.seeding import generator

CLASSES, FEATURES = 3, 4
OPTIONS: dict[str, dict[str, Any]] = {
    "swat": {"sparse": ["*"]},
    "zerofl": {"sparse": ["*"]},
    "sparsyfed": {"sparsity": 0.5},
    "worldlm": {"keys": 0},
}
"""Options that a method needs on models as small as these, which have a first and a last layer, few
weights, and no numbered blocks."""


def made(name: str) -> Method:
    """Return a method with its defaults."""
    return METHODS[name].model_validate(OPTIONS.get(name, {}))


class Net(nn.Module):
    """A body and a head, with whatever stands between them."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 6)
        self.between = between or nn.ReLU()
        self.head = nn.Linear(6, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.between(self.body(inputs)))
        return logits


class Row(nn.Module):
    """One parameter, ``w``, of any length: for arithmetic by hand."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(length))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.w


def net(between: nn.Module | None = None) -> Net:
    torch.manual_seed(0)
    return Net(between)


def clients(num: int = 3, per_client: int = 7) -> dict[str, Client]:
    """Clients with labels that depend on the inputs, differently at each client."""
    made = {}
    for k in range(num):
        rng = torch.Generator().manual_seed(k)
        inputs = torch.randn(per_client + 10, FEATURES, generator=rng)
        labels = (inputs[:, k % FEATURES] > 0).long() + (inputs[:, (k + 1) % FEATURES] > 0).long()
        made[f"c{k}"] = Client.of(
            (inputs[:per_client], labels[:per_client]),
            test=(inputs[per_client:], labels[per_client:]),
            validation=(inputs[per_client:], labels[per_client:]),
        )
    return made


def doubled(num: int = 3) -> dict[str, Client]:
    """The same clients in float64, without validation data."""
    found = {}
    for name, client in clients(num).items():
        inputs, labels = client.batch("train")
        tests, answers = client.batch("test")
        found[name] = Client.of((inputs.double(), labels), test=(tests.double(), answers))
    return found


def engine(
    method: Method,
    *,
    model: nn.Module | None = None,
    data: Mapping[str, Client] | None = None,
    training: Training | None = None,
    tree: Tree | None = None,
    buffers: str = "averaged",
    **options: object,
) -> LocalEngine:
    data = clients() if data is None else data
    tree = tree or Tree.flat(data)
    paths = {path.rpartition("/")[2]: path for path in tree.leaves()}
    training = training or Training(lr=0.1, batch_size=3, epochs=2)
    setup = Setup(
        method.adapted(Task(model or net()), training),
        training,
        buffers,  # type: ignore[arg-type]
    )
    method.check(setup, tree.depth)
    return LocalEngine(
        tree,
        {paths[name]: client for name, client in data.items()},
        method,
        setup,
        seed=5,
        **options,  # type: ignore[arg-type]
    )


def alternating_sgd(
    model: nn.Module, data: Client, path: str, number: int, mask: Mapping[str, torch.Tensor]
) -> None:
    """One round of a leaf of ``engine`` in plain PyTorch, at the rates that are its defaults.

    Each epoch makes one pass over masked entries, then one over the others.
    """
    inputs, labels = data.batch("train")
    for epoch in range(2):
        order = torch.randperm(len(labels), generator=generator(5, path, number, epoch))
        for personal in (True, False):
            for chosen in order.split(3):
                model.zero_grad()
                F.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        held = mask[name] if personal else ~mask[name]
                        assert parameter.grad is not None
                        parameter -= 0.1 * parameter.grad * held


def run(engine: LocalEngine, rounds: int = 3) -> list[RoundResult]:
    with engine:
        return [engine.round(number) for number in range(1, rounds + 1)]


def everything(engine: LocalEngine, results: Iterable[RoundResult]) -> tuple[object, ...]:
    """All that a run leaves behind, but its seconds: states bit for bit, scores, bytes."""
    states = {path: encode(engine.state(path)) for path in engine.tree.walk()}
    return states, [(r.number, r.visits, dict(r.scores)) for r in results]


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether two groups of tensors are equal bit for bit."""
    return encode(State({"t": first})) == encode(State({"t": second}))


def config(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """The configuration of a small run on digits, written below ``tmp_path``."""
    return {
        "name": "t",
        "output": str(tmp_path),
        "rounds": 4,
        "data": {
            "clients": 4,
            "train_per_class": 3,
            "test_per_class": 5,
            "partition": {"kind": "shards", "classes": 2},
        },
        "model": {"options": {"hidden": [8]}},
        "training": {"lr": 0.1, "batch_size": 3},
        "participation": {"fraction": 0.7, "failure_rate": 0.1},
        "method": {"name": "fedselect", "rate": 0.2},
        **changes,
    }


@contextmanager
def in_turn(*places: int) -> Iterator[None]:
    """Hold what starts many processes to two tests at a time, over all of pytest's workers.

    They wait for one another's messages more than they compute.

    Args:
        *places: 0, 1 or both: which of the two may be taken. Ray has one, or its ports collide.
    """
    with ExitStack() as open_files:
        folder = Path(tempfile.gettempdir())
        locks = [
            open_files.enter_context((folder / f"hansa-tests-{place}.lock").open("w"))
            for place in places
        ]
        while not any(map(is_taken, locks)):
            time.sleep(0.2)
        yield


def is_taken(lock: IO[str]) -> bool:
    """Take the lock of a file if nobody has it, and tell whether that was so."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
