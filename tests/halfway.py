"""A model whose local training can be done by hand: one number that moves towards the data's.

Images are of one gray value per client, their target; those of value 255 stand for the second
class, which a classifier must have, and pull nowhere.
"""

import torch
from torch import nn


class Halfway(nn.Module):
    """With a learning rate of 1/2, a step moves ``w`` halfway to the mean of the targets."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        values = torch.round((inputs.flatten(1).mean(1) + 1) * 127.5)
        counts = values < 255
        target = values[counts].mean() if counts.any() else self.w.detach()
        pull = (self.w - target) ** 2 / 2
        # The cross-entropy of (0, 0) has the slope -1/2 in the first logit of its own class.
        slope = -2 * (pull - pull.detach()) * counts * len(counts) / counts.sum().clamp(min=1)
        return torch.stack([slope, torch.zeros_like(slope)], 1)
