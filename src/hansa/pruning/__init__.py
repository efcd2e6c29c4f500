"""Pruning at initialisation: which weights to train at all.

``scores`` gives every weight a number, ``select`` keeps the highest, ``find_masks`` does both,
at once or in several iterations; ``attach`` makes masks part of a model, ``finalise`` makes them
permanent.
"""

from hansa.models.masks import attach, finalise, masks_of
from hansa.pruning.find import SCORERS, Found, find_masks, scores
from hansa.pruning.objective import Objective, prunable
from hansa.pruning.prospr import ProsPr
from hansa.pruning.saliency import Force, Grasp, Magnitude, Random, Snip, SynFlow
from hansa.pruning.scorer import GradientScorer, Scorer
from hansa.pruning.select import select

__all__ = [
    "SCORERS",
    "Force",
    "Found",
    "GradientScorer",
    "Grasp",
    "Magnitude",
    "Objective",
    "ProsPr",
    "Random",
    "Scorer",
    "Snip",
    "SynFlow",
    "attach",
    "finalise",
    "find_masks",
    "masks_of",
    "prunable",
    "scores",
    "select",
]
