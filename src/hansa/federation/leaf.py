"""What happens at one leaf: local training, and the model that is scored.

``stack.py`` does several leaves at once, and calls this for what cannot be stacked.

The batches of an epoch are drawn from a stream of their own, keyed by client, round and epoch
alone. Every pass of an epoch sees the same order, and methods with the same seed see the same
data, which is what makes their equalities exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hansa.data.clients import Client, Samples, Split
from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods.base import Method, Work, scheduled, training_metrics
from hansa.federation.node import Node, Setup
from hansa.federation.tree import name_of
from hansa.models.task import Batch
from hansa.seeding import generator, global_stream

Metrics = dict[str, tuple[float, float]]
Trained = tuple[State, Message, Metrics]
Scores = dict[str, Metrics]
SCORED_SPLITS: tuple[Split, ...] = ("validation", "test")


class DivergedError(ArithmeticError):
    """A client's loss or weights are no numbers."""

    def __init__(self, path: str, round_: int, what: str) -> None:
        super().__init__(path, round_, what)
        self.path, self.round, self.what = path, round_, what

    def __str__(self) -> str:
        return f"{self.what} in round {self.round} at {name_of(self.path)}"


@dataclass(frozen=True)
class Job:
    """What a leaf's round starts from: where and when, its state, and its parent's message."""

    path: str
    round: int
    client: Client
    state: State
    down: Message


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

    def end(self, node: Node, state: State, work: Work) -> Trained:
        """Return the leaf's new state, its reply, and the metrics of its training."""
        metrics = training_metrics(work)
        state, reply = self.method.end(node, state, work)
        return state, reply, metrics

    def scored(self, node: Node, state: State, scores: Scores) -> Scores:
        """Return a leaf's scores, from the metrics of its model by split.

        Raises:
            DivergedError: the loss is infinite or NaN.
        """
        for metrics in scores.values():
            check_finite(node, metrics["loss"][0])
        return {**scores, "state": self.method.describe(self.setup, state)}

    def model(self, job: Job) -> tuple[Tensors, Tensors]:
        """Return parameters and buffers of the model that is scored.

        Raises:
            DivergedError: fine-tuning ended in an infinite or NaN loss or weight.
        """
        node = self.node(job)
        return self._model(node, job.client, self.held(node, job))

    def held(self, node: Node, job: Job) -> State:
        """Return the state that is scored: a leaf's own, or what it would receive.

        Which of them, the method says (``Method.scored``). A client that has not trained yet is
        scored with the model it would receive.
        """
        own = job.state and self.method.scored == "trained"
        return job.state if own else self.method.receive(node, job.state, job.down)

    def _model(self, node: Node, client: Client, state: State) -> tuple[Tensors, Tensors]:
        if self.method.scored != "tuned":
            return self.method.model(self.setup, state)
        epochs = self.method.tune_epochs(self.setup)
        work = self.fit(node, self.method.tune(node, state), client, epochs)
        return self.method.trained(self.setup, work)

    def onboard(self, job: Job, epochs: int) -> Newcomer:
        """Return what a newcomer is worth before and after its first local training.

        Raises:
            DivergedError: the training loss or the weights became infinite or NaN.
        """
        method, task, test = self.method, self.setup.task, job.client.batch("test")
        node = self.node(job)
        state = method.receive(node, job.state, job.down)
        before = task.evaluate(*method.model(self.setup, state), test)
        tuned = method.scored == "tuned"
        work = (method.tune if tuned else method.begin)(node, state)
        work = self.fit(node, work, job.client, epochs)
        model = method.trained(self.setup, work)
        state, _ = method.end(node, state, work)
        if method.scored == "trained":
            model = method.model(self.setup, state)
        masks = method.masks(self.setup, state)
        return Newcomer(before, task.evaluate(*model, test), *model, masks)

    def cross(self, client: Client, params: Tensors, buffers: Tensors) -> tuple[float, float]:
        """Return the test accuracy of any model on a client's data as (sum, count)."""
        return self.setup.task.evaluate(params, buffers, client.batch("test"))["accuracy"]

    def node(self, job: Job) -> Node:
        """Return the node that a job is about."""
        client = job.client
        split: Split = "validation" if client.count("validation") else "train"

        def validate(params: Tensors, buffers: Tensors) -> Metrics:
            return self.setup.task.evaluate(params, buffers, client.batch(split))

        samples = client.count("train")
        return Node(job.path, job.round, samples, self.setup, validate=validate)

    def order(self, node: Node, stage: str, epoch: int) -> torch.Tensor:
        """Return the order of the client's training samples in an epoch."""
        # What a method does beside ordinary training must not shift the order of that.
        key = () if stage == "train" else (stage,)
        rng = generator(self.seed, node.path, self.method.order_of(node), *key, epoch)
        return torch.randperm(node.samples, generator=rng)

    def fit(self, node: Node, work: Work, client: Client, epochs: int) -> Work:
        """Return the work after all stages of local training.

        Raises:
            DivergedError: the loss or the weights became infinite or NaN.
        """
        data = client.batch("train")
        work = scheduled(node, work)
        with global_stream(self.seed, node.path, node.round, "training"):
            for stage, num in self.method.stages(node, work, epochs):
                phases = self.method.phases(work, stage)
                for epoch in range(num):
                    order = self.order(node, stage, epoch)
                    for phase in phases:
                        for batch in _batches(data, order, self.setup.training.batch_size):
                            work = self.method.step(self.setup, work, batch, phase)
                check_work(node, work)
                work = scheduled(node, self.method.after(node, work, stage))
        return work


def _batches(data: Samples, order: torch.Tensor, size: int) -> Iterator[Batch]:
    inputs, labels = data
    for chosen in order.split(size):
        yield inputs[chosen], labels[chosen]


def check_work(node: Node, work: Work) -> None:
    """Refuse work in which something is no number.

    Raises:
        DivergedError: the loss or a tensor is infinite or NaN.
    """
    # One look at the end of a stage is enough: a sum that was NaN once stays so.
    check_finite(node, float(work["metrics"]["loss"]))
    for group in work.values():
        for name, tensor in group.items():
            if not tensor.isfinite().all():
                raise DivergedError(node.path, node.round, f"{name} is not finite")


def check_finite(node: Node, loss: float) -> None:
    """Refuse a loss that is no number.

    Raises:
        DivergedError: it is infinite or NaN.
    """
    if not abs(loss) < float("inf"):
        raise DivergedError(node.path, node.round, f"the loss is {loss}")
