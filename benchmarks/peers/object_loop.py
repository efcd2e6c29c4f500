"""The loop in PFLlib's style: an object per client with its own copy of the model and a DataLoader.

What makes the style: every client is sent the model in every round, whether it takes part or not;
samples are Python objects that a loader collates; the server averages whole uploaded models.
"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Sampler
from work import Clock, Work, main


class InOrder(Sampler[int]):
    """Draws samples in the order that the work file gives."""

    def __init__(self, order: torch.Tensor) -> None:
        self.order = order

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.tolist())

    def __len__(self) -> int:
        return len(self.order)


class Participant:
    """One client: its model, its optimizer, its samples."""

    def __init__(self, work: Work, number: int) -> None:
        self.work, self.number, self.model = work, number, copy.deepcopy(work.model())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=work.lr)
        self.samples = list(zip(work.images[number], work.labels[number], strict=True))

    def receive(self, common: nn.Module) -> None:
        """Copy the common weights."""
        for mine, theirs in zip(self.model.parameters(), common.parameters(), strict=True):
            mine.data = theirs.data.clone()

    def train(self, round_: int) -> None:
        """Train for one epoch."""
        order = InOrder(self.work.order(round_, self.number))
        self.model.train()
        for inputs, labels in DataLoader(self.samples, self.work.batch, sampler=order):  # type: ignore[arg-type]
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(inputs), labels).backward()
            self.optimizer.step()


def run(work: Work, clock: Clock) -> dict[str, torch.Tensor]:
    """Do all rounds."""
    participants = [Participant(work, k) for k in range(len(work.images))]
    common = work.model()
    for number, cohort in enumerate(work.cohorts):
        for participant in participants:
            participant.receive(common)
        for client in cohort:
            participants[client].train(number)
        common = copy.deepcopy(participants[cohort[0]].model)
        for parameter in common.parameters():
            parameter.data.zero_()
        for client in cohort:
            uploaded = participants[client].model.parameters()
            for mean, tensor in zip(common.parameters(), uploaded, strict=True):
                mean.data += tensor.data.clone() / len(cohort)
        clock.tick()
    return dict(common.state_dict())


if __name__ == "__main__":
    main(run)
