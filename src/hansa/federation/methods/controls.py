"""Controls for FedSelect: the same rounds with masks chosen in another way.

They tell what the choice of entries is worth beside the bare fact that some are personal.
"""

from typing import ClassVar

import torch

from hansa.errors import InputError
from hansa.federation.message import Tensors
from hansa.federation.methods.fedselect import FedSelect
from hansa.federation.methods.layers import check_patterns, head
from hansa.federation.methods.masks import Masks, filled
from hansa.federation.node import Node, Setup
from hansa.seeding import generator


class RandomMask(FedSelect):
    """FedSelect whose entries become personal by lot: masks of equal size at every moment."""

    name: ClassVar[str] = "random-mask"

    def rank(self, node: Node, moved: Tensors) -> Tensors:
        """Return random numbers, drawn per client and round."""
        rng = generator(node.setup.seed, node.path, node.round, "random-mask")
        return {name: torch.rand(change.shape, generator=rng) for name, change in moved.items()}


class LeastChange(FedSelect):
    """FedSelect reversed: the entries that moved least become personal."""

    name: ClassVar[str] = "least-change"

    def rank(self, node: Node, moved: Tensors) -> Tensors:
        """Return the change with its sign turned."""
        return {name: -change for name, change in moved.items()}


class HeadMask(FedSelect):
    """FedSelect's two passes and averaging under a fixed mask: the head of the model."""

    name: ClassVar[str] = "head-mask"
    personal: tuple[str, ...] | None = None
    """Patterns of parameter names, such as ``head.*``; by default those of the last layer."""

    def first_mask(self, setup: Setup) -> Masks:
        """Return the head, from the first round on."""
        return filled(setup.task.params, head(setup.task.params, self.personal))

    def check(self, setup: Setup, depth: int) -> None:
        """Refuse patterns that fit no parameter."""
        super().check(setup, depth)
        if self.mode == "workshop":
            raise InputError("method.mode", "'workshop', which finds masks anew", "cvpr")
        check_patterns("method.personal", setup.task.params, self.personal)

    def promote(self, mask: Tensors, ranking: Tensors, rate: float) -> Masks:
        """Return the masks as they are."""
        return dict(mask)
