"""How the local engine does its work: what a user asks for, and what is made of it."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from hansa.errors import InputError

Kind = Literal["sequential", "stacked", "compiled"]
"""How clients are trained in one place."""


class EngineOptions(BaseModel):
    """How the run is computed. None of this changes a number beyond the rounding of sums."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["auto", "sequential", "stacked", "compiled", "flower"] = "auto"
    """Clients one by one, several at once, several at once by a compiled step, or what a short
    trial finds fastest; or one by one in Flower's simulation."""
    workers: int = Field(0, ge=0, le=256, strict=True)
    """Processes that train clients; 0 starts one per core where the run is long enough."""
    stack: int | None = Field(None, ge=2, le=4096, strict=True)
    """Clients per stack; found by a trial where it is not set."""
    stack_memory_mb: int = Field(4096, ge=64, strict=True)
    """Memory that stacks may take, over all processes; a trial stops before it is passed."""
    device: str = "cpu"
    """Where clients are trained: ``cpu``, ``cuda`` or ``cuda:1``."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What matrix products and convolutions are computed in; weights stay as they are."""

    def check(self) -> None:
        """Refuse what this machine does not have.

        Raises:
            InputError: no such device, or options that exclude each other.
        """
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise InputError("engine.device", repr(self.device), "cpu or cuda") from error
        if device.type not in ("cpu", "cuda"):
            raise InputError("engine.device", repr(self.device), "cpu or cuda")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            found = f"{self.device!r}, where PyTorch sees {torch.cuda.device_count()} CUDA devices"
            raise InputError("engine.device", found, "cpu, or a device that is there")
        one_by_one = self.kind in ("sequential", "flower")
        if one_by_one and self.stack is not None:
            raise InputError("engine.stack", f"{self.stack} with kind {self.kind!r}", "nothing")
        if one_by_one and self.precision != "float32":
            found = f"{self.precision!r} with kind {self.kind!r}"
            raise InputError("engine.precision", found, "float32, or another kind")
        if (one_by_one or self.kind == "compiled") and device.type != "cpu":
            raise InputError("engine.kind", f"{self.kind!r} on a GPU", "auto or stacked")


@dataclass(frozen=True)
class Plan:
    """What an engine does.

    Attributes:
        kind: clients one by one; several at once by ``vmap``; or several at once by a compiled
            step.
        stack: clients per stack, 1 for one by one.
        workers: processes that train clients.
        pads: whether batches of unequal sizes are filled up.
        scores: whether clients are scored in stacks as well.
        wait: whether a step that is not compiled yet is waited for.
        device: where clients are trained.
        precision: what matrix products are computed in.
    """

    kind: Kind = "sequential"
    stack: int = 1
    workers: int = 1
    pads: bool = True
    scores: bool = True
    wait: bool = True
    device: str = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"

    @property
    def is_rough(self) -> bool:
        """Whether its products are computed in fewer digits than one client's alone."""
        return self.precision != "float32" or self.device != "cpu"

    def __str__(self) -> str:
        stack = f" in stacks of {self.stack}" if self.stack > 1 else ""
        workers = f" by {self.workers} processes" if self.workers > 1 else ""
        device = f" on {self.device}" if self.device != "cpu" else ""
        return f"{self.kind}{stack}{workers}{device}"
