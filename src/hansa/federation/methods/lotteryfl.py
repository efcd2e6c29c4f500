"""LotteryFL: clients find lottery tickets, sparse parts of the model, and share only those.

Li et al., "LotteryFL: Personalized and Communication-Efficient Federated Learning with Lottery
Ticket Hypothesis on Non-IID Datasets", 2020 (arXiv 2008.03371), Algorithm 1.
"""

from typing import ClassVar

import torch
from pydantic import Field

from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods.base import Work, begin_work, train_step
from hansa.federation.methods.masked import MaskedSharing
from hansa.federation.methods.masks import Masks, grow
from hansa.federation.node import Node, Setup
from hansa.models.task import Batch


class LotteryFL(MaskedSharing):
    """Prune where the received part of the model is good enough, and rewind what is left.

    A masked entry is one that the client has pruned: it is zero, and not shared. From its second
    round on a client first measures what it received on its validation data; at or above
    ``accuracy``, and below the target, it prunes the smallest weights, tensor by tensor, and
    starts again from the initial values of the rest. Vectors (biases, norms) are not pruned.
    """

    name: ClassVar[str] = "lotteryfl"
    rate: float = Field(0.1, ge=0, le=1, strict=True)
    """Share of the remaining entries that are pruned at once."""
    target: float = Field(0.5, ge=0, le=1, strict=True)
    """Ceiling on the pruned share of each tensor."""
    accuracy: float = Field(0.5, ge=0, le=1, strict=True)
    """Validation accuracy from which on a client prunes."""
    mask_is: ClassVar[str] = "pruned"

    def sent_mask(self, node: Node, state: State) -> Masks:
        """Return the mask that the client last trained with."""
        return self.used(node.setup, state)

    def receive(self, node: Node, state: State, down: Message) -> State:
        """Return the client's part of the model, pruned and rewound where that is due."""
        after = self.received(node, state, down)
        pruned = after.group("expected")
        model = _zeroed(after.group("model"), pruned)
        if state and node.validate is not None:
            correct, count = node.validate(model, after.group("buffers"))["accuracy"]
            more = {name: self._prune(model[name], mask) for name, mask in pruned.items()}
            changes = any(not torch.equal(more[n], pruned[n]) for n in more)
            if changes and correct >= self.accuracy * count:
                pruned, model = more, _zeroed(node.setup.task.params, more)
        return State({**after.groups, "model": model, "mask": pruned})

    def _prune(self, value: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
        return pruned if value.dim() < 2 else grow(pruned, -value.abs(), self.rate, self.target)

    def begin(self, node: Node, state: State) -> Work:
        """Return work that carries what is left."""
        left = {name: ~mask for name, mask in state.group("mask").items()}
        return begin_work(node.setup, state.group("model"), state.group("buffers"), left=left)

    def step(self, setup: Setup, work: Work, batch: Batch, phase: str) -> Work:
        """Return the work after a step that leaves pruned entries at zero."""
        return train_step(setup, work, batch, phase, mask=work["left"])

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return the trained model with its mask, and the remaining values for the parent."""
        mask = state.group("mask")
        reply = self.report(node, state, work, mask, mask)
        groups = {"model": work["params"], "buffers": work["buffers"], "mask": mask, "next": mask}
        return State(groups), reply


def _zeroed(tensors: Tensors, mask: Tensors) -> Tensors:
    return {name: tensor.masked_fill(mask[name], 0) for name, tensor in tensors.items()}
