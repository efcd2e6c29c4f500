"""One model on several devices: PyTorch's FSDP2, started by ``torchrun`` or ``accelerate launch``.

The same code as on one device: parameters become parts of tensors, the loop and the phases do not
know. The library ``accelerate`` shards on accelerators only; this is what it calls, and runs on
processors as well.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hansa.safeguard.models import layers_of


class Ranks(NamedTuple):
    """A process among those that train one model.

    Attributes:
        rank: its number.
        size: how many they are.
        device: where its part of the model lives.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    def shard(self, model: nn.Module) -> nn.Module:
        """Return a model on this rank's device, of which each rank holds its part."""
        if self.size == 1:
            return model.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.size,))
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # The whole as well: what stays gathered after a pass does not see what is written next.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        return model

    def wait(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            dist.barrier()


def agreed(wanted: bool, size: int) -> bool:
    """Return what the first of so many ranks wants: clocks differ, and all must do the same."""
    if size == 1:
        return wanted
    flag = _flag(wanted)
    dist.broadcast(flag, 0)
    return bool(flag.item())


def any_rank(found: bool, size: int) -> bool:
    """Return whether any of so many ranks has found something."""
    if size == 1:
        return found
    flag = _flag(found)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def _flag(value: bool) -> torch.Tensor:
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    return torch.tensor([int(value)], device=device)


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Yield this process's place, as ``torchrun`` states it; one process where it states none."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if is_gpu else torch.device("cpu")
    if size == 1:
        yield Ranks(device=device)
        return
    if is_gpu:
        torch.cuda.set_device(device)  # what is sharded goes to the current one
    dist.init_process_group("nccl" if is_gpu else "gloo")
    try:
        yield Ranks(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()
