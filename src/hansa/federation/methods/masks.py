"""Masks over a model's entries: how they grow and shrink, and how values travel under them.

A mask is a bool tensor of its parameter's shape: True where an entry is the client's own, False
where it is shared. Both ends of an edge know a client's mask, so values travel packed in a row,
without positions.
"""

import math
from collections.abc import Container, Mapping

import torch

from hansa.federation.message import Message, MessageError, Tensors

Masks = dict[str, torch.Tensor]


def grow(
    mask: torch.Tensor, ranking: torch.Tensor, rate: float, limit: float = 1.0
) -> torch.Tensor:
    """Return a mask with more personal entries: exactly the quota, of those that rank highest.

    The quota is ``min(round(rate * shared), floor(limit * n) - personal)``; rounding is half to
    even. Entries of equal rank are taken in the order of their position.

    Args:
        mask: bool tensor of any shape with n entries.
        ranking: number of each entry, of the mask's shape.
        rate: share of the shared entries to promote.
        limit: ceiling on the personal share.
    """
    shared = int((~mask).sum())
    quota = min(round(rate * shared), ceiling(mask.numel(), limit) - (mask.numel() - shared))
    return mask | _highest(~mask, ranking, quota)


def keep(mask: torch.Tensor, ranking: torch.Tensor, share: float) -> torch.Tensor:
    """Return the part of a mask that ranks highest: exactly ``round(share * personal)`` entries."""
    return _highest(mask, ranking, round(share * int(mask.sum())))


def ceiling(numel: int, limit: float) -> int:
    """Return the most entries that a limit allows to be personal."""
    # A limit such as 0.29 of 100 entries means 29; binary floats put the product just below.
    return math.floor(limit * numel + 1e-9)


def _highest(among: torch.Tensor, ranking: torch.Tensor, count: int) -> torch.Tensor:
    """Return where the ``count`` highest entries among some are, the first of equals."""
    if count <= 0:
        return torch.zeros_like(among)
    flat = among.flatten()
    candidates = torch.where(flat, ranking.flatten(), -math.inf)
    cut = candidates.topk(count, sorted=False).values.min()
    above = candidates > cut
    ties = (candidates == cut) & flat
    first = ties & (ties.cumsum(0) <= count - above.sum())
    return (above | first).reshape(among.shape)


def joined(tensors: Tensors) -> torch.Tensor:
    """Return the entries of all tensors as one row."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def parted(row: torch.Tensor, like: Tensors) -> Masks:
    """Return the row cut into tensors of the shapes that ``joined`` put together."""
    rows = row.split([tensor.numel() for tensor in like.values()])
    return {n: r.reshape(t.shape) for r, (n, t) in zip(rows, like.items(), strict=True)}


def filled(like: Tensors, own: Container[str] = ()) -> Masks:
    """Return masks of the shapes of tensors: all True for those named in ``own``, else False."""
    return {name: torch.full(t.shape, name in own) for name, t in like.items()}


def flips(before: Tensors, after: Tensors) -> Masks:
    """Return where two sets of masks differ; tensors without a difference are left out."""
    changed = {name: after[name] ^ before[name] for name in after}
    return {name: mask for name, mask in changed.items() if mask.any()}


def flipped(before: Mapping[str, torch.Tensor], message: Message, group: str) -> Masks:
    """Return masks after the flips that a message holds.

    Raises:
        MessageError: a flip is of another shape or dtype than its mask, or has none.
    """
    changed = message.group(group)
    _check_names(changed, before, group)
    message.require(group, {name: before[name] for name in changed})
    return {
        name: mask ^ changed[name] if name in changed else mask for name, mask in before.items()
    }


def pack(values: Tensors, mask: Tensors) -> dict[str, torch.Tensor]:
    """Return the shared entries of each tensor as a row; tensors without any are left out."""
    rows = {name: tensor[~mask[name]] for name, tensor in values.items()}
    return {name: row for name, row in rows.items() if len(row)}


def unpack(
    rows: Tensors, mask: Tensors, like: Tensors, group: str = "model"
) -> dict[str, torch.Tensor]:
    """Return dense tensors with the rows in their shared entries and zero in personal ones.

    Raises:
        MessageError: a row has another length or dtype than the mask and the model ask for, a
            row is missing, or one belongs to no tensor of the model.
    """
    check_rows(rows, mask, like, group)
    dense = {}
    for name, template in like.items():
        dense[name] = torch.zeros_like(template)
        if name in rows:
            dense[name][~mask[name]] = rows[name]
    return dense


def check_rows(rows: Tensors, mask: Tensors, like: Tensors, group: str = "model") -> None:
    """Refuse rows that ``unpack`` could not take.

    Raises:
        MessageError: see ``unpack``.
    """
    _check_names(rows, like, group)
    for name, template in like.items():
        count = int((~mask[name]).sum())
        row = rows.get(name, template.new_zeros(0))
        if row.dtype != template.dtype or row.shape != (count,):
            raise MessageError(
                f"{group}/{name} is {row.dtype} {tuple(row.shape)}, not {template.dtype} ({count},)"
            )


def _check_names(tensors: Tensors, like: Tensors, group: str) -> None:
    if odd := sorted(tensors.keys() - like.keys()):
        raise MessageError(f"group {group!r} holds {odd[0]!r}, which the model does not have")
