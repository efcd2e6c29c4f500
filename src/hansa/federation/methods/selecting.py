"""Which entries become personal, and how many: the options and quotas of a selection."""

from typing import Literal

import torch
from pydantic import Field

from hansa.federation.message import Tensors
from hansa.federation.methods.masked import MaskedSharing
from hansa.federation.methods.masks import Masks, ceiling, filled, grow, joined, keep, parted
from hansa.federation.methods.official import Quirk, grow_with_ties
from hansa.federation.node import Setup


class Selecting(MaskedSharing):
    """Masks that grow, or shrink, by a ranking of the entries."""

    rate: float = Field(0.05, ge=0, le=1, strict=True)
    """Share p of the still shared entries that become personal at once; in the workshop form the
    share of the candidates that each of its iterations keeps."""
    limit: float = Field(0.3, ge=0, le=1, strict=True)
    """Ceiling alpha on the personal share; of no use in the workshop form."""
    quota: Literal["tensor", "global"] = "tensor"
    """Whether rate and limit hold tensor by tensor, or over all entries together."""
    biases: bool = Field(True, strict=True)
    """Whether entries of parameters called ``bias`` may become personal."""
    quirks: tuple[Quirk, ...] = ()
    """What to do as the released code does."""

    def promote(self, mask: Tensors, ranking: Tensors, rate: float) -> Masks:
        """Return the masks with more personal entries, those of the highest rank, by the quota."""
        grown = dict(mask)
        names = [name for name in mask if self._may_be_personal(name)]
        if self.quota == "global":
            chosen = {name: mask[name] for name in names}
            if chosen:
                row, ranks = joined(chosen), joined({name: ranking[name] for name in names})
                # The limit is one of the whole model; the row may be only a part of it.
                most = ceiling(sum(m.numel() for m in mask.values()), self.limit)
                grown |= parted(grow(row, ranks, rate, min(1.0, most / len(row))), chosen)
            return grown
        for name in names:
            held, limit_ = mask[name], self.limit
            if "overshoot" in self.quirks:
                limit_ = 0.0 if held.double().mean() > self.limit else 1.0
            if "ties" in self.quirks and limit_:
                grown[name] = grow_with_ties(held, ranking[name], rate)
                if "overshoot" not in self.quirks and grown[name].double().mean() > self.limit:
                    grown[name] = grow(held, ranking[name], rate, self.limit)
            else:
                grown[name] = grow(held, ranking[name], rate, limit_)
        return grown

    def keep_highest(self, mask: Tensors, ranking: Tensors) -> Masks:
        """Return the share ``rate`` of the candidates that ranks highest."""
        if self.quota == "global":
            return parted(keep(joined(mask), joined(ranking), self.rate), mask)
        return {name: keep(m, ranking[name], self.rate) for name, m in mask.items()}

    def maskable(self, setup: Setup) -> Masks:
        """Return where entries may become personal at all."""
        params = setup.task.params
        return filled(params, {name for name in params if self._may_be_personal(name)})

    def _may_be_personal(self, name: str) -> bool:
        if "weights-only" in self.quirks:
            return "weight" in name
        return self.biases or name.rpartition(".")[2] != "bias"

    def unshared(self, names: Tensors) -> frozenset[str]:
        """Return the parameters that the released code never sends."""
        if "unshared-names" not in self.quirks:
            return frozenset()
        return frozenset(n for n in names if "weight" not in n and "bias" not in n)

    def vacant(self, last: torch.Tensor) -> torch.Tensor:
        """Return the last values, or the zeros of the released code."""
        return torch.zeros_like(last) if "holes" in self.quirks else last
