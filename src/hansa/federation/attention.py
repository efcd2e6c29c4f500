"""Attention over parameters: a mean of several nodes' tensors, weighted by how alike they are.

Our reading of WorldLM's attentive aggregation (Iacob et al. 2024, arXiv 2405.14446). The paper
names neither the similarity nor its granularity, so each is an option.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hansa.federation.message import Tensors

Score = Literal["cosine", "centred", "dot"]
Granularity = Literal["block", "tensor", "row"]
Blocks = Mapping[str, Sequence[str]]
"""Block -> the names of its tensors, in a fixed order."""


@dataclass(frozen=True)
class Attention:
    """How the entries of a bank are weighted.

    With x_q the query, x_j the j-th entry and d their length::

        cosine:   s_j = <x_q, x_j> / (|x_q| |x_j| tau)
        centred:  the same, of x - mean over the bank
        dot:      s_j = <x_q, x_j> / sqrt(d)
        a = softmax(s),  out = sum_j a_j x_j

    Attributes:
        score: which of them, or None for equal weights.
        granularity: whether x is a whole block, a tensor of it, or a row of a tensor (a vector
            counts as one row).
        temperature: tau of the cosines.
    """

    score: Score | None = "cosine"
    granularity: Granularity = "block"
    temperature: float = 0.1

    def __call__(
        self, query: Tensors, bank: Sequence[Tensors], blocks: Blocks
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return the weighted mean of a bank, and the weights.

        Args:
            query: name -> tensor of every block.
            bank: entries of equal shapes; each holds whole blocks, and those it lacks it takes no
                part in. The query itself is no part of it unless it stands there.
            blocks: the blocks and their tensors.

        Returns:
            name -> tensor, the query's own where no entry holds the block; and block -> weights
            [entries], averaged over its tensors or rows by their sizes, 0 for those without part.
        """
        out: dict[str, torch.Tensor] = {}
        weights: dict[str, torch.Tensor] = {}
        for block, names in blocks.items():
            part = [k for k, entry in enumerate(bank) if names[0] in entry]
            total = torch.zeros(len(bank), dtype=torch.float64)
            if not part:
                out |= {name: query[name] for name in names}
                weights[block] = total
                continue
            units = [list(names)] if self.granularity == "block" else [[name] for name in names]
            size = 0
            for unit in units:
                entries = torch.stack([self._rows(bank[k], unit) for k in part])  # [n, rows, d]
                a = self._weights(self._rows(query, unit), entries)  # [n, rows]
                mixed = (a.unsqueeze(-1) * entries).sum(0)
                out |= _split(mixed, query, unit)
                length = entries.shape[2]
                total[part] += a.sum(1) * length
                size += entries.shape[1] * length
            weights[block] = total / size
        return out, weights

    def _rows(self, tensors: Tensors, unit: Sequence[str]) -> torch.Tensor:
        """Return what is weighted together, as float64 [rows, d]."""
        if self.granularity == "row" and tensors[unit[0]].dim() > 1:
            return tensors[unit[0]].detach().double().flatten(1)
        return torch.cat([tensors[name].detach().double().flatten() for name in unit])[None]

    def _weights(self, query: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """Return the weights [n, rows] of entries [n, rows, d] for a query [rows, d]."""
        if self.score is None:
            return torch.full(entries.shape[:2], 1 / len(entries), dtype=torch.float64)
        if self.score == "dot":
            scores = (entries * query).sum(-1) / entries.shape[-1] ** 0.5
        else:
            centre = entries.mean(0) if self.score == "centred" else 0.0
            scores = cosine(query - centre, entries - centre) / self.temperature
        return torch.softmax(scores, 0)


def cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the cosine of the last dimensions, 0 where one of them is nought."""
    norms = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
    products = (x * y).sum(-1)
    return torch.where(norms > 0, products / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0.0)


def likeness(x: Tensors, y: Tensors, names: Sequence[str]) -> float:
    """Return the cosine of two nodes' tensors of one block, laid end to end."""
    first, second = (
        torch.cat([tensors[name].detach().double().flatten() for name in names])
        for tensors in (x, y)
    )
    return float(cosine(first, second))


def entropy(weights: torch.Tensor) -> float:
    """Return the entropy of weights in nats: 0 for one entry alone, log n for n equal ones."""
    return float(torch.special.entr(weights.double()).sum())


def _split(mixed: torch.Tensor, like: Tensors, unit: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return rows [rows, d] as the tensors they were made of."""
    out, start, flat = {}, 0, mixed.flatten()
    for name in unit:
        size = like[name].numel()
        out[name] = flat[start : start + size].view(like[name].shape).to(like[name].dtype)
        start += size
    return out
