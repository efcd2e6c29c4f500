"""pFedMe: personal models as Moreau envelopes around a common one.

Dinh et al., "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020
(arXiv 2006.08848), Algorithm 1.
"""

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from pydantic import Field

from hansa.errors import InputError
from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods.base import Inner, Scored, Work, begin_work, nest, nested, train_step
from hansa.federation.methods.fedavg import FedAvg
from hansa.federation.node import Node, Reply, Setup
from hansa.federation.tree import ROOT
from hansa.models.task import Batch


class PFedMe(FedAvg):
    """On every batch: some steps of theta on F_k(theta) + lam / 2 * ||theta - w||^2, then one of w.

    ``w`` is what travels, ``theta`` is the client's model.
    """

    name: ClassVar[str] = "pfedme"
    inner: ClassVar[Inner | None] = None
    lam: float = Field(1.0, gt=0, allow_inf_nan=False, strict=True)
    """Weight lambda of the pull between the two; a learning rate times it must not exceed 1."""
    steps: int = Field(5, ge=1, strict=True)
    """Steps K of theta on each batch."""
    local_lr: float | None = Field(None, gt=0, allow_inf_nan=False, strict=True)
    """Learning rate eta of w; by default that of the run."""
    beta: float = Field(1.0, gt=0, allow_inf_nan=False, strict=True)
    """Step of the common model towards the mean of the replies; 1 takes the mean."""
    weighting: Literal["samples", "uniform"] = "uniform"
    scored: ClassVar[Scored] = "trained"

    def check(self, setup: Setup, depth: int) -> None:
        """Refuse learning rates with which the pull would overshoot."""
        super().check(setup, depth)
        rates = {"training.lr": setup.training.lr, "training.lr_end": setup.training.lr_end}
        for key, rate in (rates | {"method.local_lr": self.local_lr}).items():
            if rate is not None and rate * self.lam > 1:
                raise InputError(key, f"{rate} with method.lam = {self.lam}", "lr * lam <= 1")

    def begin(self, node: Node, state: State) -> Work:
        """Return work on w, and on theta, which starts from it."""
        work = super().begin(node, state)
        theta = begin_work(node.setup, state.group("model"), state.group("buffers"))
        return work | nest(theta, "personal")

    def step(self, setup: Setup, work: Work, batch: Batch, phase: str) -> Work:
        """Return the work after K steps of theta, and one of w towards it."""
        w, theta = work["params"], nested(work, "personal")
        for _ in range(self.steps):
            pull = {name: self.lam * (p - w[name]) for name, p in theta["params"].items()}
            theta = train_step(setup, theta, batch, pull=pull)
        moved = {}
        for name, p in w.items():
            pace: float | torch.Tensor = (self.local_lr or setup.training.lr) * self.lam
            if self.local_lr is None and "rate" in work:
                pace = work["rate"]["lr"].to(p.dtype) * self.lam
            moved[name] = torch.lerp(p, theta["params"][name], pace)
        groups = {"params": moved, "buffers": theta["buffers"], "metrics": theta["metrics"]}
        return work | groups | nest(theta, "personal")

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return theta as the client's own model, and w for the parent."""
        after, reply = super().end(node, state, work)
        theta = {"theta": nested(work, "personal")["params"]}
        return State({**theta, "buffers": after.group("buffers")}), reply

    def aggregate(self, node: Node, state: State, replies: Iterable[Reply]) -> State:
        """Return the common model after its step towards the mean, which the root makes."""
        after = super().aggregate(node, state, replies)
        if node.path != ROOT:
            return after
        before, mean = state.group("model"), after.group("model")
        model = {name: torch.lerp(before[name], p, self.beta) for name, p in mean.items()}
        return State({**after.groups, "model": model}, after.scalars, after.metrics)

    def model(self, setup: Setup, state: State) -> tuple[Tensors, Tensors]:
        """Return a client's theta; w at the root and at a client that has none yet."""
        params, buffers = super().model(setup, state)
        return {**params, **state.group("theta")}, buffers

    def passes(self, setup: Setup) -> int:
        """Return K passes per epoch, one for each step on a batch."""
        return self.steps * setup.training.epochs
