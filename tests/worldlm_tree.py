"""A tree of small federations on made-up text, on which methods are tested."""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from hansa.data.clients import Client
from hansa.federation.engines.local import LocalEngine
from hansa.federation.engines.plan import EngineOptions
from hansa.federation.federation import Federation
from hansa.federation.history import History
from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods import Method, WorldLM
from hansa.federation.methods.base import Work
from hansa.federation.node import Node, Setup
from hansa.federation.optimizer import Training
from hansa.federation.tree import ROOT, Tree
from hansa.federation.wire import encode
from hansa.models.objective import NextToken, Objective
from hansa.models.task import Task
from support import Row

VOCABULARY, CONTEXT, TRAIN = 256, 5, 7


TREE = Tree({"A": ROOT, "B": ROOT, "a1": "A", "a2": "A", "b1": "B", "b2": "B"})


LEAVES = ("a1", "a2", "b1", "b2")


EVERY = (ROOT, "A", "B", *LEAVES)


KEYS = {"layers.1.weight", "layers.1.bias"}


CANARY = "the canary sings at dawn, and nobody hears it"


class Tiny(nn.Module):
    """A language model with two blocks and nothing that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(inputs)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        logits: torch.Tensor = self.head(hidden)
        return logits


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def client(tokens: torch.Tensor) -> Client:
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    cut = slice(0, TRAIN), slice(TRAIN, TRAIN + 2), slice(TRAIN + 2, None)
    train, validation, test = ((inputs[part], labels[part]) for part in cut)
    return Client.of(train, test=test, validation=validation)


def texts(names: Iterable[str]) -> dict[str, Client]:
    """Every node has a few letters of its own, and two letters that it likes."""
    found = {}
    for name in names:
        rng = torch.Generator().manual_seed(sum(name.encode()))
        letters = torch.randint(0, 26, (TRAIN + 5, CONTEXT + 1), generator=rng)
        found[name] = client(letters % (3 + len(name) + ord(name[-1]) % 7) + 97)
    return found


def federation(method: Method, names: Iterable[str] = EVERY, **options: Any) -> Federation:
    training = {"lr": 0.5, "batch_size": 3, **options.pop("training", {})}
    return Federation(
        options.pop("model", None) or tiny(),
        options.pop("data", None) or texts(names),
        method,
        Training(**training),
        tree=options.pop("tree", TREE),
        seed=5,
        engine=options.pop("engine", EngineOptions(kind="sequential", workers=1)),
        objective=NextToken(),
        **options,
    )


def left(made: Federation) -> dict[str, bytes]:
    """The models that the nodes have."""
    names = [path.rpartition("/")[2] for path in made.tree.walk()]
    return {name: encode(State({"m": made.model_of(name).state_dict()})) for name in names}


def ran(method: Method, names: Iterable[str] = EVERY, rounds: int = 3, **options: Any) -> Any:
    """The models and the ledger of a run, and what it measured."""
    made = federation(method, names, **options)
    history = made.run(rounds)
    return left(made), history.table("ledger").to_pylist(), history


def figures(history: History, name: str) -> dict[tuple[int, str, str], float]:
    rows = history.table("figures").to_pylist()
    return {(r["round"], r["node"], r["other"]): r["value"] for r in rows if r["name"] == name}


def paths(node: str) -> Iterator[str]:
    """A node's path and those above it."""
    while node:
        yield node
        node = node.rpartition("/")[0]


TARGETS = {"a1": 0, "a2": 4, "b1": 8, "b2": 12}


class Halfway(Objective):
    """Half the square of the distance to the target: a step at a rate of 0.5 goes halfway."""

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the mean over samples."""
        loss = 0.5 * (logits[:, 0] - labels).square().mean()
        one = torch.ones_like(loss, requires_grad=False)
        return loss, {"loss": loss.detach(), "accuracy": 0 * one, "count": one}


def halfway(method: Method) -> LocalEngine:
    setup = Setup(Task(Row(1), Halfway()), Training(lr=0.5, batch_size=1))
    data = {}
    for name, target in TARGETS.items():
        sample = torch.ones(1, 1), torch.tensor([target])
        data[TREE.path_of(name)] = Client.of(sample, test=sample)
    return LocalEngine(TREE, data, method, setup, seed=0)


def by_row(history: History) -> set[tuple[Any, ...]]:
    return {tuple(row.values()) for row in history.table("scores").to_pylist()}


class Watched(WorldLM):
    """WorldLM that notes what local training starts from and ends with, in order."""

    starts: ClassVar[list[tuple[int, str, Tensors]]] = []
    ends: ClassVar[dict[tuple[int, str], Tensors]] = {}

    def begin(self, node: Node, state: State) -> Work:
        """Take note."""
        work = super().begin(node, state)
        self.starts.append((node.round, node.path, work["params"]))
        return work

    def settle(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Take note."""
        self.ends[node.round, node.path] = work["params"]
        return super().settle(node, state, work)


def backbone(params: Tensors) -> bytes:
    return encode(State({"b": {name: p for name, p in params.items() if name not in KEYS}}))


def keys(params: Tensors) -> bytes:
    return encode(State({"k": {name: p for name, p in params.items() if name in KEYS}}))
