"""The contract of a method: five steps that every node runs, and three pure functions of training.

====================  ==============================  ===================================
step                  at a leaf                       at an inner node, the root included
====================  ==============================  ===================================
``receive``           take the parent's message       the same; nothing reaches the root
``begin/step/end``    local training                  the same, where it holds data
``dispatch``          -                               one message for each chosen child
``aggregate``         -                               merge the replies that came in time
``reply``             (``end`` returns it)            message to the parent
====================  ==============================  ===================================

A method is a frozen value of options. It holds no state: what a node must remember it returns as
a ``State``, which the engine saves, resumes and moves. It never loops over clients and never knows
its engine.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from hansa.errors import InputError
from hansa.federation.message import Message, State, Tensors
from hansa.federation.node import Child, Node, Reply, Setup
from hansa.federation.optimizer import Training
from hansa.models.task import Batch, Task

Work = dict[str, dict[str, torch.Tensor]]
"""What local training carries from batch to batch: named groups of tensors and nothing else, so
that the work of many clients can be stacked. ``params``, ``buffers`` and ``metrics`` are always
there; a method adds groups of its own."""

Scored = Literal["received", "trained", "tuned"]
Inner = Literal["before", "beside"]
Figure = tuple[str, str, float]
"""What a node noted in a round: about which other node (or none), what, and its value."""


class Method(BaseModel, ABC):
    """A federated algorithm.

    Attributes:
        name: what a configuration calls it.
        scored: which model of a client its scores are about: the one it receives
            (``received``), its own after local training (``trained``), or the received one after
            fine-tuning on a copy (``tuned``).
        common: whether the root ends with a model worth keeping.
        max_depth: the deepest tree the method is defined on, None for any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    scored: ClassVar[Scored] = "received"
    common: ClassVar[bool] = True
    max_depth: ClassVar[int | None] = None
    inner: ClassVar[Inner | None] = None
    """When an inner node with data of its own trains on it: before it asks its children, who
    start from what it has made, or beside them, as one of them; None where it may hold none."""
    averages: ClassVar[bool] = False
    """Whether what children send is merged by a mean of the setup's, which robust rules replace."""
    pools: ClassVar[bool] = False
    """Whether all data are brought to one place, as no federation would."""
    alone: ClassVar[str] = "what it makes of its replies, only the method can tell"
    """Why a parent must see each reply by itself; empty where it needs no more than a weighted mean
    of the models in them, so that noise can be put on it, or only it be known."""
    masked: ClassVar[bool] = False
    """Whether clients hold masks, which ``buffers = "personal"`` needs."""

    def adapt(self, model: nn.Module, training: Training) -> nn.Module:
        """Return the form of a model that the method trains, with the same names; as it is."""
        return model

    def adapted(self, task: Task, training: Training) -> Task:
        """Return the task that the method trains: that of the model's adapted form."""
        return task.adapted(lambda module: self.adapt(module, training))

    def check(self, setup: Setup, depth: int) -> None:
        """Refuse a model or a tree on which the method is not defined.

        Raises:
            InputError: the tree is too deep, an option does not fit the model, or a robust rule
                where nothing is averaged.
        """
        if self.max_depth is not None and depth > self.max_depth:
            raise InputError(
                "tree.federations", f"a tree of depth {depth}", f"depth 1 with method {self.name!r}"
            )
        if setup.robust is not None and not self.averages:
            raise InputError(
                "robust",
                f"a rule with method {self.name!r}, which averages nothing",
                "a method that averages models",
            )
        if setup.attack is not None and not self.averages:
            raise InputError(
                "attackers",
                f"attackers with method {self.name!r}, in which no client's reply is averaged",
                "a method that averages models",
            )
        if setup.buffers == "personal" and not self.masked:
            raise InputError(
                "model.buffers",
                f"'personal' with method {self.name!r}, which has no masks",
                "averaged or local",
            )

    @abstractmethod
    def start_root(self, node: Node) -> State:
        """Return the root's state before the first round."""

    @abstractmethod
    def receive(self, node: Node, state: State, down: Message) -> State:
        """Return a node's state after the parent's message.

        ``state`` is empty at a node that takes part for the first time.
        """

    @abstractmethod
    def begin(self, node: Node, state: State) -> Work:
        """Return the work of one round of local training."""

    def tune(self, node: Node, state: State) -> Work:
        """Return the work of fine-tuning before scoring, where ``scored`` is ``tuned``."""
        return self.begin(node, state)

    def stages(self, node: Node, work: Work, epochs: int) -> Sequence[tuple[str, int]]:
        """Return the parts of local work one after another, each with its number of epochs."""
        return (("train", epochs),)

    def phases(self, work: Work, stage: str) -> Sequence[str]:
        """Return the passes over the data that make up one epoch of a stage."""
        return ("train",)

    def after(self, node: Node, work: Work, stage: str) -> Work:
        """Return the work between the end of a stage and what follows."""
        return work

    def order_of(self, node: Node) -> int:
        """Return the round whose order of samples a leaf takes; its own by default."""
        return node.round

    def one_by_one(self, setup: Setup) -> str:
        """Return why clients are best trained one at a time, nothing where stacks may be faster."""
        return ""

    def passes(self, setup: Setup) -> int:
        """Return the passes over its data that a round costs a client, at most."""
        return setup.training.epochs

    def step(self, setup: Setup, work: Work, batch: Batch, phase: str) -> Work:
        """Return the work after one batch. Pure: no Python value depends on a tensor."""
        return train_step(setup, work, batch, phase)

    @abstractmethod
    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return the leaf's state after its training, and its reply to the parent."""

    def settle(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return an inner node's state after training on data of its own, and its share.

        Args:
            node: the inner node.
            state: its state after ``receive``.
            work: what its training has made.

        Returns:
            The state it dispatches from and aggregates into, and where ``inner`` is ``beside``
            a reply that is merged with those of its children under the node's own path.
        """
        raise NotImplementedError(f"{self.name} has no inner nodes with data")

    def held(self, node: Node, state: State, down: Message) -> State:
        """Return the state after the newest aggregate and before any training: to be scored."""
        return self.receive(node, state, down)

    def inner_training(self) -> Inner | None:
        """Return when an inner node trains on data of its own; see ``inner``."""
        return self.inner

    def turns(self) -> int:
        """Return how often an inner node below the root asks its children in a round."""
        return 1

    def figures(self, state: State) -> Iterable[Figure]:
        """Return what a node noted in its state about the round that made it; nothing."""
        return ()

    @abstractmethod
    def dispatch(
        self, node: Node, state: State, children: Iterable[Child]
    ) -> Iterator[tuple[str, Message]]:
        """Yield one message for each child, in the order given."""

    def remember(self, node: Node, state: State, child: Child, reply: Message) -> State:
        """Return what the parent keeps of a child once its reply is in; nothing by default.

        ``node`` and ``state`` are the parent's, as they were when the child was asked.
        """
        return child.link

    def fits(self, node: Node, state: State, child: Child, reply: Message) -> None:
        """Refuse a reply that ``aggregate`` could not take, before it counts; by default none.

        ``node`` and ``state`` are the parent's, as they were when the child was asked.

        Raises:
            MessageError: something is missing, or has another shape, dtype or sign.
        """

    def unchanged(self, node: Node, state: State) -> Mapping[str, Tensors]:
        """Return what a reply would hold of which training changed nothing.

        Tensors that are changes in themselves are left out. ``state`` is that of the parent when it
        asked.
        """
        return {}

    @abstractmethod
    def aggregate(self, node: Node, state: State, replies: Iterable[Reply]) -> State:
        """Return the state after merging the replies, which come one by one in path order."""

    @abstractmethod
    def reply(self, node: Node, state: State) -> Message:
        """Return an inner node's message to its parent, from its state after ``aggregate``."""

    def model(self, setup: Setup, state: State) -> tuple[Tensors, Tensors]:
        """Return parameters and buffers of the model that a node holds in a state.

        Where the state holds only a part, initial values complete it.
        """
        params = {**setup.task.params, **state.group("model")}
        return params, {**setup.task.buffers, **state.group("buffers")}

    def trained(self, setup: Setup, work: Work) -> tuple[Tensors, Tensors]:
        """Return parameters and buffers of the model that work holds, as it is scored."""
        return work["params"], work["buffers"]

    def tune_epochs(self, setup: Setup) -> int:
        """Return the epochs of fine-tuning before scoring, where ``scored`` is ``tuned``."""
        return setup.training.epochs

    def describe(self, setup: Setup, state: State) -> dict[str, tuple[float, float]]:
        """Return figures about a leaf's or the root's state as (sum, count); none by default."""
        return {}

    def masks(self, setup: Setup, state: State) -> Tensors:
        """Return a client's masks by parameter, True where an entry is its own; none by default."""
        return {}


class Asking(Method):
    """A method whose rounds train nothing: what a leaf replies, ``end`` makes of its data."""

    def stages(self, node: Node, work: Work, epochs: int) -> tuple[tuple[str, int], ...]:
        """Return nothing: ``end`` looks at the samples in its own way."""
        return ()

    def begin(self, node: Node, state: State) -> Work:
        """Return work without anything to train."""
        return begin_work(node.setup, {}, {})

    def model(self, setup: Setup, state: State) -> tuple[Tensors, Tensors]:
        """Return the initial model."""
        return setup.task.params, setup.task.buffers


def train_step(
    setup: Setup,
    work: Work,
    batch: Batch,
    phase: str = "train",
    mask: Tensors | None = None,
    pull: Tensors | None = None,
    training: bool = True,
) -> Work:
    """Return the work after one optimizer step.

    Args:
        setup: the run's task and optimizer.
        work: the work so far; its optimizer memory stands under ``memory.*``.
        batch: inputs and labels.
        phase: the pass this step belongs to.
        mask: name -> bool tensor, True where an entry may move.
        pull: name -> tensor added to the gradient (a proximal term, say).
        training: whether layers such as dropout and BatchNorm act as in training.
    """
    gradients, buffers, metrics = setup.task.gradients(
        work["params"], work["buffers"], batch, training
    )
    if pull is not None:
        gradients = {n: g if g is None else g + pull[n] for n, g in gradients.items()}
    return moved(setup, work, gradients, buffers, metrics, phase, mask)


def moved(
    setup: Setup,
    work: Work,
    gradients: Mapping[str, torch.Tensor | None],
    buffers: Tensors,
    metrics: Tensors,
    phase: str = "train",
    mask: Tensors | None = None,
) -> Work:
    """Return the work after the optimizer's step along gradients; see ``train_step``."""
    memory = {key[7:]: group for key, group in work.items() if key.startswith("memory.")}
    rate = work.get("rate", {}).get("lr")
    params, memory = setup.training.update(work["params"], gradients, memory, mask, phase, rate)
    sums = {name: total + metrics[name] for name, total in work["metrics"].items()}
    after: Work = {**work, "params": params, "buffers": dict(buffers), "metrics": sums}
    return after | {f"memory.{part}": group for part, group in memory.items()}


def begin_work(setup: Setup, params: Tensors, buffers: Tensors, **groups: Tensors) -> Work:
    """Return fresh work: copies of the tensors, empty optimizer memory, metrics at zero."""
    work: Work = {
        "params": {name: p.clone() for name, p in params.items()},
        "buffers": {name: b.clone() for name, b in buffers.items()},
        "metrics": {name: torch.zeros(()) for name in ("loss", "accuracy", "count")},
    }
    memory = setup.training.memory(params)
    work |= {f"memory.{part}": dict(tensors) for part, tensors in memory.items()}
    return work | {name: dict(tensors) for name, tensors in groups.items()}


def scheduled(node: Node, work: Work) -> Work:
    """Return work that knows its round's learning rate, where that is not the same in all."""
    training = node.setup.training
    if training.lr_end is None:
        return work
    # A tensor of the work and no constant: one compiled step then serves all rounds.
    rate = torch.tensor(training.rate(node.round), dtype=torch.float64)
    return {**work, "rate": {"lr": rate}}


def nested(work: Work, name: str) -> Work:
    """Return the work of a second model that stands inside ``work`` under ``NAME/...``."""
    inner = {
        key.removeprefix(f"{name}/"): w for key, w in work.items() if key.startswith(f"{name}/")
    }
    return {**inner, "rate": work["rate"]} if "rate" in work else inner


def nest(inner: Work, name: str) -> Work:
    """Return work under names ``NAME/...``, to stand inside other work with its rate."""
    return {f"{name}/{key}": group for key, group in inner.items() if key != "rate"}


def training_metrics(work: Work) -> dict[str, tuple[float, float]]:
    """Return the metrics of local training as (sum, count)."""
    sums = work["metrics"]
    count = float(sums["count"])
    return {name: (float(sums[name]), count) for name in ("loss", "accuracy")}
