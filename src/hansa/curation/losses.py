"""Losses of single samples: the mean over the counted tokens of each sequence."""

import torch
import torch.nn.functional as F

from hansa.curation.sequences import Pair, spans
from hansa.federation.message import Tensors
from hansa.models.task import Task

TOKENS = 8192
"""Tokens that are scored at once, by default."""


@torch.no_grad()
def losses(
    task: Task, params: Tensors, buffers: Tensors, samples: Pair, tokens: int = TOKENS
) -> torch.Tensor:
    """Return each sequence's mean cross-entropy over its labels, in nats [n], float64.

    What stands behind the end changes nothing, since a causal model does not see it, and neither
    does the number of sequences at once (to the rounding of float32).

    Args:
        task: a causal model.
        params: name -> parameter.
        buffers: name -> buffer.
        samples: inputs and labels [n, T]; a sequence without a label has a loss of NaN.
        tokens: most tokens at once; at least one sequence.
    """
    inputs, labels = samples
    starts, lengths = spans(labels)
    ends = starts + lengths
    found = torch.full((len(labels),), torch.nan, dtype=torch.float64)
    order = ends.argsort()  # sequences of like length together are cut to it
    first = 0
    while first < len(order):
        # From the longest that would go along; the order is ascending.
        num = max(1, tokens // max(1, int(ends[order[min(first + 255, len(order) - 1)]])))
        rows = order[first : first + min(num, 256)]
        width = max(1, int(ends[rows].max()))
        logits = task.logits(params, buffers, inputs[rows, :width], training=False)
        wanted = labels[rows, :width]
        each = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").double()
        found[rows] = each.sum(1) / (wanted >= 0).sum(1)
        first += len(rows)
    return found
