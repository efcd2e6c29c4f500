"""Simulated attackers: clients of the local engine that send what harms the common model.

=================  ==========================================================================
kind               what an attacker sends in the place of x + d, trained from x
=================  ==========================================================================
``sign_flip``      x - scale * d
``noise``          x + Gaussian noise, scale times as long as d
``label_flip``     what training on labels C - 1 - y makes
``little``         mean - z * standard deviation of what honest clients send, entry by entry
``inner_product``  x - scale * mean of the honest clients' changes
=================  ==========================================================================

``little``: Baruch et al., "A Little Is Enough: Circumventing Defenses For Distributed Learning",
NeurIPS 2019 (arXiv 1902.06156). ``inner_product``: Xie et al., "Fall of Empires: Breaking
Byzantine-tolerant SGD by Inner Product Manipulation", UAI 2020 (arXiv 1903.03936). In both the
attackers of a node know all that its honest children send. The first two change what training
made before the method packs its reply, so that they do the same with every method.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hansa.data.clients import Client
from hansa.errors import InputError
from hansa.federation.message import Message, Tensors
from hansa.federation.tree import name_of
from hansa.seeding import numpy_generator

Kind = Literal["sign_flip", "noise", "label_flip", "little", "inner_product"]
SCALES: dict[str, float] = {"sign_flip": 1.0, "noise": 10.0, "inner_product": 1.0}
COLLUDING = ("little", "inner_product")
"""Kinds whose attackers look at what all others send."""


class Attackers(BaseModel):
    """Who attacks, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    share: float | None = Field(None, gt=0, lt=1, strict=True)
    """Share of the clients that attack, drawn by the run's seed, rounded to whole clients."""
    clients: tuple[str, ...] | None = None
    """Their names, in place of a share."""
    scale: float | None = Field(None, ge=0, allow_inf_nan=False, strict=True)
    """How much: see the table above. By default 1 of ``sign_flip`` and ``inner_product``, 10 of
    ``noise``, and of ``little`` the largest z that lets so many attackers pass, by the paper."""

    @model_validator(mode="after")
    def _fits(self) -> "Attackers":
        if (self.share is None) == (self.clients is None):
            raise ValueError("either share or clients must be set")
        if self.kind == "label_flip" and self.scale is not None:
            raise ValueError("label_flip has no scale")
        return self

    def drawn(self, leaves: Iterable[str], seed: int) -> "Attack":
        """Return the attack of a run.

        Args:
            leaves: the paths of all clients.
            seed: the run's.

        Raises:
            InputError: a client that is not there, or nobody who is honest.
        """
        paths = sorted(leaves)
        if self.clients is not None:
            known = {name_of(path): path for path in paths}
            for name in self.clients:
                if name not in known:
                    raise InputError("attackers.clients", repr(name), ", ".join(sorted(known)))
            chosen = {known[name] for name in self.clients}
        else:
            num = int((self.share or 0.0) * len(paths) + 0.5)
            order = numpy_generator(seed, "attackers").permutation(len(paths))
            chosen = {paths[k] for k in order[:num]}
        if len(chosen) == len(paths):
            raise InputError("attackers", "all clients", "some of them")
        scale = self.scale if self.scale is not None else SCALES.get(self.kind)
        return Attack(self.kind, frozenset(chosen), scale)


@dataclass(frozen=True)
class Attack:
    """The attack of a run: its kind, the attackers' paths, its size.

    Attributes:
        kind: what they do.
        paths: who they are.
        scale: how much; None with ``little`` takes z from how many they are.
    """

    kind: Kind
    paths: frozenset[str]
    scale: float | None

    @property
    def colludes(self) -> bool:
        """Whether what an attacker sends depends on what others send."""
        return self.kind in COLLUDING

    def poisoned(self, clients: Mapping[str, Client], classes: int) -> dict[str, Client]:
        """Return the clients, those that attack with flipped labels where that is the attack.

        Args:
            clients: path -> what it holds.
            classes: number of classes C; a label y becomes C - 1 - y.
        """
        if self.kind != "label_flip":
            return dict(clients)
        return {p: _flipped(c, classes) if p in self.paths else c for p, c in clients.items()}

    def turns(self, path: str) -> bool:
        """Tell whether a client puts something else in the place of what it trained."""
        return path in self.paths and self.kind in ("sign_flip", "noise")

    def turned(
        self, start: Tensors, ended: Tensors, rng: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Return trained parameters as an attacker has them.

        Args:
            start: name -> parameter that its training began with.
            ended: name -> parameter that it ended with.
            rng: what noise is drawn from.
        """
        scale = 0.0 if self.scale is None else self.scale
        if self.kind == "sign_flip":
            return {name: start[name] - scale * (p - start[name]) for name, p in ended.items()}
        noise = {name: torch.randn(p.shape, generator=rng) for name, p in ended.items()}
        change = {name: p - start[name] for name, p in ended.items()}
        factor = scale * _length(change) / max(_length(noise), 1e-30)
        return {n: start[n] + (factor * noise[n]).to(p.dtype) for n, p in ended.items()}

    def replied(
        self, replies: Mapping[str, Message], unchanged: Mapping[str, Tensors]
    ) -> dict[str, Message]:
        """Return the replies of a node's children as they are sent, where attackers collude.

        Args:
            replies: child -> its reply.
            unchanged: what a reply would hold that changes nothing; tensors it does not name are
                changes themselves.
        """
        honest = [reply for path, reply in replies.items() if path not in self.paths and reply]
        bad = [path for path, reply in replies.items() if path in self.paths and reply]
        if not honest or not bad or not self.colludes:
            return dict(replies)
        sent = dict(replies)
        z = self.scale if self.scale is not None else largest_z(len(honest) + len(bad), len(bad))
        crafted: dict[tuple[str, str], torch.Tensor] = {}
        for group, name, rows in _shared(honest):
            mean = rows.mean(0)
            if self.kind == "little":
                crafted[group, name] = mean - z * rows.std(0, correction=0)
            else:
                old = unchanged.get(group, {}).get(name)
                start = torch.zeros_like(mean) if old is None else old.double()
                crafted[group, name] = start - z * (mean - start)
        for path in bad:
            groups = {
                group: {
                    name: crafted[group, name].to(tensor.dtype)
                    if (group, name) in crafted and crafted[group, name].shape == tensor.shape
                    else tensor
                    for name, tensor in tensors.items()
                }
                for group, tensors in sent[path].groups.items()
            }
            sent[path] = replace(sent[path], groups=groups)
        return sent


def largest_z(replies: int, attackers: int) -> float:
    """Return z of ``little``: so many honest clients lie further out that a majority is made.

    Args:
        replies: the replies of a round, n.
        attackers: those of attackers among them, f; the honest are n - f, of whom
            s = floor(n / 2 + 1) - f must side with them: z is where (n - f - s) / (n - f) of a
            normal distribution lie below.
    """
    honest = replies - attackers
    needed = replies // 2 + 1 - attackers
    share = (honest - needed) / honest
    return max(0.0, NormalDist().inv_cdf(min(share, 1 - 1e-9))) if share > 0 else 0.0


def _shared(replies: list[Message]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield the tensors of floating-point numbers that all replies hold, stacked in float64."""
    for group, tensors in replies[0].groups.items():
        for name, first in tensors.items():
            rows = [reply.group(group).get(name) for reply in replies]
            held = [row for row in rows if row is not None and row.shape == first.shape]
            if len(held) == len(replies) and first.dtype.is_floating_point:
                yield group, name, torch.stack(held).double()


def _flipped(client: Client, classes: int) -> Client:
    labels, rows = client.labels.clone(), torch.from_numpy(client.splits["train"])
    labels[rows] = classes - 1 - labels[rows]
    return replace(client, labels=labels)


def _length(tensors: Tensors) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
