"""From the scores of public anchors to what every client keeps: one rule, the same for all.

``anchor_mean``
    The mean of the anchors' scores (arXiv 2403.04529, section 3.3, with 10 anchors). It cuts clean
    data in half by construction; it is here to compare with.
``anchor_quantile``
    The k-th smallest of m anchor scores, k = floor(rate (m + 1)): where anchors and clean samples
    are exchangeable, a clean sample falls below it with a chance of at most k / (m + 1) <= rate
    (split conformal prediction, Vovk et al. 2005). Given the anchors, that chance is distributed
    as Beta(k, m + 1 - k), which gives the bound that is stated with it; ``confidence`` makes k as
    large as may be while the chance is at most ``rate`` with that confidence. Where k is 0 nothing
    is rejected: the anchors are too few for the rate.
``share``
    The same share of every client, by its own ranking. It needs no anchors.

Several scores are combined by their mean rank among anchors. Half of the anchors then serve as the
ranks' reference, the other half sets the threshold, so that the above holds for it as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hansa.errors import InputError

FEWEST = 5
"""Anchors below which no threshold is set at all."""
EVERYTHING = float("-inf")
Scores = Mapping[str, torch.Tensor]


class ThresholdOptions(BaseModel):
    """How the threshold is set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["anchor_quantile", "anchor_mean", "share"] = "anchor_quantile"
    """The rule."""
    rate: float = Field(0.1, gt=0, lt=1)
    """Of ``anchor_quantile``: most clean samples that are rejected, as a share."""
    confidence: float | None = Field(None, gt=0.5, lt=1)
    """Of ``anchor_quantile``: how sure ``rate`` is; by default it holds on average over draws of
    the anchors."""
    per_domain: bool = False
    """Whether a sample is compared with the anchors of its own domain, where there are enough."""
    pool_below: int = Field(20, ge=FEWEST, strict=True)
    """Of ``per_domain``: a domain with fewer anchors takes the threshold of all of them."""
    share: float = Field(0.7, gt=0, le=1)
    """Of ``share``: what every client keeps."""
    anchors: int | None = Field(None, ge=1, strict=True)
    """The first so many anchors; all of them by default."""

    @model_validator(mode="after")
    def _goes_together(self) -> "ThresholdOptions":
        if self.kind == "share" and self.per_domain:
            raise ValueError("per_domain with anchor_quantile or anchor_mean alone")
        return self


@dataclass(frozen=True)
class Bound:
    """What is known of the chance that a clean sample is rejected.

    Attributes:
        anchors: how many the threshold was set by.
        rank: the threshold is the anchor of this rank from below; 0 rejects nothing.
        expected: the chance on average over draws of the anchors.
        upper: what it is at most, with a confidence of 95 %.
    """

    anchors: int
    rank: int
    expected: float
    upper: float


@dataclass(frozen=True)
class Threshold:
    """What goes down to the clients.

    Attributes:
        by: the scores that decide, combined where they are several.
        share: what each client keeps of its own, where the rule is ``share``.
        levels: domain's number -> threshold; -1 stands for all other domains.
        reference: score -> sorted anchor scores that ranks are among; empty for a single score.
        anchors: domain's number -> sorted scores of the anchors that set its threshold.
        bounds: domain's number -> what is known of it, of ``anchor_quantile``.
    """

    by: tuple[str, ...]
    share: float | None = None
    levels: Mapping[int, float] = field(default_factory=dict)
    reference: Scores = field(default_factory=dict)
    anchors: Mapping[int, torch.Tensor] = field(default_factory=dict)
    bounds: Mapping[int, Bound] = field(default_factory=dict)

    def combined(self, scores: Scores) -> torch.Tensor:
        """Return one number for each sample [n], higher for better ones, of oriented scores."""
        if not self.reference:
            return scores[self.by[0]].double()
        ranks = [rank(scores[name], self.reference[name]) for name in self.by]
        return torch.stack(ranks).mean(0)

    def keep(self, scores: Scores, domains: torch.Tensor) -> torch.Tensor:
        """Return which samples are kept [n], bool.

        Args:
            scores: name -> oriented scores [n]; a sample of which one is no number goes.
            domains: number of each sample's domain [n].
        """
        values = self.combined(scores)
        finite = self._finite(scores)
        if self.share is None:
            return finite & (values >= self._of_domain(self.levels, domains))
        num = int(self.share * int(finite.sum()) + 0.5)
        # Stable, so that equal scores are kept in the order of the samples on any machine.
        order = torch.where(finite, values, EVERYTHING).argsort(descending=True, stable=True)
        kept = torch.zeros(len(values), dtype=torch.bool)
        kept[order[:num]] = True
        return kept & finite

    def weights(self, scores: Scores, domains: torch.Tensor, rate: float) -> torch.Tensor:
        """Return what each sample counts [n] from 0 to 1: its conformal p-value over the rate.

        The p-value is (1 + anchors at or below it) / (m + 1); it is 1 / (m + 1) at least, so that
        what is far below all anchors keeps a little weight, unless its score is no number.

        Args:
            scores: name -> oriented scores [n].
            domains: number of each sample's domain [n].
            rate: p-value from which on a sample counts in full.
        """
        values = self.combined(scores)
        found = torch.zeros(len(values), dtype=torch.float64)
        for number in domains.unique().tolist():
            held = self.anchors.get(number, self.anchors[-1])
            chosen = domains == number
            below = torch.searchsorted(held, values[chosen].contiguous(), right=True)
            found[chosen] = ((1 + below).double() / (1 + len(held)) / rate).clamp(max=1)
        return torch.where(self._finite(scores), found, 0.0).float()

    def _finite(self, scores: Scores) -> torch.Tensor:
        return torch.stack([scores[name].isfinite() for name in self.by]).all(0)

    @staticmethod
    def _of_domain(levels: Mapping[int, float], domains: torch.Tensor) -> torch.Tensor:
        found = torch.full((len(domains),), levels[-1], dtype=torch.float64)
        for number, level in levels.items():
            found[domains == number] = level
        return found


def rank(values: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Return the share of sorted numbers below each value [n], those equal to it by half."""
    values = values.double().contiguous()
    below = torch.searchsorted(among, values), torch.searchsorted(among, values, right=True)
    return (below[0] + below[1]).double() / (2 * len(among))


def set_threshold(
    options: ThresholdOptions,
    by: Sequence[str],
    scores: Scores,
    domains: torch.Tensor,
    names: Sequence[str] = (),
) -> Threshold:
    """Set the threshold from the scores of the anchors.

    Args:
        options: the rule.
        by: the scores that decide.
        scores: name -> oriented scores of the anchors [m].
        domains: number of each anchor's domain [m].
        names: names of the domains, for messages.

    Raises:
        InputError: fewer than five anchors, or one whose score is no number.
    """
    by = tuple(by)
    if options.kind == "share" and len(by) == 1:  # which needs no anchors
        return Threshold(by, options.share, {-1: EVERYTHING})
    num = len(domains)
    first = num if options.anchors is None else options.anchors
    if first > num:
        raise InputError("curation.threshold.anchors", first, f"at most the {num} that are there")
    if first < FEWEST * len(by[:2]):
        raise InputError("curation.anchors", f"{first} anchors", f"{FEWEST * len(by[:2])} or more")
    held = {name: scores[name][:first].double() for name in by}
    domains = domains[:first]
    for name, values in held.items():
        if options.kind != "share" and not values.isfinite().all():
            where = int((~values.isfinite()).nonzero()[0])
            raise InputError(
                "curation.anchors", f"a score {name} of anchor {where} that is no number", "numbers"
            )
    reference: dict[str, torch.Tensor] = {}
    if len(by) > 1:  # in turn, so that both halves have the domains alike
        reference = {name: values[::2].sort().values for name, values in held.items()}
        held, domains = {name: values[1::2] for name, values in held.items()}, domains[1::2]
    if options.kind == "share":
        return Threshold(by, options.share, {-1: EVERYTHING}, reference)
    values = Threshold(by, reference=reference).combined(held)
    groups = {-1: values.sort().values}
    if options.per_domain:
        for number in range(len(names)):
            own = values[domains == number]
            if not len(own):
                raise InputError(
                    "curation.anchors",
                    f"no anchor of the domain {names[number]!r}",
                    "anchors of every domain, or per_domain = false",
                )
            if len(own) >= options.pool_below:
                groups[number] = own.sort().values
    levels, bounds = {}, {}
    for number, own in groups.items():
        if options.kind == "anchor_mean":
            levels[number] = float(own.mean())
        else:
            place = rank_of(options.rate, len(own), options.confidence)
            levels[number] = float(own[place - 1]) if place else EVERYTHING
            bounds[number] = _bound(place, len(own))
    return Threshold(by, None, levels, reference, groups, bounds)


def rank_of(rate: float, num: int, confidence: float | None = None) -> int:
    """Return the rank from below of the anchor that a rejection rate leads to; 0 for none.

    Args:
        rate: most clean samples that are rejected, as a share.
        num: anchors.
        confidence: how sure that is; None: on average.
    """
    if confidence is None:
        return int(rate * (num + 1) + 1e-9)
    from scipy.stats import beta  # a second, which every process with a configuration would spend

    places = np.arange(1, num + 1)
    return int((beta.ppf(confidence, places, num + 1 - places) <= rate).sum())  # it grows with k


def _bound(place: int, num: int) -> Bound:
    if not place:
        return Bound(num, 0, 0.0, 0.0)
    from scipy.stats import beta

    return Bound(num, place, place / (num + 1), float(beta.ppf(0.95, place, num + 1 - place)))
