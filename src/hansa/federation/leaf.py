"""What happens at one leaf in one round: local training, and scoring. Engines call this.

The batches of an epoch are drawn from a stream of their own, keyed by client, round and epoch
alone. Every pass of an epoch sees the same order, and methods with the same seed see the same
data, which is what makes their equalities exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hansa.data.clients import Client, Split
from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods.base import Method, Work
from hansa.federation.node import Node, Setup
from hansa.federation.tree import name_of
from hansa.models.task import Batch
from hansa.seeding import generator, global_stream

Metrics = dict[str, tuple[float, float]]
SCORED_SPLITS: tuple[Split, ...] = ("validation", "test")


class DivergedError(ArithmeticError):
    """A client's loss or weights are no numbers."""

    def __init__(self, path: str, round_: int, what: str) -> None:
        super().__init__(path, round_, what)
        self.path, self.round, self.what = path, round_, what

    def __str__(self) -> str:
        return f"{self.what} in round {self.round} at {name_of(self.path)}"


@dataclass(frozen=True)
class Newcomer:
    """What a client that joins late is worth at once, and after local training.

    Attributes:
        before: metrics as (sum, count) of what it received, on its test data.
        after: the same after its local training.
        params: name -> parameter of its model then.
        buffers: name -> buffer of its model then.
        masks: its masks, where the method has any.
    """

    before: Metrics
    after: Metrics
    params: Tensors
    buffers: Tensors
    masks: Tensors


@dataclass(frozen=True)
class Leaf:
    """Runs leaves of one federation: the method, what all nodes share, the run's seed."""

    method: Method
    setup: Setup
    seed: int

    def train(
        self, path: str, round_: int, client: Client, state: State, down: Message
    ) -> tuple[State, Message, Metrics]:
        """Return the leaf's new state, its reply, and the metrics of its training.

        Raises:
            DivergedError: the training loss or the weights became infinite or NaN.
        """
        node = self._node(path, round_, client)
        state = self.method.receive(node, state, down)
        work = self._fit(node, self.method.begin(node, state), client, self.setup.training.epochs)
        sums = {name: float(total) for name, total in work["metrics"].items()}
        count = sums.pop("count")
        metrics = {name: (total, count) for name, total in sums.items()}
        state, reply = self.method.end(node, state, work)
        return state, reply, metrics

    def score(
        self, path: str, round_: int, client: Client, state: State, down: Message
    ) -> dict[str, Metrics]:
        """Return the metrics of the client's model on its validation and test data.

        Which model that is, the method says (``Method.scored``). A client that has not trained
        yet is scored with the model it would receive.

        Raises:
            DivergedError: the loss is infinite or NaN.
        """
        node = self._node(path, round_, client)
        state = self._held(node, state, down)
        params, buffers = self._model(node, client, state)
        with global_stream(self.seed, path, round_, "score"):
            scores: dict[str, Metrics] = {
                split: self.setup.task.evaluate(params, buffers, client.batch(split))
                for split in SCORED_SPLITS
                if client.count(split)
            }
        for metrics in scores.values():
            _check_finite(node, metrics["loss"][0])
        return {**scores, "state": self.method.describe(self.setup, state)}

    def model(
        self, path: str, round_: int, client: Client, state: State, down: Message
    ) -> tuple[Tensors, Tensors]:
        """Return parameters and buffers of the model that ``score`` scores.

        Raises:
            DivergedError: fine-tuning ended in an infinite or NaN loss or weight.
        """
        node = self._node(path, round_, client)
        return self._model(node, client, self._held(node, state, down))

    def _held(self, node: Node, state: State, down: Message) -> State:
        """Return a leaf's own state where that is what is scored, else what it would receive."""
        own = state and self.method.scored == "trained"
        return state if own else self.method.receive(node, state, down)

    def _model(self, node: Node, client: Client, state: State) -> tuple[Tensors, Tensors]:
        if self.method.scored != "tuned":
            return self.method.model(self.setup, state)
        epochs = self.method.tune_epochs(self.setup)
        work = self._fit(node, self.method.tune(node, state), client, epochs)
        return work["params"], work["buffers"]

    def onboard(
        self, path: str, round_: int, client: Client, down: Message, epochs: int
    ) -> Newcomer:
        """Return what a newcomer is worth before and after its first local training.

        Raises:
            DivergedError: the training loss or the weights became infinite or NaN.
        """
        method, task, test = self.method, self.setup.task, client.batch("test")
        node = self._node(path, round_, client)
        state = method.receive(node, State(), down)
        before = task.evaluate(*method.model(self.setup, state), test)
        tuned = method.scored == "tuned"
        work = self._fit(
            node, (method.tune if tuned else method.begin)(node, state), client, epochs
        )
        model: tuple[Tensors, Tensors] = (work["params"], work["buffers"])
        state, _ = method.end(node, state, work)
        if method.scored == "trained":
            model = method.model(self.setup, state)
        masks = method.masks(self.setup, state)
        return Newcomer(before, task.evaluate(*model, test), *model, masks)

    def cross(self, client: Client, params: Tensors, buffers: Tensors) -> tuple[float, float]:
        """Return the test accuracy of any model on a client's data as (sum, count)."""
        return self.setup.task.evaluate(params, buffers, client.batch("test"))["accuracy"]

    def _node(self, path: str, round_: int, client: Client) -> Node:
        split: Split = "validation" if client.count("validation") else "train"

        def validate(params: Tensors, buffers: Tensors) -> Metrics:
            return self.setup.task.evaluate(params, buffers, client.batch(split))

        return Node(path, round_, client.count("train"), self.setup, validate=validate)

    def _fit(self, node: Node, work: Work, client: Client, epochs: int) -> Work:
        data = client.batch("train")
        with global_stream(self.seed, node.path, node.round, "training"):
            for stage, num in self.method.stages(node, work, epochs):
                phases = self.method.phases(work, stage)
                # What a method does beside ordinary training must not shift the order of that.
                key = () if stage == "train" else (stage,)
                for epoch in range(num):
                    rng = generator(self.seed, node.path, node.round, *key, epoch)
                    order = torch.randperm(node.samples, generator=rng)
                    for phase in phases:
                        for batch in _batches(data, order, self.setup.training.batch_size):
                            work = self.method.step(self.setup, work, batch, phase)
                _check_work(node, work)
                work = self.method.after(node, work, stage)
        return work


def _batches(data: Batch, order: torch.Tensor, size: int) -> Iterator[Batch]:
    inputs, labels = data
    for chosen in order.split(size):
        yield inputs[chosen], labels[chosen]


def _check_work(node: Node, work: Work) -> None:
    # One look at the end of a stage is enough: a sum that was NaN once stays so.
    _check_finite(node, float(work["metrics"]["loss"]))
    for group in work.values():
        for name, tensor in group.items():
            if not tensor.isfinite().all():
                raise DivergedError(node.path, node.round, f"{name} is not finite")


def _check_finite(node: Node, loss: float) -> None:
    if not abs(loss) < float("inf"):
        raise DivergedError(node.path, node.round, f"the loss is {loss}")
