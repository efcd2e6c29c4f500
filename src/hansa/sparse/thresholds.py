"""The magnitude from which an entry is kept.

SWAT (Raihan and Aamodt, NeurIPS 2020) keeps the ceil((1 - sparsity) n) largest of a tensor's n
entries by magnitude, and all that are equal to the smallest of them; never a zero.
"""

import math

import torch

from hansa.sparse.kernels import kernels

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def count_kept(sparsity: float, numel: int) -> int:
    """Return how many entries of a tensor are kept, at least one."""
    # 1 - 0.9 is a little above 0.1 in binary; what is whole in decimals stays whole.
    return max(1, math.ceil(round((1 - sparsity) * numel, 6)))


def threshold(x: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Return the scalar magnitude from which entries of a tensor are kept, 0 to keep all."""
    k, x = count_kept(sparsity, x.numel()), x.detach()
    if k >= x.numel():
        return x.new_zeros(())
    if plain(x) and (found := kernels()):
        place = _innermost(x)
        if place is not None:
            return x.new_tensor(found.call("kth", x.movedim(place, -1), x.numel(), k))
    return x.abs().flatten().kthvalue(x.numel() - k + 1).values


def keep(x: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Return True where an entry has at least that magnitude and is not zero."""
    return (x.abs() >= least) & (x != 0)


def pruned(x: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Return a tensor with zeros where an entry is not kept."""
    if plain(x) and (found := kernels()) and (place := _innermost(x)) is not None:
        flat = x.movedim(place, -1)
        out = torch.empty_like(flat)
        found.call("prune", flat, least.item(), out, x.numel(), torch.get_num_threads())
        return out.movedim(-1, place)
    return torch.where(keep(x, least), x, 0.0)


def _innermost(x: torch.Tensor) -> int | None:
    """Return the dimension that would have to be last for a tensor to be contiguous, if any."""
    # As it is; batch innermost; channels-last.
    for place in (-1, 0, 1)[: max(1, x.dim())]:
        if x.movedim(place, -1).is_contiguous():
            return place
    return None


def is_wrapped(x: torch.Tensor) -> bool:
    """Tell whether a tensor stands for others under ``vmap`` or another transform."""
    return bool(_is_wrapped(x))


def plain(x: torch.Tensor) -> bool:
    """Tell whether a kernel may read a tensor: float32 on the CPU, and no transform around it."""
    is_plain = type(x) in (torch.Tensor, torch.nn.Parameter) and not _is_wrapped(x)
    return is_plain and x.dtype is torch.float32 and x.is_cpu
