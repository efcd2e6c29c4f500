"""Where a step of a method runs: the run's setup, the node, its children and their replies."""

from dataclasses import dataclass
from typing import Literal

from hansa.federation.message import Message, State, Tensors
from hansa.federation.optimizer import Training
from hansa.models.task import Task


@dataclass(frozen=True)
class Setup:
    """What is the same at every node of a run."""

    task: Task
    training: Training
    buffers: Literal["averaged", "local"] = "averaged"
    """Whether running statistics travel and are averaged, or stay at their client."""

    @property
    def shared_buffers(self) -> Tensors:
        """The buffers that travel, at their initial values."""
        return self.task.buffers if self.buffers == "averaged" else {}


@dataclass(frozen=True)
class Node:
    """Where and when a step runs."""

    path: str
    round: int
    samples: int
    setup: Setup


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
