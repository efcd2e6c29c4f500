"""What a curation found, where the kind of every example is known: scores, rules, clients.

Everything here looks at all clients at once, as a simulation can and a federation must not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hansa.curation.federated import Cohort
from hansa.curation.measures import CLEAN, auroc, by_kind, selection
from hansa.curation.thresholds import FEWEST, Threshold, ThresholdOptions, set_threshold
from hansa.federation.message import Tensors

PAPER_ANCHORS = 10


@dataclass(frozen=True)
class Holder:
    """A client's examples as a simulation sees them.

    Attributes:
        scores: name -> oriented scores [n].
        kinds: kind of each example, empty where it is not known.
        domains: number of each example's domain [n].
    """

    scores: Tensors
    kinds: tuple[str, ...]
    domains: torch.Tensor

    @property
    def clean(self) -> torch.Tensor:
        """Which examples are labelled clean [n], bool."""
        return torch.tensor([kind == CLEAN for kind in self.kinds])


def separation(holders: Mapping[str, Holder]) -> dict[str, dict[str, float]]:
    """Return score -> AUROC of clean examples against those of each kind, and of all kinds.

    ``within`` is the mean over clients of the AUROC among a client's own examples: where shares
    and domains differ, the pooled one tells clients apart as well.
    """
    first = next(iter(holders.values()))
    found = {}
    for name in first.scores:
        pooled = torch.cat([holder.scores[name] for holder in holders.values()])
        kinds = [kind for holder in holders.values() for kind in holder.kinds]
        row = by_kind(pooled, kinds)
        each = []
        for holder in holders.values():
            values, usable = holder.scores[name], holder.scores[name].isfinite()
            known = torch.tensor([bool(kind) for kind in holder.kinds])
            good, bad = holder.clean & usable, ~holder.clean & usable & known
            if good.any() and bad.any():
                each.append(auroc(values[good], values[bad]))
        within = sum(each) / len(each) if each else float("nan")
        found[name] = {**row, "within": within}
    return found


def compared(
    cohort: Cohort, holders: Mapping[str, Holder], anchors: Tensors, chosen: Threshold
) -> dict[str, dict[str, Any]]:
    """Return rule -> precision, recall, F1 and kept share of it, and each client's recall.

    Beside the rule that was chosen: the quantile, the mean of ten anchors, the same share of every
    client, given the true share of clean examples, and everything.

    Args:
        cohort: who takes part; its options say which scores decide.
        holders: what clients hold.
        anchors: name -> oriented scores of the anchors.
        chosen: the threshold that was set.
    """
    options, held = cohort.options, cohort.public.anchors
    clean = torch.cat([holder.clean for holder in holders.values()])
    examples = () if held is None else held.examples
    numbers, names = cohort.public.numbers(examples), cohort.public.domains
    share = max(float(clean.double().mean()), 1e-9)
    rules = {"same share of each client": ThresholdOptions(kind="share", share=share)}
    least = FEWEST * min(2, len(options.deciding))
    if len(examples) >= least:
        rate = options.threshold.rate
        rules[f"quantile of anchors, {rate:g}"] = ThresholdOptions(rate=rate)
        few = min(len(examples), max(PAPER_ANCHORS, least))
        rules[f"mean of {few} anchors"] = ThresholdOptions(kind="anchor_mean", anchors=few)
    thresholds = {"chosen": chosen}
    for rule, each in rules.items():
        if len(options.deciding) > 1 and len(examples) < least:
            continue
        thresholds[rule] = set_threshold(each, options.deciding, anchors, numbers, names)
    found = {}
    for rule, threshold in thresholds.items():
        masks = [threshold.keep(holder.scores, holder.domains) for holder in holders.values()]
        found[rule] = _judged(masks, holders)
    everything = [torch.ones_like(holder.domains, dtype=torch.bool) for holder in holders.values()]
    return {**found, "everything": _judged(everything, holders)}


def _judged(masks: Sequence[torch.Tensor], holders: Mapping[str, Holder]) -> dict[str, Any]:
    clean = torch.cat([holder.clean for holder in holders.values()])
    recalls = {
        name: selection(mask, holder.clean).recall
        for mask, (name, holder) in zip(masks, holders.items(), strict=True)
    }
    return {**vars(selection(torch.cat(list(masks)), clean)), "recall_of": recalls}
