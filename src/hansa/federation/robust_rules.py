"""The rules of robust aggregation, over replies that are all held.

================  ==============================================================  ===============
rule              what it makes of n replies, f of which may be anything           source
================  ==============================================================  ===============
median            the median of each entry                                         Yin et al. 2018
trimmed mean      of each entry the mean without the f lowest and f highest        Yin et al. 2018
Krum              the reply nearest to its n - f - 2 nearest others                Blanchard et al.
multi-Krum        the mean of the n - f replies of the best such scores            2017
geometric median  the point of the least sum of distances to the replies           Pillutla et al.
norm bound        the mean of changes that were shortened to a bound               Sun et al. 2019
================  ==============================================================  ===============

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018
(arXiv 1803.01498). Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant
Gradient Descent", NeurIPS 2017 (arXiv 1703.02757). Pillutla et al., "Robust Aggregation for
Federated Learning", IEEE TSP 2022 (arXiv 1912.13445). Sun et al., "Can You Really Backdoor
Federated Learning?", 2019 (arXiv 1911.07963).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from hansa.federation.message import Tensors

AT_ONCE = 1 << 22
"""Entries, over all replies, that are brought to float64 at a time."""
ITERATIONS = 200
"""Most steps of Weiszfeld's algorithm; it mostly ends after some tens."""
SMOOTHING = 1e-6
"""Least distance that counts in it, in median distances."""

Cut = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Part:
    """Some entries of one tensor over all replies, in float64.

    Attributes:
        name: the tensor.
        values: [replies, entries]; where an entry is not shared, the value before.
        hidden: bool of the same shape, True where it is not shared; None where all is shared.
        before: [entries], the values that the replies' senders began with.
    """

    name: str
    values: torch.Tensor
    hidden: torch.Tensor | None
    before: torch.Tensor


@dataclass
class Replies:
    """Replies as they came: all of them are held, which a plain mean never does.

    Attributes:
        before: name -> tensor that a reply would hold which changes nothing.
        rows: for each reply name -> tensor.
        masks: for each reply name -> bool tensor, True where an entry is not shared; None where
            all of it is.
    """

    before: Tensors
    rows: list[Tensors] = field(default_factory=list)
    masks: list[Tensors | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def names(self, floating: bool) -> list[str]:
        """Return the tensors of floating-point numbers, or the others."""
        return [n for n, t in self.before.items() if t.dtype.is_floating_point == floating]

    def parts(self, names: Sequence[str]) -> Iterator[Part]:
        """Yield the entries of some tensors, part after part."""
        size = max(1, AT_ONCE // max(1, len(self)))
        for name in names:
            rows = [row[name].flatten() for row in self.rows]
            masks = [None if mask is None else mask[name].flatten() for mask in self.masks]
            old = self.before[name].flatten()
            for start in range(0, len(old), size):
                some = slice(start, start + size)
                values = torch.stack([row[some] for row in rows]).double()
                before, hidden = old[some].double(), None
                cut = [mask[some] for mask in masks if mask is not None]
                if cut:
                    hidden = torch.stack(cut)
                    values = torch.where(hidden, before, values)
                yield Part(name, values, hidden, before)

    def in_shape(self, parts: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return tensors whose entries were made part by part, in their own dtypes."""
        made = {}
        for name, rows in parts.items():
            like, row = self.before[name], torch.cat(rows)
            row = row if like.dtype.is_floating_point else row.nan_to_num().round()
            made[name] = row.to(like.dtype).reshape(like.shape)
        return made


def middles(replies: Replies, names: Sequence[str], cut: Cut | None) -> dict[str, torch.Tensor]:
    """Return of each entry the mean without the lowest and the highest of those who share it.

    Args:
        replies: at least one.
        names: the tensors.
        cut: number who share an entry -> how many are left out at either end; at most so many
            that one or two are left, which is the median, and is what None asks for.
    """
    made: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for part in replies.parts(names):
        values, place = part.values, torch.arange(len(replies))[:, None]
        counts = torch.full_like(part.before, len(replies), dtype=torch.int64)
        if part.hidden is not None:
            counts = (~part.hidden).sum(0)
            values = values.masked_fill(part.hidden, torch.inf)  # behind all others
        most = ((counts - 1) // 2).clamp(min=0)
        low = most if cut is None else torch.minimum(cut(counts), most)
        inside = (place >= low) & (place < counts - low)
        total = torch.where(inside, values.sort(0).values, 0.0).sum(0)
        made[part.name].append(total / (counts - 2 * low))
    return replies.in_shape({name: rows for name, rows in made.items() if rows})


def squared_distances(replies: Replies, names: Sequence[str]) -> torch.Tensor:
    """Return the squared distance of every two replies [n, n]."""
    found = torch.zeros(len(replies), len(replies), dtype=torch.float64)
    for part in replies.parts(names):
        # One by one and not by products, in which a huge reply would drown the others.
        found += torch.stack([(part.values - row).square().sum(1) for row in part.values])
    return found


def norms(replies: Replies, names: Sequence[str]) -> torch.Tensor:
    """Return the length of each reply's change [n]."""
    found = torch.zeros(len(replies), dtype=torch.float64)
    for part in replies.parts(names):
        found += (part.values - part.before).square().sum(1)
    return found.sqrt()


def krum(replies: Replies, names: Sequence[str], attackers: int, chosen: int) -> list[float]:
    """Return 1 for each of the ``chosen`` replies of the best scores, the first of equals.

    A reply's score is the sum of its squared distances to its n - attackers - 2 nearest others.

    Args:
        replies: at least 2 * attackers + 3.
        names: the tensors that distances are over.
        attackers: how many of them may be anything.
        chosen: how many are taken: one is Krum, more is multi-Krum.
    """
    distances = squared_distances(replies, names).fill_diagonal_(torch.inf)
    near = len(replies) - attackers - 2
    scores = distances.sort(1).values[:, :near].sum(1)
    taken = set(scores.argsort(stable=True)[:chosen].tolist())
    return [1.0 if k in taken else 0.0 for k in range(len(replies))]


def geometric(replies: Replies, names: Sequence[str]) -> list[float]:
    """Return each reply's weight in the geometric median, which is a mean so weighted.

    Weiszfeld's algorithm, smoothed as in the paper, from the median of each entry: from the mean,
    one huge reply would make the way long.
    """
    parts = list(replies.parts(names)) if _fits(replies, names) else None

    def each() -> Iterator[Part]:
        return iter(parts) if parts is not None else replies.parts(names)

    def distances(point: Sequence[torch.Tensor]) -> torch.Tensor:
        squares = torch.zeros(len(replies), dtype=torch.float64)
        for part, row in zip(each(), point, strict=True):
            squares += (part.values - row).square().sum(1)
        return squares.sqrt()

    away = distances([part.values.median(0).values for part in each()])
    least = SMOOTHING * float(away.median())
    if least == 0:  # more than half are one and the same
        return [1.0 if one == 0 else 0.0 for one in away.tolist()]
    weights = torch.zeros(len(replies), dtype=torch.float64)
    for _ in range(ITERATIONS):
        last, weights = weights, 1 / away.clamp(min=least)
        weights = weights / weights.sum()
        if (weights - last).abs().max() < 1e-9:
            break
        away = distances([weights @ part.values for part in each()])
    return weights.tolist()


def shortened(replies: Replies, names: Sequence[str], bound: float | None) -> list[Tensors]:
    """Return the replies with changes no longer than a bound.

    Args:
        replies: at least one.
        names: the tensors that lengths are over; all others stay as they are.
        bound: the longest change; None takes the median of their lengths.
    """
    lengths = norms(replies, names)
    most = float(lengths.quantile(0.5)) if bound is None else bound
    rows: list[Tensors] = []
    for row, length in zip(replies.rows, lengths.tolist(), strict=True):
        if length > most:
            old = replies.before
            row = dict(row) | {
                n: torch.lerp(old[n].double(), row[n].double(), most / length).to(old[n].dtype)
                for n in names
            }
        rows.append(row)
    return rows


def _fits(replies: Replies, names: Sequence[str]) -> bool:
    """Tell whether all replies may stand in memory in float64 beside themselves."""
    return len(replies) * sum(replies.before[n].numel() for n in names) <= AT_ONCE
