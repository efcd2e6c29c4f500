"""What a user asks of a profile."""

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from hansa.processes import processor


class ProfileOptions(BaseModel):
    """How latencies are measured, and when they count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = ""
    """The name under which latencies are kept; by default that of the processor."""
    backend: Literal["torch", "onnxruntime"] = "torch"
    """What runs the models."""
    batches: tuple[int, ...] = Field((1, 64), min_length=1)
    """Inputs in one run."""
    threads: int = Field(1, ge=1, le=1024, strict=True)
    """Threads of the backend."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What weights and inputs are."""
    rounds: int = Field(80, ge=40, strict=True)
    """Timed runs of each model; every other one belongs to the second repeat."""
    warmup: int = Field(3, ge=1, strict=True)
    """Runs of each model before the first that is timed."""
    window: int = Field(50, ge=1, strict=True)
    """Most models that take turns; the anchor is measured again in each window."""
    retries: int = Field(2, ge=0, strict=True)
    """How often a window that drifts, or whose repeats disagree, is measured again."""
    max_drift: float = Field(0.05, gt=0)
    """Most relative change of the anchor since the first window."""
    min_agreement: float = Field(0.9, ge=-1, le=1)
    """Least rank correlation of the two repeats."""
    force: bool = False
    """Keep what does not count, marked as unusable, and go on."""
    seed: int = 0
    """Of the order of turns and of the inputs."""

    @property
    def device_name(self) -> str:
        """The device's name, such as ``amd-epyc-7763-64-core-processor``."""
        return self.device or default_device()


def default_device() -> str:
    """Return a name for this machine's processor: lower case, words joined by a dash."""
    words = processor().split(":")[-1].lower().replace("(r)", "").replace("(tm)", "")
    return re.sub(r"[^a-z0-9.]+", "-", words).strip("-") or "cpu"
