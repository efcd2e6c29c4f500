"""Zero-cost proxies: what a network at its first weights, and a few batches, tell of its worth.

Definitions follow Abdelfattah et al., "Zero-Cost Proxies for Lightweight NAS", ICLR 2021, arXiv
2101.08134, where it has them; the others name their paper. None agrees with accuracy in every
space, and some change their sign with the training recipe: they are scores to look at and to
start from, not answers.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from hansa.errors import InputError
from hansa.search.proxies.gradients import Batch, fisher, grad_norm, grasp, snip, zico
from hansa.search.proxies.kernels import jacob_cov, naswot
from hansa.search.proxies.structure import flops, l2_norm, params, synflow
from hansa.seeding import global_stream

__all__ = ["PROXIES", "Batch", "proxy"]

PROXIES: dict[str, Callable[[nn.Module, Sequence[Batch]], float]] = {
    "grad_norm": grad_norm,
    "snip": snip,
    "grasp": grasp,
    "fisher": fisher,
    "synflow": synflow,
    "jacob_cov": jacob_cov,
    "naswot": naswot,
    "zico": zico,
    "params": params,
    "flops": flops,
    "l2_norm": l2_norm,
}
"""Every proxy by its name. They change the module they are given; ``proxy`` gives them a copy."""


def proxy(name: str, module: nn.Module, batches: Sequence[Batch], seed: int = 0) -> float:
    """Return one proxy's score of a network, which stays as it was.

    Args:
        name: one of ``PROXIES``.
        module: a classifier: inputs [n, ...] to logits [n, classes].
        batches: (inputs float [n, ...], labels int64 [n]); ``zico`` takes two or more, ``synflow``,
            ``params``, ``flops`` and ``l2_norm`` look at the shape of an input alone.
        seed: of what the network itself draws, such as dropout.

    Returns:
        The score; infinite or nan where the network gives it no value (no ReLU, gradients of 0).

    Raises:
        InputError: no such proxy, or too few batches.
    """
    if name not in PROXIES:
        raise InputError("proxy", repr(name), f"one of {', '.join(PROXIES)}")
    if not batches:
        raise InputError("batches", "none", "at least one")
    own = copy.deepcopy(module).train()
    for parameter in own.parameters():
        parameter.requires_grad_(True)
    with global_stream(seed, "proxy", name), torch.enable_grad():
        return PROXIES[name](own, batches)
