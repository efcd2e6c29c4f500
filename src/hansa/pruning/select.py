"""From scores to masks: how many entries each layer keeps, and which."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

import torch

from hansa.errors import InputError
from hansa.models.task import Tensors
from hansa.pruning.objective import matching

Scope = Literal["global", "layer", "balanced", "erk"]
SCOPES: tuple[Scope, ...] = ("global", "layer", "balanced", "erk")


def select(
    scores: Tensors,
    density: float,
    *,
    scope: Scope = "global",
    floor: float = 0.0,
    densities: Mapping[str, float] | None = None,
    within: Tensors | None = None,
) -> dict[str, torch.Tensor]:
    """Return masks that keep the entries with the highest scores.

    Exactly ``count(density, entries)`` entries are kept, ties going to the earlier layer and
    position. Every layer keeps one entry at least.

    Args:
        scores: name -> scores, of any shape.
        density: share of all entries to keep, in (0, 1].
        scope: how the entries kept are dealt to layers: ``global``, wherever the scores are
            highest; ``layer``, the same density in each; ``balanced``, the same number in each;
            ``erk``, in proportion to (sum of the dimensions) / (product of the dimensions), which
            is Erdos-Renyi-Kernel (Evci et al., arXiv 1911.11134).
        floor: least share of its entries that each layer keeps.
        densities: layer, or pattern with ``*`` -> a density of its own; ``density`` is then that
            of the other layers.
        within: name -> bool tensor of the entries that may be kept.

    Returns:
        name -> bool tensor, True where an entry is kept.

    Raises:
        InputError: a density outside (0, 1], an unknown layer, scores that are not finite, or a
            floor above what is to be kept.
    """
    check_density("density", density)
    if not 0 <= floor <= 1:
        raise InputError("floor", floor, "a share from 0 to 1")
    if scope not in SCOPES:
        raise InputError("scope", repr(scope), ", ".join(SCOPES))
    if not scores:
        raise InputError("scores", "none", "those of one layer at least")
    flat = {}
    for name, tensor in scores.items():
        if not tensor.isfinite().all():
            raise InputError("scores", f"{name} with entries that are not finite", "finite scores")
        allowed = None if within is None else within[name].flatten()
        flat[name] = _Layer(tensor.detach().flatten(), allowed, tuple(tensor.shape))
    numbers: dict[str, int] = {}
    for pattern, own in (densities or {}).items():
        check_density(f"densities.{pattern}", own)
        if not (names := matching(list(scores), pattern)):
            raise InputError(
                f"densities.{pattern}", "a layer that is not there", ", ".join(list(scores)[:6])
            )
        numbers |= {name: min(count(own, flat[name].size), flat[name].free) for name in names}
    rest = {name: layer for name, layer in flat.items() if name not in numbers}
    if rest:
        numbers |= _numbers(rest, density, scope, floor)
    return {name: layer.best(numbers[name]).reshape(layer.shape) for name, layer in flat.items()}


def count(density: float, entries: int) -> int:
    """Return how many of a number of entries a density means: rounded, and one at least.

    The density is taken as the decimal number it prints as: 0.02 of 1,000 is 20.
    """
    return max(1, math.floor(Fraction(repr(float(density))) * entries + Fraction(1, 2)))


def scheduled(density: float, number: int, iterations: int) -> float:
    """Return the density after one of several iterations: density^(number / iterations)."""
    return density if number == iterations else density ** (number / iterations)


def check_density(key: str, density: float) -> None:
    """Refuse what is no density.

    Raises:
        InputError: it is outside (0, 1].
    """
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise InputError(key, repr(density), "a share above 0, up to 1")


class _Layer:
    """One layer's scores, and which of its entries may be kept."""

    def __init__(
        self, scores: torch.Tensor, allowed: torch.Tensor | None, shape: tuple[int, ...]
    ) -> None:
        if allowed is not None:
            scores = torch.where(allowed, scores, -torch.inf)
        self.scores, self.shape = scores, shape
        self.size = len(scores)
        self.free = self.size if allowed is None else int(allowed.sum())

    def best(self, number: int) -> torch.Tensor:
        """Return a bool vector with exactly so many entries set, ties going to earlier ones."""
        return _highest(self.scores, number)


def _highest(scores: torch.Tensor, number: int) -> torch.Tensor:
    if number >= len(scores):
        return torch.ones_like(scores, dtype=torch.bool)
    if not number:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.topk(number).values[-1]
    kept = scores > threshold
    ties = scores == threshold
    missing = number - int(kept.sum())
    return kept | (ties & (ties.cumsum(0) <= missing))


def _numbers(
    layers: Mapping[str, _Layer], density: float, scope: Scope, floor: float
) -> dict[str, int]:
    """Return how many entries each layer keeps."""
    total = count(density, sum(layer.size for layer in layers.values()))
    total = min(total, sum(layer.free for layer in layers.values()))
    least = {
        name: min(layer.free, max(1, math.ceil(Fraction(repr(float(floor))) * layer.size)))
        for name, layer in layers.items()
    }
    if sum(least.values()) > total:
        raise InputError(
            "density",
            f"{density}, which keeps {total} entries",
            f"{sum(least.values())} entries or more, for the floor of every layer",
        )
    if scope == "global":
        return _where_highest(layers, least, total)
    weights = {
        "layer": lambda layer: layer.size,
        "balanced": lambda layer: 1,
        "erk": lambda layer: sum(layer.shape),
    }[scope]
    shares = {name: Fraction(weights(layer)) for name, layer in layers.items()}
    return _dealt(shares, least, {name: layer.free for name, layer in layers.items()}, total)


def _where_highest(
    layers: Mapping[str, _Layer], least: Mapping[str, int], total: int
) -> dict[str, int]:
    """Return the numbers that a ranking of all entries gives, once each layer has its least."""
    forced = {name: layer.best(least[name]) for name, layer in layers.items()}
    pool = torch.cat(
        [layer.scores.masked_fill(forced[name], -torch.inf) for name, layer in layers.items()]
    )
    chosen = _highest(pool, total - sum(least.values()))
    parts = chosen.split([layer.size for layer in layers.values()])
    return {name: least[name] + int(part.sum()) for name, part in zip(layers, parts, strict=True)}


def _dealt(
    shares: Mapping[str, Fraction], least: Mapping[str, int], most: Mapping[str, int], total: int
) -> dict[str, int]:
    """Return whole numbers in proportion to shares, within limits, that add up to the total."""
    fixed: dict[str, int] = {}
    while True:
        open_ = [name for name in shares if name not in fixed]
        left = total - sum(fixed.values())
        weight = sum(shares[name] for name in open_)
        exact = {name: shares[name] * left / weight for name in open_}
        # Those above their limit first: what they leave may lift the others above their least.
        beyond = {n: most[n] for n in open_ if exact[n] > most[n]}
        beyond = beyond or {n: least[n] for n in open_ if exact[n] < least[n]}
        if not beyond:
            break
        fixed |= beyond
        if len(fixed) == len(shares):
            break
    exact = {name: exact[name] for name in shares if name not in fixed}
    numbers = fixed | {name: math.floor(value) for name, value in exact.items()}
    # Largest remainder first; what limits took or gave in excess, wherever there is room.
    order = sorted(shares, key=lambda n: numbers[n] - exact.get(n, Fraction(10**9)))
    while (missing := total - sum(numbers.values())) != 0:
        for name in order:
            if missing > 0 and numbers[name] < most[name]:
                numbers[name], missing = numbers[name] + 1, missing - 1
            elif missing < 0 and numbers[name] > least[name]:
                numbers[name], missing = numbers[name] - 1, missing + 1
            if not missing:
                break
    return numbers
