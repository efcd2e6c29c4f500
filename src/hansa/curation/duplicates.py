"""How much of an answer stands in other answers of the same holder as well."""

from collections import Counter
from collections.abc import Sequence

import torch

SHINGLE = 5


def duplicate_shares(answers: Sequence[Sequence[int]], size: int = SHINGLE) -> torch.Tensor:
    """Return the share of each answer's shingles that some other answer has [n], float64.

    A shingle is ``size`` tokens in a row (Broder 1997); a shorter answer is one shingle.

    Args:
        answers: token numbers of each answer, at least one token.
        size: tokens of a shingle.
    """
    cut = [
        {tuple(row[k : k + size]) for k in range(max(1, len(row) - size + 1))} for row in answers
    ]
    holders = Counter(shingle for shingles in cut for shingle in shingles)
    shares = [sum(holders[s] > 1 for s in shingles) / len(shingles) for shingles in cut]
    return torch.tensor(shares, dtype=torch.float64)
