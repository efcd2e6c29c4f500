"""How much of what it is asked a model answers right."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hansa.safeguard.rows import Questions

ROWS = 256
"""Rows that are answered at once."""


@dataclass(frozen=True)
class Score:
    """Shares of questions, 0 to 1.

    Attributes:
        choice: the right answer is the likeliest of its candidates.
        said: it is the likeliest of all tokens, what the model would say.
        count: questions.
    """

    choice: float
    said: float
    count: int


@torch.no_grad()
def score(model: nn.Module, questions: Questions) -> Score:
    """Ask a model that maps ``input_ids`` to an object with ``logits`` [n, T, V]."""
    was = model.training
    model.eval()
    device = next(model.parameters()).device
    right = said = count = 0
    for start in range(0, len(questions.rows), ROWS):
        part = questions[start : start + ROWS]
        rows = part.rows.to(device)
        logits = model(input_ids=rows.tokens, attention_mask=rows.mask.long()).logits.float().cpu()
        asked = part.places >= 0
        at = part.places.clamp(min=0).unsqueeze(-1)
        found = logits.gather(1, at.expand(-1, -1, logits.shape[-1]))  # [n, q, V]
        values = found.gather(-1, part.candidates.clamp(min=0))
        values = values.masked_fill(part.candidates < 0, -torch.inf)
        right += int(((values.argmax(-1) == part.answers) & asked).sum())
        wanted = part.candidates.gather(-1, part.answers.unsqueeze(-1)).squeeze(-1)
        said += int(((found.argmax(-1) == wanted) & asked).sum())
        count += int(asked.sum())
    model.train(was)
    return Score(right / count, said / count, count)


def scores(model: nn.Module, topics: Mapping[str, Questions]) -> dict[str, Score]:
    """Return the score of each topic."""
    return {name: score(model, questions) for name, questions in topics.items()}
