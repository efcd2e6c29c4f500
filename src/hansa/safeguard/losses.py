"""The losses that safeguards are trained by. All are means over the tokens that count.

Equations are those of TAR (Tamirisa et al., arXiv 2408.00761), of RMU (Li et al., arXiv
2403.03218) and of RepNoise (Rosati et al., arXiv 2405.14577), as far as those papers' released
code states them; docs/safeguard.md says where ours differs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hansa.data.clients import IGNORED
from hansa.safeguard.rows import Rows


class Output(NamedTuple):
    """What a model makes of rows.

    Attributes:
        logits: of the token after each [n, T, V].
        hidden: hidden states [n, T, d]: the embeddings, and what each layer gives, the last one
            after the final norm; empty unless they were asked for.
    """

    logits: torch.Tensor
    hidden: Sequence[torch.Tensor] = ()


def run(model: nn.Module, rows: Rows, hidden: bool = False) -> Output:
    """Return what a causal model of ``transformers`` makes of rows."""
    found = model(
        input_ids=rows.tokens, attention_mask=rows.mask.long(), output_hidden_states=hidden
    )
    return Output(found.logits, found.hidden_states if hidden else ())


def next_token(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return the cross-entropy of the tokens that count, in nats, from logits [n, T, V]."""
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), rows.labels.flatten(), ignore_index=IGNORED
    )


def entropy(logits: torch.Tensor, rows: Rows, with_padding: bool = False) -> torch.Tensor:
    """Return the mean entropy of what a model would say next, in nats; log V at most.

    Args:
        logits: [n, T, V].
        rows: what they are about.
        with_padding: whether places after the end of a text are part of the mean.
    """
    logs = logits.float().log_softmax(-1)
    each = -(logs.exp() * logs).sum(-1)
    return each.mean() if with_padding else _mean(each, rows)


def drift(
    found: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
    rows: Rows,
    with_padding: bool = False,
) -> torch.Tensor:
    """Return how far hidden states are from those of a reference.

    The mean over all L + 1 states of the mean over tokens of the L2 norm, which is not squared.
    """
    each = torch.stack(
        [(a.float() - b.float()).norm(dim=-1) for a, b in zip(found, reference, strict=True)]
    )
    return each.mean() if with_padding else torch.stack([_mean(part, rows) for part in each]).mean()


def random_mapping(
    hidden: Sequence[torch.Tensor], rows: Rows, directions: torch.Tensor
) -> torch.Tensor:
    """Return 1 - |cos| between hidden states and a random direction of their token.

    The mean over all states and tokens. A token has one direction, the same in every layer.

    Args:
        hidden: hidden states [n, T, d].
        rows: what they are about.
        directions: of each token of the vocabulary [V, d].
    """
    wanted = directions.to(hidden[0].device)[rows.tokens]
    parts = [1 - F.cosine_similarity(state.float(), wanted, dim=-1).abs() for state in hidden]
    return torch.stack([_mean(part, rows) for part in parts]).mean()


def steering(state: torch.Tensor, target: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return RMU's mean squared distance of a hidden state [n, T, d] to a target [..., d]."""
    return _mean((state.float() - target.float()).square().mean(-1), rows)


def noising(
    hidden: Sequence[torch.Tensor], rows: Rows, rng: torch.Generator, most: int = 256
) -> torch.Tensor:
    """Return how far hidden states are from Gaussian noise: the mean over layers of an MMD.

    The maximum mean discrepancy is of a Gaussian kernel whose width is the median distance
    (Gretton et al., JMLR 2012, equation 3, with the terms of a sample with itself).

    Args:
        hidden: hidden states [n, T, d].
        rows: what they are about.
        rng: draws the noise, and which tokens are compared.
        most: most tokens that are compared.
    """
    index = rows.mask.flatten().nonzero().squeeze(1).cpu()
    index = index[torch.randperm(len(index), generator=rng)[:most]]
    found = []
    for state in hidden[1:]:
        points = state.float().flatten(0, 1)[index.to(state.device)]
        noise = torch.randn(points.shape, generator=rng).to(points)
        both = torch.cat([points, noise])
        squares = torch.cdist(both, both).square()
        width = squares.detach().median().clamp(min=1e-6)
        kernel = (-squares / width).exp()
        num = len(points)
        inside = kernel[:num, :num].mean() + kernel[num:, num:].mean()
        found.append(inside - 2 * kernel[:num, num:].mean())
    return torch.stack(found).mean()


def log_likelihood(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return the log-likelihood of each row's counted tokens [n], in nats, summed."""
    labels = rows.labels
    logs = logits[:, :-1].float().log_softmax(-1)
    each = logs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (each * (labels != IGNORED)).sum(1)


def preference(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference: tuple[torch.Tensor, torch.Tensor],
    beta: float = 0.1,
) -> torch.Tensor:
    """Return the DPO loss (Rafailov et al., NeurIPS 2023, equation 7).

    Args:
        chosen: log-likelihoods of the wanted answers [n].
        rejected: those of the others [n].
        reference: both by the reference model.
        beta: how strongly a difference counts.
    """
    margin = (chosen - reference[0]) - (rejected - reference[1])
    return -F.logsigmoid(beta * margin).mean()


def distance(found: torch.Tensor, wanted: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return the Kullback-Leibler divergence of a student from its teacher, logits [n, T, V]."""
    teacher, student = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
    return _mean((teacher.exp() * (teacher - student)).sum(-1), rows)


def _mean(each: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return the mean of values [n, T] over the tokens of texts."""
    mask = rows.mask.to(each)
    return (each * mask).sum() / mask.sum().clamp(min=1)
