"""What stands where in sequences of questions and answers, told from their labels alone."""

import torch

from hansa.data.clients import IGNORED

Pair = tuple[torch.Tensor, torch.Tensor]


def spans(labels: torch.Tensor) -> Pair:
    """Return where the labels of each answer begin [n], and how many they are [n].

    Args:
        labels: of sequences [n, T]; those of an answer stand together.
    """
    counted = labels >= 0
    return counted.int().argmax(1), counted.sum(1)


def alone(labels: torch.Tensor, blank: tuple[int, ...]) -> Pair:
    """Return inputs and labels [n, T'] of the answers after the prompt of an empty question.

    Args:
        labels: of sequences [n, T].
        blank: tokens of that prompt, at least one.
    """
    starts, lengths = spans(labels)
    before = len(blank) - 1
    width = before + int(lengths.max())
    place = torch.arange(width) - before  # within the answer
    inside = (place >= 0) & (place < lengths[:, None])
    index = (starts[:, None] + place).clamp(0, labels.shape[1] - 1)
    moved = torch.where(inside, labels.gather(1, index), IGNORED)
    inputs = torch.zeros_like(moved)
    inputs[:, : len(blank)] = torch.tensor(blank)
    # An input behind the prompt is the label before it.
    inputs[:, before + 1 :] = moved[:, before:-1].clamp(min=0)
    return inputs, moved


def whole(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return labels [n, T] that count the tokens of the question as well."""
    starts, lengths = spans(labels)
    place = torch.arange(labels.shape[1])
    following = torch.cat([inputs[:, 1:], labels[:, -1:]], 1)
    last = starts + lengths - 1
    before = torch.where(place < last[:, None], following, IGNORED)
    return torch.where(labels >= 0, labels, before)


def answers(labels: torch.Tensor) -> list[list[int]]:
    """Return the tokens of each answer, its end included."""
    return [row[row >= 0].tolist() for row in labels]
