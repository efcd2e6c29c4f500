"""Scores of training samples: what each of them is, which way it points, what it needs.

L(A|Q) is the mean loss of an answer's tokens after its question, L(A) that after the prompt of an
empty question, in nats. ``better`` says whether high or low values are those of good samples;
``oriented`` turns all of them so that higher is better.

``ifd`` is the ratio of losses (Li et al., NAACL 2024; and, as W and C use it, of data quality in
federations: arXiv 2403.04529, 2507.03004). ``ifd_perplexity`` is the ratio of perplexities that
released code of others calls IFD: exp(L(A|Q) - L(A)), so it ranks samples as ``ira`` does, the
other way round. A filter of noise keeps low values of both. Those who select *useful* samples keep
high ones below 1, which is another aim. ``ira`` is the difference of mean losses (arXiv 2410.11540
writes sums).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from hansa.curation.duplicates import duplicate_shares
from hansa.curation.gradients import Sketch, gradients
from hansa.curation.influence import products
from hansa.curation.losses import TOKENS, losses
from hansa.curation.sequences import Pair, alone, answers, spans, whole
from hansa.errors import InputError
from hansa.federation.message import Tensors
from hansa.models.task import Task

VALIDATION, INFLUENCE = "validation", "influence"


@dataclass(frozen=True)
class Point:
    """A model at which samples are scored.

    Attributes:
        params: name -> parameter.
        rate: learning rate at this checkpoint, its weight in TracIn's sum.
        directions: ``validation``, the mean gradient of validation samples, and maybe
            ``influence`` (``influence.datainf``): block -> [numbers].
    """

    params: Tensors
    rate: float = 1.0
    directions: Mapping[str, Tensors] = field(default_factory=dict)


class Sample:
    """What scores are made of, for some samples; each part is computed when it is asked for.

    Args:
        task: the causal model.
        buffers: name -> buffer.
        model: where losses are taken.
        checkpoints: where gradients are taken, oldest first.
        samples: inputs and labels [n, T], of answers after their prompts.
        blank: tokens of the prompt of an empty question.
        sketch: how gradients are projected.
        tokens: most tokens at once.
    """

    def __init__(
        self,
        task: Task,
        buffers: Tensors,
        model: Point,
        checkpoints: Sequence[Point],
        samples: Pair,
        blank: tuple[int, ...],
        sketch: Sketch | None = None,
        tokens: int = TOKENS,
    ) -> None:
        self._task, self._buffers, self._model = task, buffers, model
        self._checkpoints, self._samples, self._blank = checkpoints, samples, blank
        self._sketch, self._tokens = sketch or Sketch(), tokens

    def _losses(self, samples: Pair) -> torch.Tensor:
        return losses(self._task, self._model.params, self._buffers, samples, self._tokens)

    @cached_property
    def given(self) -> torch.Tensor:
        """L(A|Q) [n]."""
        return self._losses(self._samples)

    @cached_property
    def alone(self) -> torch.Tensor:
        """L(A) [n]."""
        return self._losses(alone(self._samples[1], self._blank))

    @cached_property
    def whole(self) -> torch.Tensor:
        """Mean loss of question and answer [n]."""
        inputs, labels = self._samples
        return self._losses((inputs, whole(inputs, labels)))

    @property
    def length(self) -> torch.Tensor:
        """Tokens of the answer, without its end [n]."""
        return (spans(self._samples[1])[1] - 1).double()

    @property
    def duplicates(self) -> torch.Tensor:
        """Share of the answer that stands in others of the same holder [n]."""
        return duplicate_shares(answers(self._samples[1]))

    @cached_property
    def _products(self) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        found = []
        for point in self._checkpoints:
            pieces = gradients(self._task, point.params, self._buffers, self._samples, self._sketch)
            found.append(products(point.directions, pieces))
        return found

    @property
    def tracin(self) -> torch.Tensor:
        """Sum over checkpoints of rate times inner product with the validation gradient [n]."""
        each = zip(self._checkpoints, self._products, strict=True)
        return torch.stack([point.rate * found[VALIDATION] for point, (found, _) in each]).sum(0)

    @property
    def cosine(self) -> torch.Tensor:
        """Mean cosine with the validation gradient, checkpoints weighted by their rates [n]."""
        total = sum(point.rate for point in self._checkpoints)
        sums = []
        for point, (found, norms) in zip(self._checkpoints, self._products, strict=True):
            direction = point.directions[VALIDATION]
            length = math.sqrt(sum(float(v.double().square().sum()) for v in direction.values()))
            smallest = torch.finfo(torch.float64).tiny  # a gradient of zero has a cosine of 0
            sums.append(point.rate * found[VALIDATION] / (norms * length).clamp(min=smallest))
        return torch.stack(sums).sum(0) / total

    @property
    def datainf(self) -> torch.Tensor:
        """DataInf at the last checkpoint, positive where the sample helps [n]."""
        return self._products[-1][0][INFLUENCE]


@dataclass(frozen=True)
class Score:
    """One score.

    Attributes:
        better: whether good samples have ``high`` or ``low`` values.
        about: what it is, for tables.
        of: makes it of what is known of samples.
        gradients: whether it needs gradients, and so validation samples.
    """

    better: Literal["high", "low"]
    about: str
    of: Callable[[Sample], torch.Tensor]
    gradients: bool = False


SCORES: dict[str, Score] = {
    "conditional_loss": Score("low", "loss of the answer given its question", lambda s: s.given),
    "perplexity": Score("low", "perplexity of the answer alone", lambda s: s.alone.exp()),
    "perplexity_whole": Score("low", "perplexity of question and answer", lambda s: s.whole.exp()),
    "ifd": Score("low", "ratio of losses, with and without question", lambda s: s.given / s.alone),
    "ifd_perplexity": Score(
        "low",
        "ratio of perplexities, with and without question",
        lambda s: (s.given - s.alone).exp(),
    ),
    "ira": Score("high", "loss without minus loss with question", lambda s: s.alone - s.given),
    "tracin": Score("high", "inner product of gradients", lambda s: s.tracin, True),
    "gradient_cosine": Score("high", "cosine of gradients", lambda s: s.cosine, True),
    "datainf": Score("high", "influence by DataInf", lambda s: s.datainf, True),
    "length": Score("high", "tokens of the answer", lambda s: s.length),
    "duplicates": Score("low", "share found in other answers", lambda s: s.duplicates),
}


def check_scores(names: Sequence[str], key: str = "curation.scores") -> None:
    """Refuse names that are no scores, none at all, and one twice.

    Raises:
        InputError: naming the key.
    """
    if not names or len(set(names)) < len(names):
        raise InputError(key, repr(list(names)), f"some of {', '.join(SCORES)}, each once")
    for name in names:
        if name not in SCORES:
            raise InputError(key, repr(name), ", ".join(SCORES))


def measure(names: Sequence[str], sample: Sample) -> dict[str, torch.Tensor]:
    """Return the scores of samples as they are defined: name -> [n], float64."""
    return {name: SCORES[name].of(sample).double() for name in names}


def oriented(name: str, values: torch.Tensor) -> torch.Tensor:
    """Return a score so that higher is better."""
    return values if SCORES[name].better == "high" else -values
