"""What one client holds: its own samples, split into train, validation and test."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save

from hansa.errors import InputError
from hansa.files import write_atomic
from hansa.tensor_files import read_tensors

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Index = np.ndarray[tuple[int], np.dtype[np.int64]]
Samples = tuple[torch.Tensor, torch.Tensor]
IGNORED = -100
"""The label of a token that is no part of the loss, as PyTorch has it."""


@dataclass(frozen=True)
class Client:
    """A client's view into a pool of samples; nothing is copied until a split is asked for.

    Attributes:
        inputs: the pool's inputs [n, ...]; uint8 images [n, channels, height, width] are scaled
            to [-1, 1] on the way out, anything else is handed out as it is.
        labels: the pool's class numbers [n], int64; of text, the next tokens [n, context].
        splits: for each split, the positions of the client's samples in the pool.
        weights: what each sample of the pool counts in training [n], from 0 to 1; None where all
            count the same.
        domains: number of the domain of each sample of the pool [n], int64; None where there are
            none.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    splits: dict[Split, Index]
    weights: torch.Tensor | None = None
    domains: torch.Tensor | None = None

    @classmethod
    def of(cls, train: Samples, test: Samples, validation: Samples | None = None) -> "Client":
        """Return a client from its own tensors, each split as (inputs, class numbers).

        Raises:
            InputError: a split whose inputs and labels differ in length, an empty train split, or
                splits of different dtypes.
        """
        parts = {"train": train, "validation": validation, "test": test}
        splits: dict[Split, Index] = {}
        inputs, labels, start = [], [], 0
        for name in SPLITS:
            part = parts[name]
            if part is None:
                splits[name] = np.zeros(0, np.int64)
                continue
            if len(part[0]) != len(part[1]):
                raise InputError(
                    name, f"{len(part[0])} inputs and {len(part[1])} labels", "equal numbers"
                )
            splits[name] = np.arange(start, start + len(part[0]))
            start += len(part[0])
            inputs.append(part[0])
            labels.append(part[1].long())
        if not len(splits["train"]):
            raise InputError("train", "no samples", "at least one sample")
        if len({part.dtype for part in inputs}) > 1:  # `cat` would turn bytes into unscaled floats
            found = " and ".join(str(part.dtype) for part in inputs)
            raise InputError("inputs", found, "one dtype for all splits")
        return cls(torch.cat(inputs), torch.cat(labels), splits)

    @classmethod
    def pooled(cls, clients: Iterable["Client"]) -> "Client":
        """Return one client that holds the training data of all of them, and nothing else."""
        held = list(clients)
        parts = [client.batch("train") for client in held]
        inputs, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        splits: dict[Split, Index] = {split: np.zeros(0, np.int64) for split in SPLITS}
        weights = None
        if any(client.weights is not None for client in held):
            ones = (torch.ones(client.count("train")) for client in held)
            weights = torch.cat(
                [(*c.weighted("train"), one)[2] for c, one in zip(held, ones, strict=True)]
            )
        return cls(inputs, labels, {**splits, "train": np.arange(len(labels))}, weights)

    def save(self, path: Path) -> None:
        """Write what the client holds, and nothing else of its pool, into one file."""
        index = torch.from_numpy(np.concatenate([self.splits[split] for split in SPLITS]))
        sizes = torch.tensor([self.count(split) for split in SPLITS])
        own = {"inputs": self.inputs[index].contiguous(), "labels": self.labels[index]}
        about = {"weights": self.weights, "domains": self.domains}
        own |= {name: tensor[index] for name, tensor in about.items() if tensor is not None}
        write_atomic(path, save({**own, "sizes": sizes}))

    @classmethod
    def load(cls, path: Path) -> "Client":
        """Return what ``save`` has written.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: what is there is something else.
        """
        held = read_tensors(path)
        sizes = held["sizes"].flatten().tolist()
        count = len(held["labels"]) if held["labels"].dim() else -1
        whole = all(type(size) is int and 0 <= size <= count for size in sizes)
        if len(sizes) != len(SPLITS) or not whole or sum(sizes) != count:
            raise ValueError(f"splits of {sizes[:3]} samples where there are {count}")
        ends = np.cumsum([0, *sizes])
        splits = {
            split: np.arange(start, end)
            for split, start, end in zip(SPLITS, ends, ends[1:], strict=False)
        }
        about = held.get("weights"), held.get("domains")
        return cls(held["inputs"], held["labels"], splits, *about)

    def count(self, split: Split) -> int:
        """Return the number of samples in a split."""
        return len(self.splits[split])

    def batch(self, split: Split) -> Samples:
        """Return a whole split as (inputs, labels)."""
        return take(self.inputs, self.labels, torch.from_numpy(self.splits[split]))

    def weighted(self, split: Split) -> tuple[torch.Tensor, ...]:
        """Return a whole split as (inputs, labels), and weights where samples have any."""
        samples = self.batch(split)
        if self.weights is None:
            return samples
        return *samples, self.weights[torch.from_numpy(self.splits[split])]


def take(inputs: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> Samples:
    """Return samples of a pool by their positions (of any shape), as a model sees them."""
    chosen = inputs[index]
    if inputs.dtype is torch.uint8 and inputs.dim() == 4:
        chosen = chosen.float().div_(127.5).sub_(1)
    return chosen, labels[index]
