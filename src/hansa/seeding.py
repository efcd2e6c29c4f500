"""Random streams derived from what they are for.

No draw in Hansa comes from a generator that another draw has touched. Each stream is keyed by
(run seed, node path, round, purpose), so a result does not depend on the order or number of
workers, on the engine, or on an interruption. The noise of a private node in a deployment is the
exception: it comes from a key that nobody else knows (``Keystream``).
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

_BLOCK = 1 << 17
"""Most numbers that a key stream makes at once."""


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


class Keystream:
    """Random numbers that nobody can foretell who does not hold the key.

    PyTorch's CPU generator takes 32 bits of its seed, all of which can be tried, and NumPy's and
    its own outputs give their state away. These numbers are SHAKE-256 (FIPS 202) of key and
    position, and each is given out once.

    Args:
        key: 32 secret bytes; whoever has them can make the same numbers.
    """

    def __init__(self, key: bytes) -> None:
        self._key, self._position = key, 0

    def uniform(self, num: int) -> torch.Tensor:
        """Return draws from [0, 1), multiples of 2^-53, as float64 [num]."""
        return torch.from_numpy((self._words(num) >> np.uint64(11)) * 2.0**-53)

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """Return draws from N(0, 1) as float64, by pairs (Box and Muller 1958)."""
        num = math.prod(shape)
        first, second = self.uniform(2 * (-(-num // 2))).chunk(2) if num else [torch.empty(0)] * 2
        radius = first.neg_().add_(1).log_().mul_(-2).sqrt_()  # of what is above 0
        angle = second.mul_(2 * math.pi)
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()])
        return pairs[:num].reshape(tuple(shape)).double()

    def _words(self, num: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
        words = np.empty(num, np.uint64)
        for start in range(0, num, _BLOCK):
            part = words[start : start + _BLOCK]
            data = self._key + self._position.to_bytes(8, "big")
            part[:] = np.frombuffer(hashlib.shake_256(data).digest(8 * len(part)), "<u8")
            self._position += 1
        return words
