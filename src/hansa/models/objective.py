"""Objectives: what a task makes of a model's logits.

An objective is a pure function of tensors, without control flow that depends on their values, so
that ``vmap`` can take it for many clients at once.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

Metrics = dict[str, torch.Tensor]


class Objective(ABC):
    """A loss that is minimised, and the metrics that go with it.

    Attributes:
        sums: names of the metrics of a batch, which are sums; to add them over batches gives those
            of a data set.
    """

    sums: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "count")

    @abstractmethod
    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, Metrics]:
        """Return the loss of a batch that is differentiated, and its metrics.

        Args:
            logits: what the model returns, [batch, ..., classes].
            labels: the right classes, int64 [batch, ...].
            weights: 1 for a sample, 0 for what only fills the batch up, [batch]; None where all
                are samples.

        Returns:
            The scalar mean cross-entropy in nats, 0 where all weights are 0; and the metrics
            ``sums`` names, of which ``loss`` is a sum in nats, ``accuracy`` the number of labels
            with the largest logit, and ``count`` the number of labels.
        """

    def totals(self, sums: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Return the scores of a data set as (sum, count), from sums over its batches."""
        return {name: (sums[name], sums["count"]) for name in ("loss", "accuracy")}

    def to(self, device: str | torch.device) -> "Objective":
        """Return the objective on another device."""
        return self


class Classification(Objective):
    """One class per sample: logits [batch, classes], labels [batch]."""

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, Metrics]:
        """Return the mean cross-entropy over samples, and its metrics; see ``Objective``."""
        correct = logits.detach().argmax(1) == labels
        if weights is not None:
            count = weights.sum()
            total = (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
            # Where every weight is 0 the loss is 0 as well.
            loss, right = total / count.clamp(min=1), (correct * weights).sum()
            return loss, {"loss": total.detach(), "accuracy": right, "count": count}
        loss, num = F.cross_entropy(logits, labels), len(labels)
        count = torch.full_like(loss, num, requires_grad=False)
        return loss, {"loss": loss.detach() * num, "accuracy": correct.sum(), "count": count}


@dataclass(frozen=True, eq=False)
class NextToken(Objective):
    """The token after each: logits [batch, T, V], labels [batch, T], shifted by one already.

    A sequence is a sample: weights are [batch], and every token of a sequence counts the same.
    Labels below 0 (``data.clients.IGNORED``: a question, padding) are no part of the loss nor of
    any count. Beside the loss per token a data set has ``bits_per_byte``, which compares over
    tokenizers.

    Attributes:
        bytes_of: bytes of UTF-8 text that each token stands for, int64 [V]; None for one each.
    """

    sums: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "count", "bytes")

    bytes_of: torch.Tensor | None = None

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, Metrics]:
        """Return the mean cross-entropy over tokens, and its metrics; see ``Objective``."""
        correct, counts = logits.detach().argmax(-1) == labels, labels >= 0
        sizes = counts.long()
        if self.bytes_of is not None:
            sizes = self.bytes_of[labels.clamp(min=0)] * counts
        rows, targets = logits.flatten(0, 1), labels.flatten()
        if weights is None:
            loss = F.cross_entropy(rows, targets)  # which leaves out labels of -100
            count = counts.sum().to(loss.dtype)
            total = loss.detach() * count
        else:
            each = F.cross_entropy(rows, targets, reduction="none").reshape(labels.shape)
            by_token = weights.unsqueeze(1)
            total, correct, sizes = (each * by_token).sum(), correct * by_token, sizes * by_token
            count = (counts * by_token).sum()
            loss = total / count.clamp(min=1)
        right, size = correct.sum(), sizes.sum()
        return loss, {"loss": total.detach(), "accuracy": right, "count": count, "bytes": size}

    def totals(self, sums: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Return loss and accuracy per token, and bits per byte of text, as (sum, count)."""
        bits = sums["loss"] / math.log(2)
        return {**super().totals(sums), "bits_per_byte": (bits, sums["bytes"])}

    def to(self, device: str | torch.device) -> "NextToken":
        """Return the objective with its table on another device."""
        return self if self.bytes_of is None else NextToken(self.bytes_of.to(device))


CLASSIFICATION = Classification()
