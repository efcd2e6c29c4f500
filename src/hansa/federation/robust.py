"""Robust aggregation as an option of a run, and the means that follow it.

``Setup.mean`` and ``Setup.masked_mean`` return these in the place of plain means where a rule is
set, so methods know of no rule. Under a rule every reply counts the same: a weight is something
that an attacker says. A weight of zero still says that there is nothing to merge.

A plain mean holds one reply at a time. Here all replies of a node's children are held, as they
came, and parts of them once more in float64.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, StrictFloat, StrictInt, model_validator

from hansa.errors import InputError
from hansa.federation.aggregation import MaskedMean, WeightedMean, check_weight
from hansa.federation.message import Tensors
from hansa.federation.participation import Participation
from hansa.federation.robust_rules import Replies, geometric, krum, middles, shortened
from hansa.federation.rules import Rules
from hansa.federation.tree import Tree, name_of

Rule = Literal["median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "norm_bound"]
COUNTING = ("trimmed_mean", "krum", "multi_krum")
"""Rules that must be told how many attackers there may be."""


class Robust(BaseModel):
    """The rule by which inner nodes merge what their children send."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: Rule
    """``median`` and ``trimmed_mean`` look at each entry on its own, the others at whole
    replies."""
    attackers: StrictInt | StrictFloat | None = None
    """Attackers that there may be among the children of a node that reply in a round: a number,
    or with a point in it their share, rounded up; of ``trimmed_mean`` what is cut off at either
    end, of ``krum`` and ``multi_krum`` their f. By default 0.2."""
    bound: StrictInt | StrictFloat | Literal["median"] | None = None
    """Of ``norm_bound``: the longest change of a whole reply, or ``median``, the median of all
    lengths, which is the default."""

    @model_validator(mode="after")
    def _fits(self) -> "Robust":
        if self.attackers is not None and self.rule not in COUNTING:
            raise ValueError(f"attackers belong to {', '.join(COUNTING)}")
        if isinstance(self.attackers, float) and not 0 <= self.attackers < 0.5:
            raise ValueError("attackers as a share must be at least 0 and below 0.5")
        if isinstance(self.attackers, int) and self.attackers < 0:
            raise ValueError("attackers must not be negative")
        if self.bound is not None and self.rule != "norm_bound":
            raise ValueError("a bound belongs to norm_bound")
        if isinstance(self.bound, float | int) and not 0 < self.bound < math.inf:
            raise ValueError("a bound must be positive and finite")
        return self

    def assumed(self, replies: int) -> int:
        """Return how many of some replies may be an attacker's."""
        attackers = 0.2 if self.attackers is None else self.attackers
        if isinstance(attackers, int):
            return attackers
        return math.ceil(attackers * replies - 1e-9)  # 0.3 of 10 is 3, binary floats or not

    def least(self, replies: int) -> int:
        """Return how many replies the rule needs, where there are so many."""
        if self.rule not in COUNTING:
            return 1
        return 2 * self.assumed(replies) + (1 if self.rule == "trimmed_mean" else 3)

    def check(self, num: int, name: str) -> None:
        """Refuse a node that asks too few children.

        Args:
            num: children that it asks in a round.
            name: what it is called.

        Raises:
            InputError: the rule is not defined on so few.
        """
        if num < self.least(num):
            raise InputError(
                "robust.attackers",
                f"{self.assumed(num)} of the {num} children that {name} asks in a round, where "
                f"{self.rule} needs {self.least(num)}",
                "fewer attackers, more children, or a median",
            )


def check_nodes(
    robust: Robust, tree: Tree, participation: Participation, rules: Mapping[str, Rules]
) -> None:
    """Refuse a tree in which some node asks too few children.

    Args:
        robust: the rule.
        tree: the nodes.
        participation: how nodes ask that have no rules of their own.
        rules: node path -> what holds there.

    Raises:
        InputError: see ``Robust.check``.
    """
    for path in tree.walk():
        if children := tree.children(path):
            own = rules.get(path)
            how = (own and own.participation) or participation
            robust.check(len(how.choose(children, 0, path, 1)), name_of(path))


class RobustMean:
    """What a rule makes of replies, in the place of a ``WeightedMean``.

    Where fewer replies came than the rule needs, nothing changes.

    Args:
        robust: the rule.
        before: name -> tensor that a reply would hold which changes nothing.
    """

    def __init__(self, robust: Robust, before: Tensors) -> None:
        self._robust, self._replies = robust, Replies(before)

    def add(self, tensors: Tensors, weight: float) -> None:
        """Add one reply, which is held; a weight of zero adds nothing.

        Raises:
            ValueError: a negative or non-finite weight.
        """
        check_weight(weight)
        if weight:
            self._replies.rows.append(dict(tensors))
            self._replies.masks.append(None)

    def result(self) -> dict[str, torch.Tensor]:
        """Return the result in each tensor's own dtype; nothing where nothing was added."""
        return _result(self._robust, self._replies, None) if len(self._replies) else {}


class RobustMaskedMean:
    """What a rule makes of replies of which each shares a part, for a ``MaskedMean``.

    Rules that look at entries do so over those who share one. To those that look at whole replies
    an entry that is not shared is one that did not change; what they make of it is a mean over
    those who share it, and the value before where they choose nobody who does.

    Args:
        robust: the rule.
        before: name -> tensor that a reply would hold which changes nothing.
    """

    def __init__(self, robust: Robust, before: Tensors) -> None:
        self._robust, self._replies = robust, Replies(before)

    def add(self, tensors: Tensors, mask: Tensors, weight: float) -> None:
        """Add one reply, which is held: tensors of full shape, masks False where they count.

        Raises:
            ValueError: a negative or non-finite weight.
        """
        check_weight(weight)
        if weight:
            self._replies.rows.append(dict(tensors))
            self._replies.masks.append(dict(mask))

    def sent(self) -> dict[str, torch.Tensor]:
        """Return bool tensors, True where somebody shares an entry."""
        found = {n: torch.zeros(t.shape, dtype=torch.bool) for n, t in self._replies.before.items()}
        for mask in self._replies.masks:
            for name, shared in found.items():
                shared |= ~mask[name]  # type: ignore[index]
        return found

    def result(self, vacant: Tensors) -> dict[str, torch.Tensor]:
        """Return the result in each tensor's own dtype, and ``vacant`` where nobody shares."""
        before = self._replies.before
        sent = self.sent()
        made = _result(self._robust, self._replies, sent) if len(self._replies) else dict(before)
        return {n: torch.where(sent[n], made[n], vacant[n]) for n in before}


def _result(robust: Robust, replies: Replies, sent: Tensors | None) -> dict[str, torch.Tensor]:
    """Return what a rule makes of at least one reply."""
    num, before = len(replies), replies.before
    if num < robust.least(num):
        return dict(before)
    if robust.rule in ("median", "trimmed_mean"):
        cut = None if robust.rule == "median" else _cut(robust)
        return middles(replies, list(before), cut)
    names, rows = replies.names(floating=True), replies.rows
    weights = [1.0] * num
    if robust.rule == "geometric_median":
        weights = geometric(replies, names)
    elif robust.rule == "norm_bound":
        bound = robust.bound if isinstance(robust.bound, float | int) else None
        rows = shortened(replies, names, bound)
    else:
        attackers = robust.assumed(num)
        chosen = 1 if robust.rule == "krum" else num - attackers
        weights = krum(replies, names, attackers, chosen)
    # Whole numbers (a counter of batches) have no distances; their median is robust as it is.
    counters = middles(replies, replies.names(floating=False), None)
    if sent is None:
        mean = WeightedMean()
        for row, weight in zip(rows, weights, strict=True):
            mean.add({name: row[name] for name in names}, weight)
        made = {**mean.result(), **counters}
        return {name: made[name] for name in before}
    masked = MaskedMean({name: before[name] for name in names})
    for row, mask, weight in zip(rows, replies.masks, weights, strict=True):
        masked.add({n: row[n] for n in names}, mask or {}, weight)
    return {**masked.result(before), **counters}


def _cut(robust: Robust) -> Any:
    """Return how many are cut off at either end, of so many as share an entry."""
    if isinstance(robust.attackers, int):
        fixed = robust.attackers
        return lambda counts: torch.full_like(counts, fixed)
    share = 0.2 if robust.attackers is None else robust.attackers
    return lambda counts: (share * counts - 1e-9).ceil().long()
