"""From a source and a partition to clients, with a fingerprint of what they hold."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator

from hansa.data.clients import SPLITS, Client, Split
from hansa.data.partition import Iid, Partition, Shift, deal, split
from hansa.data.sources import SourceOptions, load
from hansa.data.tokenizer import Tokenizer
from hansa.errors import InputError
from hansa.seeding import generator, numpy_generator


class DataOptions(SourceOptions):
    """What clients hold: a source, a partition, and the sizes of the splits."""

    clients: int | None = Field(None, ge=1, strict=True)
    """Number of clients; with the partition by group, at most so many groups."""
    only: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the clients that take part, of all that the samples were dealt to; by default all.
    What each holds does not depend on who else takes part."""
    partition: Partition = Iid()
    validation: float = Field(0.15, ge=0, lt=1, strict=True)
    """Share of a client's samples held out for choosing (a round, a setting)."""
    test: float = Field(0.25, ge=0, lt=1, strict=True)
    """Share of a client's samples held out for the score."""
    train_per_class: int | None = Field(None, ge=1, strict=True)
    """Most training samples per class and client."""
    test_per_class: int | None = Field(None, ge=1, strict=True)
    """Most test samples per class and client."""

    @model_validator(mode="after")
    def _leaves_training(self) -> "DataOptions":
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together must leave samples for training")
        return self


@dataclass(frozen=True)
class FederatedData:
    """Clients by name, over one pool of samples; of text, each over a pool of its own.

    Attributes:
        clients: client name -> what it holds.
        classes: names of the classes; of text, the token numbers.
        shape: shape of one input.
        fingerprint: SHA-256 over all samples, labels and splits, and over the tokeniser, as hex.
        tokenizer: of text, what its tokens stand for.
    """

    clients: Mapping[str, Client]
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    fingerprint: str
    tokenizer: Tokenizer | None = None

    @property
    def bytes_of(self) -> torch.Tensor | None:
        """Bytes that each token stands for, int64 [classes]; None where there are no tokens."""
        return None if self.tokenizer is None else self.tokenizer.bytes_of


def federate(options: DataOptions, seed: int) -> FederatedData:
    """Read, deal and split the data of a run.

    Raises:
        InputError: see ``sources.load`` and ``partition.deal``; also a client that would have no
            sample to train on, or none to be scored on.
    """
    source = load(options)
    dealt = deal(options.partition, source.labels, source.groups, options.clients, seed)
    shares: dict[Split, float] = {"validation": options.validation, "test": options.test}
    caps: dict[Split, int | None] = {
        "train": options.train_per_class,
        "validation": None,
        "test": options.test_per_class,
    }
    splits = {}
    for name, positions in dealt.items():
        rng = numpy_generator(seed, name, "split")
        splits[name] = split(source.labels, positions, shares, caps, rng)
        needed: list[Split] = ["train", "test"] if options.test else ["train"]
        for part in needed:
            if not len(splits[name][part]):
                raise InputError(
                    f"data of {name}",
                    f"{len(positions)} samples, none of them left for {part}",
                    "two samples of a class or more; fewer clients, or another partition",
                )
    used = np.unique(np.concatenate([p for s in splits.values() for p in s.values()]))
    inputs, labels = source.read(used), torch.from_numpy(source.labels[used])
    places = {
        name: {part: np.searchsorted(used, s) for part, s in mine.items()}
        for name, mine in splits.items()
    }
    if isinstance(options.partition, Shift):
        inputs = _shifted(options.partition, inputs, places, seed)
    if options.only is not None:
        if unknown := sorted(set(options.only) - set(places)):
            some = ", ".join(list(places)[:5]) + (", ..." if len(places) > 5 else "")
            raise InputError("data.only", unknown[0], some)
        places = {name: mine for name, mine in places.items() if name in options.only}
    clients = {name: Client(inputs, labels, mine) for name, mine in places.items()}
    return FederatedData(
        clients, source.classes, tuple(inputs.shape[1:]), fingerprint(inputs, labels, places)
    )


def _shifted(
    options: Shift,
    inputs: torch.Tensor,
    places: Mapping[str, Mapping[Split, Any]],
    seed: int,
) -> torch.Tensor:
    """Return the pool with each client's samples shifted its way; a sample has one client."""
    inputs = inputs.clone()
    for k, (name, mine) in enumerate(places.items()):
        kind = options.shifts[k % len(options.shifts)]
        index = torch.from_numpy(np.concatenate([mine[part] for part in SPLITS]))
        images = inputs[index]
        is_bytes = images.dtype is torch.uint8
        if kind == "rotation":
            if images.shape[-1] != images.shape[-2]:
                raise InputError(
                    "data.partition.shifts",
                    f"rotation of images of {images.shape[-2]}x{images.shape[-1]}",
                    "square images, or data.size",
                )
            images = images.rot90(k // len(options.shifts) % 3 + 1, (-2, -1))
        elif kind == "inversion":
            images = 255 - images if is_bytes else -images
        elif kind == "noise":
            drawn = torch.randn(images.shape, generator=generator(seed, name, "noise"))
            noisy = images + options.noise * drawn * (127.5 if is_bytes else 1)
            images = noisy.round().clamp(0, 255).byte() if is_bytes else noisy.clamp(-1, 1)
        inputs[index] = images
    return inputs


def fingerprint(
    inputs: torch.Tensor, labels: torch.Tensor, places: Mapping[str, Mapping[Split, Any]]
) -> str:
    """Return SHA-256 over a pool of samples and the splits of its clients, as hex.

    Args:
        inputs: the pool's inputs [n, ...].
        labels: the pool's labels [n, ...].
        places: client name -> split -> positions in the pool.
    """
    digest = hashlib.sha256(f"{inputs.dtype}{tuple(inputs.shape)}".encode())
    digest.update(inputs.contiguous().view(torch.uint8).numpy().data)
    digest.update(labels.numpy().data)
    for name, mine in places.items():
        for part in SPLITS:
            digest.update(f"{name}/{part}/{len(mine[part])}".encode())
            digest.update(np.ascontiguousarray(mine[part], np.int64).data)
    return digest.hexdigest()
