"""Train one model by a recipe, and keep what each epoch gave."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import process_time

import torch
import torch.nn.functional as F
from torch import nn

from hansa.search.augment import randaugment, shift
from hansa.search.recipes import Part, Recipe, Splits
from hansa.seeding import generator, global_stream

_AUGMENT = {"shift": shift, "randaugment": randaugment}


@dataclass
class Curves:
    """What every epoch gave, one entry each.

    Attributes:
        train_correct: training samples classed right while training, as augmented.
        validation_correct: validation samples classed right after the epoch.
        test_correct: test samples.
        train_loss: mean cross entropy in nats.
        validation_loss: the same.
        test_loss: the same.
        seconds: processor time of training; what scoring took is not in it.
        stopped: whether training ended before the recipe's last epoch.
    """

    train_correct: list[int] = field(default_factory=list)
    validation_correct: list[int] = field(default_factory=list)
    test_correct: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    seconds: float = 0.0
    stopped: bool = False

    @property
    def best_epoch(self) -> int:
        """The epoch, from 0, of best validation accuracy, of equals that of the lower loss."""
        return min(
            range(len(self.validation_correct)),
            key=lambda k: (-self.validation_correct[k], self.validation_loss[k]),
        )

    @property
    def results(self) -> dict[str, object]:
        """All that is the same for everybody who trains the same: not the seconds."""
        return {name: value for name, value in vars(self).items() if name != "seconds"}


Stop = Callable[[int, Curves], bool]


def train_model(
    module: nn.Module,
    recipe: Recipe,
    splits: Splits,
    seed: int,
    *,
    stop: Stop | None = None,
    device: str = "cpu",
) -> Curves:
    """Train a model, which is changed, and score it after every epoch.

    The same values come out wherever PyTorch has as many threads; one is what tables are made by.

    Args:
        module: maps inputs to logits.
        recipe: how.
        splits: on what.
        seed: of the order of samples, the augmentation and dropout.
        stop: called with the number of epochs done and what they gave; ends training where true.
        device: where.
    """
    memory = torch.channels_last  # faster for small maps, depthwise convolutions above all
    module.to(device=device, memory_format=memory)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        module.parameters(), recipe.lr, recipe.momentum, 0, recipe.weight_decay, recipe.nesterov
    )
    rng = generator(seed, "search training")
    inputs, labels = splits.train
    per_epoch = math.ceil(len(labels) / recipe.batch_size)
    curves = Curves()
    with global_stream(seed, "search layers"):
        for epoch in range(recipe.epochs):
            module.train()
            begun, loss_sum, correct = process_time(), 0.0, 0
            order = torch.randperm(len(labels), generator=rng)
            for step, index in enumerate(order.split(recipe.batch_size)):
                done = epoch if recipe.annealed == "epoch" else epoch + step / per_epoch
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr * (1 + math.cos(math.pi * done / recipe.epochs)) / 2
                batch = _AUGMENT[recipe.augmentation](inputs[index], rng)
                batch = batch.to(device).contiguous(memory_format=memory)
                wanted = labels[index].to(device)
                logits = module(batch)
                loss = F.cross_entropy(logits, wanted)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss_sum += float(loss.detach()) * len(index)
                correct += int((logits.argmax(1) == wanted).sum())
            curves.seconds += process_time() - begun
            curves.train_correct.append(correct)
            curves.train_loss.append(loss_sum / len(labels))
            for part, found in (
                (splits.validation, (curves.validation_correct, curves.validation_loss)),
                (splits.test, (curves.test_correct, curves.test_loss)),
            ):
                right, mean = score(module, part, device)
                found[0].append(right)
                found[1].append(mean)
            if epoch + 1 < recipe.epochs and stop is not None and stop(epoch + 1, curves):
                curves.stopped = True
                break
    return curves


def score(module: nn.Module, part: Part, device: str = "cpu") -> tuple[int, float]:
    """Return how many samples a model classes right, and their mean cross entropy."""
    module.eval()
    correct, loss = 0, 0.0
    with torch.no_grad():
        for inputs, labels in zip(part[0].split(320), part[1].split(320), strict=True):
            wanted = labels.to(device)
            logits = module(inputs.to(device).contiguous(memory_format=torch.channels_last))
            correct += int((logits.argmax(1) == wanted).sum())
            loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
    return correct, loss / len(part[1])
