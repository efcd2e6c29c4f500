"""How much of what it is asked a model answers right."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hansa.safeguard.rows import Questions

_NUMBERS = 2**26
"""Most logits that are held at once."""


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
    num = max(1, _NUMBERS // (questions.rows.tokens.shape[1] * max(1, _vocabulary(model))))
    for start in range(0, len(questions.rows), num):
        part = questions[start : start + num]
        rows = part.rows.to(device)
        logits = model(input_ids=rows.tokens, attention_mask=rows.mask.long()).logits
        asked = part.places >= 0
        at = part.places.clamp(min=0).unsqueeze(-1).to(device)
        found = logits.gather(1, at.expand(-1, -1, logits.shape[-1])).float().cpu()  # [n, q, V]
        values = found.gather(-1, part.candidates.clamp(min=0))
        values = values.masked_fill(part.candidates < 0, -torch.inf)
        # A model that is broken, all of whose values are equal or no numbers, knows nothing.
        answers = part.answers.unsqueeze(-1)
        others = values.scatter(-1, answers, -torch.inf).amax(-1)
        right += int(((values.gather(-1, answers).squeeze(-1) > others) & asked).sum())
        wanted = part.candidates.gather(-1, answers)
        others = found.scatter(-1, wanted, -torch.inf).amax(-1)
        said += int(((found.gather(-1, wanted).squeeze(-1) > others) & asked).sum())
        count += int(asked.sum())
    model.train(was)
    return Score(right / count, said / count, count)


def _vocabulary(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    return int(config.get_text_config().vocab_size) if config is not None else 1


def scores(model: nn.Module, topics: Mapping[str, Questions]) -> dict[str, Score]:
    """Return the score of each topic."""
    return {name: score(model, questions) for name, questions in topics.items()}
