"""How well scores and filters tell samples of known kind apart; clean is what is looked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

CLEAN = "clean"


def auroc(good: torch.Tensor, bad: torch.Tensor) -> float:
    """Return the chance that a good sample scores above a bad one, ties by half.

    Args:
        good: scores of good samples [n], numbers, higher for better ones.
        bad: scores of bad samples [m].

    Returns:
        NaN where there are none of either.
    """
    if not len(good) or not len(bad):
        return float("nan")
    from scipy.stats import rankdata  # a second, for whoever asks for it only

    ranks = rankdata(torch.cat([good, bad]).double().numpy())
    above = ranks[: len(good)].sum() - len(good) * (len(good) + 1) / 2
    return float(above / (len(good) * len(bad)))


@dataclass(frozen=True)
class Selection:
    """A filter against what is known: shares of 0 to 1, NaN where there is nothing to count.

    Attributes:
        precision: clean among what is kept.
        recall: kept among what is clean.
        f1: harmonic mean of both.
        kept: kept among all.
    """

    precision: float
    recall: float
    f1: float
    kept: float


def selection(kept: torch.Tensor, clean: torch.Tensor) -> Selection:
    """Compare what was kept [n] with what is clean [n], both bool."""
    both, num = int((kept & clean).sum()), len(kept)
    precision, recall = _share(both, int(kept.sum())), _share(both, int(clean.sum()))
    f1 = _share(2 * both, int(kept.sum()) + int(clean.sum()))
    return Selection(precision, recall, f1, _share(int(kept.sum()), num))


def by_kind(scores: torch.Tensor, kinds: Sequence[str]) -> dict[str, float]:
    """Return the AUROC of clean samples against those of each kind of corruption, and of all.

    Args:
        scores: oriented scores [n]; those that are no numbers are left out.
        kinds: kind of each sample; those of unknown kind (empty) are left out.
    """
    known = {
        kind: scores[torch.tensor([k == kind for k in kinds]) & scores.isfinite()]
        for kind in dict.fromkeys(kinds)
        if kind
    }
    good = known.pop(CLEAN, scores[:0])
    found = {kind: auroc(good, known[kind]) for kind in sorted(known)}
    return found | {"all": auroc(good, torch.cat([scores[:0], *known.values()]))}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
