"""Random streams of the audit, keyed by what they are for.

As ``hansa.seeding`` does, which would import PyTorch, and that the proxy has no need of.
"""

import hashlib
import json
from random import Random


def stream(seed: int, *purpose: str | int | float) -> Random:
    """Return a generator for one purpose: SHA-256 over the seed and the purpose's parts."""
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return Random(int.from_bytes(digest[:8], "big"))  # noqa: S311 (no secret is drawn)
