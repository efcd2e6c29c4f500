"""What happens at one leaf: local training, and the model that is scored.

``stack.py`` does several leaves at once, and calls this for what cannot be stacked.

The batches of an epoch are drawn from a stream of their own, keyed by client, round and epoch
alone. Every pass of an epoch sees the same order, and methods with the same seed see the same
data, which is what makes their equalities exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hansa.data.clients import Client, Split
from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods.base import Method, Work, scheduled, training_metrics
from hansa.federation.node import Node, Setup
from hansa.federation.optimizer import Training
from hansa.federation.privacy import noised, poisson
from hansa.federation.spending import SPENT, counted, opened, spent, told
from hansa.federation.tree import name_of
from hansa.models.task import Batch
from hansa.seeding import Keystream, generator, global_stream

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
    """What a leaf's round starts from: where and when, its state, and its parent's message.

    Where a model is scored at two moments, ``scored`` says whether it is in this round.
    """

    path: str
    round: int
    client: Client
    state: State
    down: Message
    scored: bool = True


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

    def end(self, node: Node, job: Job, state: State, work: Work) -> Trained:
        """Return the leaf's new state, its reply, and the metrics of its training.

        Args:
            node: the leaf.
            job: what its round started from.
            state: its state after ``receive``.
            work: what its training has made.
        """
        work, metrics = self._released(node, job, state, work)
        state, reply = self.method.end(node, state, self._turned(node, state, work))
        if node.setup.privacy is None:
            return state, reply, metrics
        state = replace(state, scalars={**state.scalars, **spent(node, job.state)})
        return state, replace(reply, metrics={}), metrics

    def _released(self, node: Node, job: Job, state: State, work: Work) -> tuple[Work, Metrics]:
        """Return trained work as it may leave the node, and the metrics of the training.

        Metrics of the model after its local steps, where they are wanted, stand under
        ``trained/``. Of private training nothing is told but what a test says.
        """
        setup, metrics = node.setup, training_metrics(work)
        if setup.privacy is not None:
            metrics = {}
            if setup.privacy.unit == "update":
                start = self.method.begin(node, state)["params"]
                rng = self._private(node, node.round, "privacy")
                work = {**work, "params": noised(setup.privacy, start, work["params"], rng)}
        honest = setup.attack is None or node.path not in setup.attack.paths
        if setup.moments and job.scored and honest and job.client.count("test"):
            model = self.method.trained(setup, work)
            found = self.setup.task.evaluate(*model, job.client.batch("test"))
            metrics |= {f"trained/{name}": pair for name, pair in found.items()}
        return work, metrics

    def _turned(self, node: Node, state: State, work: Work) -> Work:
        """Return trained work as it is sent: at a simulation's attackers something else."""
        attack = node.setup.attack
        if attack is None or not attack.turns(node.path):
            return work
        start = self.method.begin(node, state)["params"]
        rng = generator(self.seed, node.path, node.round, "attack")
        return {**work, "params": attack.turned(start, work["params"], rng)}

    def own(self, node: Node, job: Job, state: State) -> tuple[State, Message, Metrics]:
        """Train an inner node on data of its own.

        Args:
            node: the inner node.
            job: what its round started from.
            state: its state after ``receive``.

        Returns:
            Its state, its own share in the mean (empty where the method has none), and metrics.

        Raises:
            DivergedError: the training loss or the weights became infinite or NaN.
        """
        private = opened(node, job.state)
        if private is None:
            return counted(state, job.state), Message(), SPENT
        node = private
        epochs = node.setup.training.epochs
        work = self.fit(node, self.method.begin(node, state), job.client, epochs)
        work, metrics = self._released(node, job, state, work)
        state, share = self.method.settle(node, state, work)
        if node.setup.privacy is not None:
            state = replace(state, scalars={**state.scalars, **spent(node, job.state)})
            share = replace(share, metrics={}) if share else share
        return state, share, metrics

    def scored(self, node: Node, state: State, scores: Scores) -> Scores:
        """Return a leaf's scores, from the metrics of its model by split.

        Raises:
            DivergedError: the loss is infinite or NaN.
        """
        for metrics in scores.values():
            check_finite(node, metrics["loss"][0])
        about = self.method.describe(self.setup, state)
        return {**scores, "state": {**about, **told(node, state)}}

    def judged(
        self, node: Node, client: Client, model: tuple[Tensors, Tensors], state: State
    ) -> Scores:
        """Return the scores of a model on a client's data, without stacks.

        Args:
            node: the node that is scored.
            client: what it holds.
            model: parameters and buffers.
            state: what figures about the node are taken from.

        Raises:
            DivergedError: the loss is infinite or NaN.
        """
        task = self.setup.task
        splits = [split for split in SCORED_SPLITS if client.count(split)]
        scores: Scores = {split: task.evaluate(*model, client.batch(split)) for split in splits}
        return self.scored(node, state, scores)

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
        if self.setup.moments:
            return counted(self.method.held(node, job.state, job.down), job.state)
        if job.state and self.method.scored == "trained":
            return job.state
        return counted(self.method.receive(node, job.state, job.down), job.state)

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

    def cross(self, client: Client, params: Tensors, buffers: Tensors) -> Metrics:
        """Return the test metrics of any model on a client's data as (sum, count)."""
        return self.setup.task.evaluate(params, buffers, client.batch("test"))

    def node(self, job: Job) -> Node:
        """Return the node that a job is about."""
        client = job.client
        split: Split = "validation" if client.count("validation") else "train"

        def validate(params: Tensors, buffers: Tensors) -> Metrics:
            return self.setup.task.evaluate(params, buffers, client.batch(split))

        samples, setup = client.count("train"), self.setup.at(job.path)
        return Node(job.path, job.round, samples, setup, validate=validate, client=client)

    def order(self, node: Node, stage: str, epoch: int) -> torch.Tensor:
        """Return the order of the client's training samples in an epoch."""
        # What a method does beside ordinary training must not shift the order of that.
        key = () if stage == "train" else (stage,)
        training, number = node.setup.training, self.method.order_of(node)
        if training.steps is not None:
            return self._going_on(node, training, key, (number - 1) * training.epochs + epoch)
        rng = generator(self.seed, node.path, number, *key, epoch)
        return torch.randperm(node.samples, generator=rng)

    def _going_on(
        self, node: Node, training: Training, key: tuple[str, ...], turn: int
    ) -> torch.Tensor:
        """Return the samples of some full batches out of one endless row of shuffled passes."""
        size = training.batches(node.samples) * training.batch_size
        start = max(turn, 0) * size
        first, last = start // node.samples, (start + size - 1) // node.samples
        passes = [
            torch.randperm(
                node.samples, generator=generator(self.seed, node.path, "pass", *key, number)
            )
            for number in range(first, last + 1)
        ]
        skipped = start - first * node.samples
        return torch.cat(passes)[skipped : skipped + size]

    def batches(self, node: Node, stage: str, epoch: int) -> Sequence[torch.Tensor]:
        """Return the positions of each batch of an epoch.

        Private training draws every sample apart (Poisson), as its accountant assumes.
        """
        setup = node.setup
        size = setup.training.batch_size
        if setup.privacy is None or setup.privacy.unit == "update":
            order = self.order(node, stage, epoch)
            return [order[start : start + size] for start in range(0, len(order), size)]
        rng = self._private(node, self.method.order_of(node), stage, epoch, "drawn")
        return poisson(node.samples, size, setup.training.batches(node.samples), rng)

    def _private(self, node: Node, *purpose: str | int) -> torch.Generator | Keystream:
        """Return what private draws come from: the run's seed, or in a deployment a secret.

        Raises:
            RuntimeError: nobody has counted the release that they would be for.
        """
        if node.setup.releases is None:
            return generator(self.seed, node.path, *purpose)
        if node.setup.release is None:
            raise RuntimeError(f"{node.path} would let out what it has not counted")
        return node.setup.release.stream(*purpose)

    def fit(self, node: Node, work: Work, client: Client, epochs: int) -> Work:
        """Return the work after all stages of local training.

        Raises:
            DivergedError: the loss or the weights became infinite or NaN.
        """
        data = client.weighted("train")
        work = scheduled(node, work)
        with global_stream(self.seed, node.path, node.round, "training"):
            for stage, num in self.method.stages(node, work, epochs):
                phases = self.method.phases(work, stage)
                for epoch in range(num):
                    drawn = self.batches(node, stage, epoch)
                    for phase in phases:
                        for chosen in drawn:
                            batch: Batch = tuple(part[chosen] for part in data)  # type: ignore[assignment]
                            work = self.method.step(node.setup, work, batch, phase)
                check_work(node, work)
                work = scheduled(node, self.method.after(node, work, stage))
        return work


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
