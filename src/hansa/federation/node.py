"""Where a step of a method runs: the run's setup, the node, its children and their replies."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from hansa.data.clients import Client
from hansa.errors import InputError
from hansa.federation.aggregation import MaskedMean, Mean, PartialMean, WeightedMean
from hansa.federation.attackers import Attack
from hansa.federation.central import Central
from hansa.federation.message import Message, State, Tensors
from hansa.federation.optimizer import Training
from hansa.federation.privacy import Privacy, PrivateTask, check_model
from hansa.federation.releases import Release, Releases
from hansa.federation.robust import Robust, RobustMaskedMean, RobustMean
from hansa.federation.rules import Rules
from hansa.models.task import Task

Buffers = Literal["averaged", "local", "personal"]
Validate = Callable[[Tensors, Tensors], Mapping[str, tuple[float, float]]]


@dataclass(frozen=True)
class Setup:
    """What is the same at every node of a run."""

    task: Task
    training: Training
    buffers: Buffers = "averaged"
    """Whether running statistics travel and are averaged, stay at their client, or follow the
    mask of their layer (methods with masks)."""
    seed: int = 0
    """The run's seed, for what a method draws at a node."""
    rules: Mapping[str, Rules] = field(default_factory=dict)
    """Node path -> what holds there and nowhere else."""
    moments: bool = False
    """Whether a model is scored twice: after the aggregation, and after its local steps."""
    robust: Robust | None = None
    """The rule by which replies are merged; None is the weighted mean."""
    attack: Attack | None = None
    """In a simulation, who attacks and how."""
    privacy: Privacy | None = None
    """Set in the setup of one node (``at``) whose training is differentially private."""
    central: Central | None = None
    """How the root keeps its clients private, where it is the one to do so."""
    releases: Releases | None = None
    """In a deployment, where the one node that this setup is for counts what it lets out."""
    release: Release | None = None
    """Set while that node trains for one of them (``releasing``)."""

    @property
    def uneven(self) -> bool:
        """Whether nodes train by rules of their own, so that they cannot be stacked."""
        return any(
            rules.privacy is not None or rules.steps is not None or rules.lr is not None
            for rules in self.rules.values()
        )

    def mean(self, before: Tensors) -> Mean:
        """Return what merges replies, each of them whole.

        Args:
            before: name -> tensor that a reply would hold which changes nothing: what robust rules
                measure from.
        """
        return WeightedMean() if self.robust is None else RobustMean(self.robust, before)

    def masked_mean(self, before: Tensors) -> PartialMean:
        """Return what merges replies of which each shares some entries; see ``mean``."""
        return MaskedMean(before) if self.robust is None else RobustMaskedMean(self.robust, before)

    def at(self, path: str) -> "Setup":
        """Return the setup as it holds at one node.

        Raises:
            InputError: a model whose training cannot be private as the node's rules want it.
        """
        rules = self.rules.get(path)
        if rules is None:
            return self
        training = rules.applied(self.training)
        task, privacy = self.task, rules.privacy
        if privacy is not None:
            check_model(task.module)
        if privacy is not None and privacy.unit == "update" and self.shared_buffers:
            raise InputError(
                "privacy",
                "running statistics, which would leave the node without noise",
                "model.buffers = 'local', or a model without any",
            )
        if privacy is not None and privacy.unit == "gradient":
            task = PrivateTask(task, privacy, training.batch_size)
        return replace(self, task=task, training=training, privacy=privacy)

    def releasing(self, release: Release) -> "Setup":
        """Return the setup of a private node for one release, with noise that is for it alone."""
        task = self.task
        if isinstance(task, PrivateTask):
            task = task.drawing(release.stream("gradients"))
        return replace(self, task=task, release=release)

    @property
    def shared_buffers(self) -> Tensors:
        """The buffers that travel, at their initial values."""
        return {} if self.buffers == "local" else self.task.buffers


@dataclass(frozen=True)
class Node:
    """Where and when a step runs.

    Attributes:
        path: the node.
        round: the round, counted from 1; 0 outside of any.
        samples: training samples of the node itself.
        setup: what is the same at every node.
        num_children: children of the node, those not asked included.
        validate: at a leaf, parameters and buffers -> metrics as (sum, count) on its validation
            data, or on its training data where it has none for validation.
        client: at a node with data, what it holds: for a method that looks at samples one by one.
    """

    path: str
    round: int
    samples: int
    setup: Setup
    num_children: int = 0
    validate: Validate | None = None
    client: Client | None = None


@dataclass(frozen=True)
class Child:
    """One child as its parent sees it: its path and what the parent remembers of it."""

    path: str
    link: State


@dataclass(frozen=True)
class Reply:
    """One child's answer, with the link as it was when the child was asked."""

    path: str
    link: State
    message: Message
