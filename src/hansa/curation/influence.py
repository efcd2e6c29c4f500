"""How much a step on a sample would help on validation data: TracIn, gradient cosine, DataInf.

All of them are inner products of a sample's gradient g with a direction that is made once. Signs
are such that a positive value helps.

==============  ==================================================================================
TracIn          sum over checkpoints t of eta_t <v_t, g_t>, v the mean validation gradient
                (Pruthi et al., NeurIPS 2020, eq. 1, its sum over validation samples divided by
                their number)
gradient        sum over t of eta_t cos(v_t, g_t), over the sum of eta_t (as Xia et al., ICML 2024,
cosine          section 3, with plain gradients on both sides and one validation task)
DataInf         sum over blocks l of <h_l, g_l>, where h_l is the mean over n reference samples of
                (g_li g_li^T + lambda_l I)^-1 v_l, and lambda_l a tenth of the mean squared entry
                of their gradients (Kwon et al., ICLR 2024, eq. 5)
==============  ==================================================================================
"""

from collections.abc import Callable, Iterable, Mapping

import torch

from hansa.errors import InputError
from hansa.federation.message import Tensors

Pieces = Iterable[dict[str, torch.Tensor]]
DIVISOR = 10.0


def datainf(
    direction: Tensors, reference: Callable[[], Pieces], damping: float | None = None
) -> dict[str, torch.Tensor]:
    """Return h, whose inner product with a sample's gradient is the sample's DataInf score.

    The inverse of each rank-one matrix is that of Sherman and Morrison:
    (g g^T + lambda I)^-1 v = (v - g <g, v> / (lambda + |g|^2)) / lambda.

    Args:
        direction: mean validation gradient: block -> [numbers].
        reference: gives the gradients of the reference samples, block -> [m, numbers], from the
            start each time it is called; they are read twice.
        damping: lambda of all blocks; by default a tenth of each block's mean squared entry.

    Returns:
        Block -> [numbers], float64.

    Raises:
        InputError: reference samples that have no gradient anywhere.
    """
    squares: dict[str, float] = dict.fromkeys(direction, 0.0)
    num = 0
    for piece in reference():
        num += len(next(iter(piece.values())))
        for name, rows in piece.items():
            squares[name] += float(rows.double().square().sum())
    # A block that no sample moves (of LoRA, A while B is still zero) tells nothing of any sample.
    lambdas = {
        name: total / (num * direction[name].numel() * DIVISOR) if damping is None else damping
        for name, total in squares.items()
        if total > 0
    }
    if not lambdas:
        raise InputError("curation", "reference samples without a gradient", "a model that learns")
    sums = {name: torch.zeros_like(v, dtype=torch.float64) for name, v in direction.items()}
    for piece in reference():
        for name, value in lambdas.items():
            rows, v = piece[name].double(), direction[name].double()
            share = (rows @ v) / (value + rows.square().sum(1))
            sums[name] += (v * len(rows) - share @ rows) / value
    return {name: total / num for name, total in sums.items()}


def products(
    directions: Mapping[str, Tensors], pieces: Pieces
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return inner products of each sample's gradient with several directions, and its norm.

    Args:
        directions: name -> block -> [numbers].
        pieces: gradients, block -> [m, numbers].

    Returns:
        Name -> [n], and the norms over all blocks [n], float64.
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name in directions}
    norms = []
    for piece in pieces:
        rows = {block: part.double() for block, part in piece.items()}
        for name, direction in directions.items():
            each = [part @ direction[block].double() for block, part in rows.items()]
            found[name].append(torch.stack(each).sum(0))
        squares = [part.square().sum(1) for part in rows.values()]
        norms.append(torch.stack(squares).sum(0).sqrt())
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(norms)
