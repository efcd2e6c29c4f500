"""How samples are dealt to clients, and each client's samples to its splits."""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from hansa.data.clients import SPLITS, Index, Split
from hansa.errors import InputError
from hansa.seeding import numpy_generator

DIRICHLET_TRIES = 100
_CUT_ORDER: tuple[Split, ...] = ("test", "validation", "train")


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Iid(_Options):
    """Samples dealt at random in equal numbers."""

    kind: Literal["iid"] = "iid"


class Shards(_Options):
    """Every client holds samples of exactly so many distinct classes.

    Classes are given out as evenly as can be, and a class's samples are dealt equally to the
    clients that hold it.
    """

    kind: Literal["shards"] = "shards"
    classes: int = Field(2, ge=1, strict=True)
    """Classes per client."""


class Dirichlet(_Options):
    """Each class is divided over the clients in proportions drawn from a Dirichlet distribution.

    Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", 2019 (arXiv 1909.06335).
    """

    kind: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(0.5, gt=0, allow_inf_nan=False, strict=True)
    """Concentration: small is uneven, large is even."""
    min_samples: int = Field(10, ge=2, strict=True)
    """Fewest samples of a client; the draw is repeated, up to 100 times, until all have them."""
    equal: bool = False
    """Clients of equal size (but for one sample): each draws the classes of its samples from
    proportions of its own, and from what is left once a class is used up."""


class Group(_Options):
    """One client per writer, site or other group that the data names."""

    kind: Literal["group"] = "group"
    min_samples: int = Field(10, ge=2, strict=True)
    """Groups with fewer samples are left out."""


class Shift(_Options):
    """Samples dealt at random; each client sees them through a shift of its own.

    Client k takes the shift number k, counted round: ``rotation`` turns by 90 degrees times
    1, 2 or 3 (counted up each time), ``inversion`` turns light to dark, ``noise`` adds Gaussian
    noise, ``none`` leaves images as they are.
    """

    kind: Literal["shift"] = "shift"
    shifts: tuple[Literal["none", "rotation", "inversion", "noise"], ...] = Field(
        ("none", "rotation", "inversion", "noise"), min_length=1
    )
    noise: float = Field(0.2, ge=0, le=2, strict=True)
    """Standard deviation of the noise, where black to white is 2."""


Partition = Annotated[Iid | Shards | Dirichlet | Group | Shift, Field(discriminator="kind")]


def deal(
    partition: Iid | Shards | Dirichlet | Group | Shift,
    labels: Index,
    groups: Sequence[str] | None,
    num_clients: int | None,
    seed: int,
) -> dict[str, Index]:
    """Return each client's positions, by client name; no position is dealt twice.

    Raises:
        InputError: more clients than samples, more classes per client than there are, no group
            column, or a draw that leaves a client with too few samples.
    """
    rng = numpy_generator(seed, "partition")
    if isinstance(partition, Group):
        return _by_group(partition, groups, num_clients)
    if num_clients is None:
        raise InputError("data.clients", "nothing", f"a number, with {partition.kind!r}")
    if num_clients > len(labels):
        raise InputError("data.clients", num_clients, f"at most the {len(labels)} samples")
    match partition:
        case Shards():
            parts = _shards(partition.classes, labels, num_clients, rng)
        case Dirichlet():
            parts = _dirichlet(partition, labels, num_clients, rng)
        case _:
            parts = np.array_split(rng.permutation(len(labels)), num_clients)
    width = len(str(num_clients - 1))
    return {f"client-{k:0{width}}": np.sort(part) for k, part in enumerate(parts)}


def split(
    labels: Index,
    positions: Index,
    shares: dict[Split, float],
    caps: dict[Split, int | None],
    rng: np.random.Generator,
) -> dict[Split, Index]:
    """Divide a client's positions into splits, class by class.

    A class of one sample goes to train; a class of two to train and test; so the classes of
    validation and test are among those of train.

    Args:
        labels: class numbers of the whole source.
        positions: the client's samples.
        shares: share of each split.
        caps: largest number of samples per class in each split, None for no cap.
        rng: the client's own stream.
    """
    splits: dict[Split, list[Index]] = {name: [] for name in SPLITS}
    for label in np.unique(labels[positions]):
        mine = rng.permutation(positions[labels[positions] == label])
        num_test = min(max(1, round(shares["test"] * len(mine))), len(mine) - 1)
        num_test = num_test if shares["test"] else 0
        left = len(mine) - num_test
        num_validation = min(max(1, round(shares["validation"] * len(mine))), left - 1)
        num_validation = max(0, num_validation) if shares["validation"] else 0
        cuts = np.split(mine, [num_test, num_test + num_validation])
        parts: dict[Split, Index] = dict(zip(_CUT_ORDER, cuts, strict=True))
        for name, part in parts.items():
            splits[name].append(part[: caps[name]])
    return {name: np.sort(np.concatenate(parts)) for name, parts in splits.items()}


def _shards(
    per_client: int, labels: Index, num_clients: int, rng: np.random.Generator
) -> list[Index]:
    classes = np.unique(labels)
    if per_client > len(classes):
        raise InputError("data.partition.classes", per_client, f"1 to {len(classes)}")
    used = np.zeros(len(classes), np.int64)
    holders: list[list[int]] = [[] for _ in classes]
    for client in range(num_clients):
        # The least used classes first, at random among equals.
        chosen = np.lexsort((rng.random(len(classes)), used))[:per_client]
        used[chosen] += 1
        for k in chosen:
            holders[k].append(client)
    parts: list[list[Index]] = [[] for _ in range(num_clients)]
    for label, clients in zip(classes, holders, strict=True):
        mine = rng.permutation(np.flatnonzero(labels == label))
        if len(clients) > len(mine):
            raise InputError(
                "data.clients",
                f"{num_clients}, of which {len(clients)} share the {len(mine)} samples of a class",
                "at least one sample of each of its classes for every client",
            )
        if clients:
            for client, part in zip(clients, np.array_split(mine, len(clients)), strict=True):
                parts[client].append(part)
    return [np.concatenate(part) for part in parts]


def _dirichlet(
    options: Dirichlet, labels: Index, num_clients: int, rng: np.random.Generator
) -> list[Index]:
    if num_clients * options.min_samples > len(labels):
        raise InputError(
            "data.partition.min_samples",
            f"{options.min_samples} for {num_clients} clients",
            f"at most {len(labels) // num_clients}, as there are {len(labels)} samples",
        )
    if options.equal:
        return _equal_dirichlet(options.alpha, labels, num_clients, rng)
    for _ in range(DIRICHLET_TRIES):
        parts: list[list[Index]] = [[] for _ in range(num_clients)]
        for label in np.unique(labels):
            mine = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(num_clients, options.alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(mine)).astype(np.int64)
            for part, piece in zip(parts, np.split(mine, cuts), strict=True):
                part.append(piece)
        dealt = [np.concatenate(part) for part in parts]
        if min(map(len, dealt)) >= options.min_samples:
            return dealt
    raise InputError(
        "data.partition.alpha",
        f"{options.alpha}: in {DIRICHLET_TRIES} draws some client had fewer than "
        f"{options.min_samples} of {len(labels)} samples",
        "a larger alpha, fewer clients or a smaller data.partition.min_samples",
    )


def _equal_dirichlet(
    alpha: float, labels: Index, num_clients: int, rng: np.random.Generator
) -> list[Index]:
    classes, counts = np.unique(labels, return_counts=True)
    left = [list(rng.permutation(np.flatnonzero(labels == label))) for label in classes]
    dealt = []
    for size in (len(part) for part in np.array_split(labels, num_clients)):
        # Proportions around those of all samples, as in section 3 of the paper.
        shares = rng.dirichlet(alpha * len(classes) * counts / len(labels))
        part = []
        for _ in range(size):
            open_ = np.array([bool(samples) for samples in left])
            weights = np.where(open_, np.maximum(shares, 1e-12), 0.0)
            part.append(left[rng.choice(len(classes), p=weights / weights.sum())].pop())
        dealt.append(np.array(part, dtype=np.int64))
    return dealt


def _by_group(
    options: Group, groups: Sequence[str] | None, num_clients: int | None
) -> dict[str, Index]:
    if groups is None:
        raise InputError(
            "data.group_column", "nothing", "the column that names each sample's group"
        )
    names, inverse = np.unique(np.array(groups), return_inverse=True)
    parts = [np.flatnonzero(inverse == k) for k in range(len(names))]
    kept = [
        (str(name), part)
        for name, part in zip(names, parts, strict=True)
        if len(part) >= options.min_samples
    ]
    if not kept or (num_clients or 0) > len(kept):
        raise InputError(
            "data.clients",
            f"{num_clients or 'all'} of {len(kept)} groups with at least "
            f"{options.min_samples} samples",
            "as many clients as there are groups, or a smaller data.partition.min_samples",
        )
    width = len(str(len(kept) - 1))
    clean = ("".join(c if c.isalnum() and c.isascii() else "-" for c in n) for n, _ in kept)
    # Numbered, since two names may look the same once they are fit to be a path.
    named = {
        f"{k:0{width}}-{name}"[:64]: part
        for k, (name, (_, part)) in enumerate(zip(clean, kept, strict=True))
    }
    return dict(list(named.items())[:num_clients])
