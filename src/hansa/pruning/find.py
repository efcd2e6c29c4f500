"""Score and select, once or over an exponential schedule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hansa.errors import InputError
from hansa.models.task import Tensors
from hansa.pruning.objective import Batch, Loss, Objective, prunable
from hansa.pruning.prospr import ProsPr
from hansa.pruning.saliency import Force, Grasp, Magnitude, Random, Snip, SynFlow
from hansa.pruning.scorer import Scorer
from hansa.pruning.select import Scope, check_density, scheduled, select

SCORERS: dict[str, type[Scorer]] = {
    kind.name: kind for kind in (ProsPr, Snip, Force, Grasp, SynFlow, Magnitude, Random)
}

Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """What a search for masks ended with.

    Attributes:
        masks: name -> bool tensor, True where an entry is kept.
        scores: name -> the scores of the last iteration.
    """

    masks: dict[str, torch.Tensor]
    scores: Tensors


def scores(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Loss = F.cross_entropy,
    scorer: Scorer | None = None,
    *,
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Score every prunable weight of a model; the model itself is left as it is.

    Examples:
        >>> found = scores(net, batches, scorer=ProsPr(inner_steps=3))
        >>> masks = select(found, density=0.05)

    Args:
        model: any module that takes one tensor and returns one.
        batches: (inputs, targets), as many as the scorer takes (``scorer.num_batches``) or more.
        loss: (outputs, targets) -> scalar mean over the batch.
        scorer: ProsPr by default.
        exclude: patterns of parameter names that are not to be pruned.
        seed: of dropout and of what a scorer draws.

    Returns:
        name -> scores of the shape of the parameter.

    Raises:
        InputError: nothing to prune, too few batches, or a loss that is not finite.
    """
    scorer = scorer or ProsPr()
    objective = Objective(model, loss, prunable(model, exclude), seed=seed)
    return dict(scorer.scores(objective, taken(scorer, batches, 0), seed))


def find_masks(
    model: nn.Module,
    batches: Sequence[Batch],
    density: float,
    scorer: Scorer | None = None,
    *,
    loss: Loss = F.cross_entropy,
    iterations: int = 1,
    scope: Scope = "global",
    floor: float = 0.0,
    densities: Mapping[str, float] | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
    watch: Watch | None = None,
) -> Found:
    """Find the masks that keep a share of a model's weights.

    With several iterations R the share kept after the t-th is density^(t/R), and each scores what
    the one before it left. An iteration takes the batches after those of the one before, from the
    start again when they end. What was pruned is out of the scored network altogether: it does
    not move in ProsPr's inner steps either.

    Args:
        model: any module that takes one tensor and returns one.
        batches: (inputs, targets).
        density: share of the prunable weights to keep, in (0, 1].
        scorer: ProsPr by default.
        loss: (outputs, targets) -> scalar mean over the batch.
        iterations: how often it is scored.
        scope: see ``select``, as are ``floor`` and ``densities``.
        floor: least share of its entries that each layer keeps.
        densities: layer or pattern -> density of its own.
        exclude: patterns of parameter names that are not to be pruned.
        seed: of dropout and of what a scorer draws.
        watch: called with the iteration and their number.

    Raises:
        InputError: see ``scores`` and ``select``.
    """
    check_density("density", density)
    if type(iterations) is not int or iterations < 1:
        raise InputError("iterations", repr(iterations), "a whole number from 1 up")
    scorer = scorer or ProsPr()
    plain = Objective(model, loss, prunable(model, exclude), seed=seed)
    objective, masks = plain, None
    found: Tensors = {}
    for number in range(1, iterations + 1):
        found = scorer.scores(objective, taken(scorer, batches, number - 1), seed)
        masks = select(
            found,
            scheduled(density, number, iterations),
            scope=scope,
            floor=floor,
            densities={
                name: scheduled(own, number, iterations) for name, own in (densities or {}).items()
            },
            within=masks if scorer.nested else None,
        )
        objective = plain.within(masks, frozen=scorer.nested)
        if watch is not None:
            watch(number, iterations)
    assert masks is not None  # noqa: S101 there was one iteration at least
    return Found(masks, found)


def taken(scorer: Scorer, batches: Sequence[Batch], iteration: int) -> list[Batch]:
    """Return the batches of an iteration."""
    number = scorer.num_batches
    if number > len(batches):
        raise InputError(
            "batches", f"{len(batches)}", f"{number} or more, which {scorer.name} takes"
        )
    return [batches[(iteration * number + k) % len(batches)] for k in range(number)]
