"""Ditto: beside the common model every client trains one of its own, held near the common one.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021
(arXiv 2012.04221), Algorithm 1 with FedAvg as the common objective.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods.base import Inner, Scored, Work, begin_work, nest, nested, train_step
from hansa.federation.methods.fedavg import FedAvg
from hansa.federation.node import Node, Setup
from hansa.models.task import Batch


class Ditto(FedAvg):
    """FedAvg, and personal models on F_k(v) + mu / 2 * ||v - w_received||^2."""

    name: ClassVar[str] = "ditto"
    inner: ClassVar[Inner | None] = None
    mu: float = Field(1.0, ge=0, allow_inf_nan=False, strict=True)
    """Weight of the pull to the common model (lambda in the paper); 0 is local-only training."""
    scored: ClassVar[Scored] = "trained"

    def receive(self, node: Node, state: State, down: Message) -> State:
        """Return the common model and the client's own, which begins as the common one."""
        after = super().receive(node, state, down)
        own = {
            "personal": {**after.group("model"), **state.group("personal")},
            "personal_buffers": {**after.group("buffers"), **state.group("personal_buffers")},
        }
        return State({**after.groups, **own})

    def begin(self, node: Node, state: State) -> Work:
        """Return work on both models, and where the common one started."""
        own = begin_work(node.setup, state.group("personal"), state.group("personal_buffers"))
        start = {"start": dict(state.group("model"))}
        return super().begin(node, state) | nest(own, "personal") | start

    def phases(self, work: Work, stage: str) -> Sequence[str]:
        """Return a pass of the common model and one of the personal model."""
        return ("common", "personal")

    def step(self, setup: Setup, work: Work, batch: Batch, phase: str) -> Work:
        """Return the work after a step of one of the two models."""
        if phase == "common":
            return train_step(setup, work, batch)
        own, start = nested(work, "personal"), work["start"]
        pull = {name: self.mu * (p - start[name]) for name, p in own["params"].items()}
        return work | nest(train_step(setup, own, batch, pull=pull), "personal")

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return the personal model as the client's own, and the trained common one."""
        after, reply = super().end(node, state, work)
        own = nested(work, "personal")
        kept = {"personal": own["params"], "personal_buffers": own["buffers"]}
        local = {} if node.setup.shared_buffers else {"buffers": after.group("buffers")}
        return State({**kept, **local}), reply

    def model(self, setup: Setup, state: State) -> tuple[Tensors, Tensors]:
        """Return a client's own model; the common one at the root."""
        if not state.group("personal"):
            return super().model(setup, state)
        return state.group("personal"), state.group("personal_buffers")

    def passes(self, setup: Setup) -> int:
        """Return two passes per epoch, one for each model."""
        return 2 * setup.training.epochs
