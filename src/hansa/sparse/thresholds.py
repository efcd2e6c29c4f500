"""The magnitude from which an entry is kept.

SWAT (Raihan and Aamodt, NeurIPS 2020) keeps the ceil((1 - sparsity) n) largest of a tensor's n
entries by magnitude, and all that are equal to the smallest of them; never a zero.
"""

import math

import torch

from hansa.sparse.kernels import kernels


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
        flat = x if x.is_contiguous() else x.movedim(0, -1)
        if flat.is_contiguous():
            return x.new_tensor(found.call("kth", flat, x.numel(), k))
    return x.abs().flatten().kthvalue(x.numel() - k + 1).values


def keep(x: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Return True where an entry has at least that magnitude and is not zero."""
    return (x.abs() >= least) & (x != 0)


def pruned(x: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Return a tensor with zeros where an entry is not kept."""
    if plain(x) and x.is_contiguous() and (found := kernels()):
        out = torch.empty_like(x)
        found.call("prune", x, least.item(), out, x.numel(), torch.get_num_threads())
        return out
    return torch.where(keep(x, least), x, 0.0)


def is_wrapped(x: torch.Tensor) -> bool:
    """Tell whether a tensor stands for others under ``vmap`` or another transform."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def plain(x: torch.Tensor) -> bool:
    """Tell whether a kernel may read a tensor: float32 on the CPU, and no transform around it."""
    is_plain = type(x) in (torch.Tensor, torch.nn.Parameter) and not is_wrapped(x)
    return is_plain and x.dtype is torch.float32 and x.device.type == "cpu"
