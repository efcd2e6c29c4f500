"""FedSelect: each client finds the entries of the model that should be its own.

Tamirisa et al., "FedSelect: Personalized Federated Learning with Customized Selection of
Parameters for Fine-Tuning", CVPR 2024 (arXiv 2404.02478). Entries that move most in local
training become personal and never shared again; stable ones keep being averaged.

What crosses the network are the values of shared entries, packed in a row, and once the positions
of the entries that become personal. Both ends know the mask, so no positions travel with values:
a client keeps its masks in its state, the parent in its link to that client.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from hansa.federation.aggregation import WeightedMean, add_metrics
from hansa.federation.message import Message, MessageError, State, Tensors
from hansa.federation.methods.base import (
    Method,
    Scored,
    Work,
    begin_work,
    train_step,
    training_metrics,
)
from hansa.federation.node import Child, Node, Reply, Setup
from hansa.models.task import Batch


class FedSelect(Method):
    """FedSelect in its conference form.

    A round at a client: put the received values into the shared entries of the mask it last
    trained with; let the entries promoted then become personal (so they start from the common
    value); train each epoch in two passes, personal entries first, shared entries second; promote
    the share ``rate`` of the shared entries that changed most, tensor by tensor.
    """

    name: ClassVar[str] = "fedselect"
    mode: Literal["cvpr"] = "cvpr"
    rate: float = Field(0.05, ge=0, le=1, strict=True)
    """Share p of the still shared entries of each tensor that become personal in a round."""
    limit: float = Field(0.3, ge=0, le=1, strict=True)
    """Ceiling alpha on the personal share of each tensor."""
    reference: Literal["round-start", "last-update"] = "round-start"
    """What an entry's change is measured from: its value at the start of the round, or the
    client's trained value when the mask was last updated (at first: the initial model)."""
    scored: ClassVar[Scored] = "trained"
    max_depth: ClassVar[int | None] = 1

    def start_root(self, node: Node) -> State:
        """Return the initial model."""
        return State({"model": node.setup.task.params, "buffers": node.setup.shared_buffers})

    def receive(self, node: Node, state: State, down: Message) -> State:
        """Return the model for this round, and the mask it is trained with."""
        setup = node.setup
        used = _mask(state.group("mask"), setup.task.params)
        own = {**setup.task.params, **state.group("model")}
        common = unpack(down.group("model"), used, setup.task.params)
        model = {name: torch.where(used[name], own[name], common[name]) for name in used}
        buffers = {
            **setup.task.buffers,
            **state.group("buffers"),
            **down.require("buffers", setup.shared_buffers),
        }
        groups = {
            "model": model,
            "buffers": buffers,
            "mask": _mask(state.group("next"), setup.task.params),
        }
        if self.reference == "last-update":
            groups["reference"] = {**setup.task.params, **state.group("reference")}
        return State(groups)

    def begin(self, node: Node, state: State) -> Work:
        """Return work that carries the mask."""
        model, buffers = state.group("model"), state.group("buffers")
        return begin_work(node.setup, model, buffers, mask=state.group("mask"))

    def phases(self, work: Work) -> Sequence[str]:
        """Return the personal and the shared pass, without one that no entry would move in."""
        masks = work["mask"].values()
        personal = ("personal",) if any(bool(mask.any()) for mask in masks) else ()
        shared = () if all(bool(mask.all()) for mask in masks) else ("shared",)
        return (*personal, *shared)

    def step(self, setup: Setup, work: Work, batch: Batch, phase: str) -> Work:
        """Return the work after a step that moves only the entries of its phase."""
        mask = work["mask"]
        free = mask if phase == "personal" else {name: ~m for name, m in mask.items()}
        return train_step(setup, work, batch, phase, mask=free)

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return the trained model with both masks, and the shared values for the parent."""
        params, mask = work["params"], work["mask"]
        start = state.group("reference" if self.reference == "last-update" else "model")
        after = {
            name: grow(mask[name], (params[name] - start[name]).abs(), self.rate, self.limit)
            for name in params
        }
        groups: dict[str, Tensors] = {
            "model": params,
            "buffers": work["buffers"],
            "mask": mask,
            "next": after,
        }
        if self.reference == "last-update":
            groups["reference"] = params
        reply = Message(
            {
                "model": pack(params, mask),
                "buffers": {name: work["buffers"][name] for name in node.setup.shared_buffers},
                "promoted": {n: after[n] & ~mask[n] for n in after if after[n].ne(mask[n]).any()},
            },
            metrics=training_metrics(work),
        )
        return State(groups), reply

    def dispatch(
        self, node: Node, state: State, children: Iterable[Child]
    ) -> Iterator[tuple[str, Message]]:
        """Yield to each child the entries that it shared when it last trained."""
        model = state.group("model")
        for child in children:
            used = _mask(child.link.group("mask"), model)
            yield (
                child.path,
                Message({"model": pack(model, used), "buffers": state.group("buffers")}),
            )

    def remember(self, child: Child, reply: Message) -> State:
        """Return the child's masks: the one it trained with, and the one it trains with next."""
        used, promoted = child.link.group("next"), reply.group("promoted")
        after = {n: used[n] | mask if n in used else mask for n, mask in promoted.items()}
        return State({"mask": used, "next": {**used, **after}})

    def aggregate(self, node: Node, state: State, replies: Iterable[Reply]) -> State:
        """Return, entry by entry, the plain mean over the clients that share it.

        The mask is the one that each client trained with. An entry that nobody shares keeps its
        last value.
        """
        like = state.group("model")
        # -0.0 is what adds nothing to any number, 0.0 included.
        sums = {n: torch.full_like(t, -0.0, dtype=torch.float64) for n, t in like.items()}
        counts = {name: torch.zeros_like(t, dtype=torch.int64) for name, t in like.items()}
        buffers = WeightedMean()
        metrics: dict[str, tuple[float, float]] = {}
        for reply in replies:
            used = _mask(reply.link.group("next"), like)
            values = unpack(reply.message.group("model"), used, like)
            _check_promoted(reply.message, used)
            for name, mask in used.items():
                sums[name] += values[name]
                counts[name] += ~mask
            buffers.add(reply.message.require("buffers", node.setup.shared_buffers), 1)
            add_metrics(metrics, reply.message.metrics)
        model = {
            name: torch.where(counts[name] > 0, (sums[name] / counts[name]).to(t.dtype), t)
            for name, t in like.items()
        }
        held = buffers.result() if buffers.total else state.group("buffers")
        return State({"model": model, "buffers": held}, metrics=metrics)

    def reply(self, node: Node, state: State) -> Message:
        """Never called: the method is defined on flat federations, whose only parent is the root.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("FedSelect is defined on flat federations")

    def describe(self, setup: Setup, state: State) -> dict[str, tuple[float, float]]:
        """Return the personal share of each parameter, ``personal:NAME``, as (entries, of)."""
        masks = _mask(state.group("mask"), setup.task.params)
        return {f"personal:{n}": (float(m.sum()), float(m.numel())) for n, m in masks.items()}


def grow(mask: torch.Tensor, change: torch.Tensor, rate: float, limit: float) -> torch.Tensor:
    """Return a mask with more personal entries: exactly the quota, of those that changed most.

    The quota is ``min(round(rate * shared), floor(limit * n) - personal)``; rounding is half to
    even. Equal changes are promoted in the order of their position.

    Args:
        mask: bool tensor of any shape with n entries, True where an entry is personal.
        change: absolute change of each entry, of the mask's shape.
        rate: share of the shared entries to promote.
        limit: ceiling on the personal share.
    """
    numel, personal = mask.numel(), int(mask.sum())
    # A limit such as 0.29 of 100 entries means 29; binary floats put the product just below.
    ceiling = math.floor(limit * numel + 1e-9)
    quota = min(round(rate * (numel - personal)), ceiling - personal)
    if quota <= 0:
        return mask.clone()
    flat = mask.flatten()
    candidates = torch.where(flat, -1.0, change.flatten())
    cut = candidates.topk(quota, sorted=False).values.min()
    above = candidates > cut
    ties = candidates == cut
    first = ties & (ties.cumsum(0) <= quota - above.sum())
    return (flat | above | first).reshape(mask.shape)


def pack(values: Tensors, mask: Tensors) -> Tensors:
    """Return the shared entries of each tensor as a row; tensors without any are left out."""
    rows = {name: tensor[~mask[name]] for name, tensor in values.items()}
    return {name: row for name, row in rows.items() if len(row)}


def unpack(rows: Tensors, mask: Tensors, like: Tensors) -> Tensors:
    """Return dense tensors with the rows in their shared entries and zero in personal ones.

    Raises:
        MessageError: a row has another length or dtype than the mask and the model ask for, a
            row is missing, or one belongs to no tensor of the model.
    """
    if odd := sorted(rows.keys() - like.keys()):
        raise MessageError(f"group 'model' holds {odd[0]!r}, which the model does not have")
    dense = {}
    for name, template in like.items():
        shared = ~mask[name]
        count = int(shared.sum())
        row = rows.get(name, template.new_zeros(0))
        if row.dtype != template.dtype or row.shape != (count,):
            raise MessageError(
                f"model/{name} is {row.dtype} {tuple(row.shape)}, not {template.dtype} ({count},)"
            )
        dense[name] = torch.zeros_like(template)
        dense[name][shared] = row
    return dense


def _check_promoted(reply: Message, masks: Tensors) -> None:
    promoted = reply.group("promoted")
    if odd := sorted(promoted.keys() - masks.keys()):
        raise MessageError(f"group 'promoted' holds {odd[0]!r}, which the model does not have")
    reply.require("promoted", {name: masks[name] for name in promoted})


def _mask(masks: Tensors, like: Tensors) -> dict[str, torch.Tensor]:
    """Return the masks, or masks with nothing personal where there are none yet."""
    return {
        name: masks[name] if name in masks else torch.zeros(t.shape, dtype=torch.bool)
        for name, t in like.items()
    }
