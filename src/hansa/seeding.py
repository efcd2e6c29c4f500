"""Random streams derived from what they are for.

No draw in Hansa comes from a generator that another draw has touched. Each stream is keyed by
(run seed, node path, round, purpose), so a result does not depend on the order or number of
workers, on the engine, or on an interruption.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose: SHA-256 over the run's seed and the purpose's parts."""
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a PyTorch CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a NumPy generator for one purpose."""
    return np.random.default_rng(derive(seed, *purpose))


@contextmanager
def global_stream(seed: int, *purpose: str | int) -> Iterator[None]:
    """Seed PyTorch's global CPU generator inside the block and restore it after.

    For code that takes no generator: module initialisation, dropout, a user's own layers.
    """
    stream = torch.default_generator  # `torch.manual_seed` would seed other devices as well
    before = stream.get_state()
    stream.manual_seed(derive(seed, *purpose))
    try:
        yield
    finally:
        stream.set_state(before)
