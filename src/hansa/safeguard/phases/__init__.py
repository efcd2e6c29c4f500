"""The phases that a safeguard is made of, by the names that configurations call them."""

from typing import Annotated

from pydantic import Field

from hansa.safeguard.phases.base import Phase
from hansa.safeguard.phases.max_entropy import MaxEntropy
from hansa.safeguard.phases.noise_distil import NoiseDistil
from hansa.safeguard.phases.pretrain import Pretrain
from hansa.safeguard.phases.random_mapping import RandomMapping
from hansa.safeguard.phases.refusal import Refusal
from hansa.safeguard.phases.repnoise import RepNoise
from hansa.safeguard.phases.rmu import RMU
from hansa.safeguard.phases.tar import TAR

AnyPhase = Annotated[
    Pretrain | RandomMapping | RMU | MaxEntropy | Refusal | RepNoise | NoiseDistil | TAR,
    Field(discriminator="kind"),
]

__all__ = ["TAR", "AnyPhase", "Phase"]
