"""FedSelect: each client finds the entries of the model that should be its own.

``cvpr``
    Tamirisa et al., "FedSelect: Personalized Federated Learning with Customized Selection of
    Parameters for Fine-Tuning", CVPR 2024 (arXiv 2404.02478). A mask grows from nothing: entries
    that move most in local training become personal and are never shared again.
``workshop``
    the earlier form, arXiv 2306.13264, Algorithms 1 and 2. Every round a client finds its mask
    anew by training, dropping the entries that moved least, and rewinding, over and over; what is
    left is personal.
``official``
    ``cvpr`` as the released code computes it; see ``official.py``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from hansa.errors import InputError
from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods.base import Work, begin_work, train_step
from hansa.federation.methods.masks import Masks, filled
from hansa.federation.methods.official import QUIRKS, misaligned
from hansa.federation.methods.selecting import Selecting
from hansa.federation.node import Node, Setup
from hansa.models.task import Batch

PRESETS: dict[str, dict[str, Any]] = {
    "cvpr": {},
    "workshop": {"rate": 0.5, "limit": 1.0},
    "official": {
        "rate": 0.25,
        "limit": 0.8,
        "period": 3,
        "reference": "last-update",
        "quirks": QUIRKS,
    },
}


class FedSelect(Selecting):
    """FedSelect in all its forms.

    A round at a client (``cvpr``): put the received values into the shared entries of the mask it
    last trained with; let the entries promoted then become personal (so they start from the
    common value); train each epoch in two passes, personal entries first, shared entries second;
    promote the share ``rate`` of the shared entries that changed most.
    """

    name: ClassVar[str] = "fedselect"
    mode: Literal["cvpr", "workshop", "official"] = "cvpr"
    """Which form; it sets the defaults of the other options."""
    period: int = Field(1, ge=1, strict=True)
    """Rounds between changes of a mask."""
    reference: Literal["round-start", "last-update"] = "round-start"
    """What an entry's change is measured from: its value at the start of the round, or the
    client's trained value when the mask was last updated (at first: the initial model)."""
    new_entry: Literal["global", "local"] = "global"
    """Where a newly personal entry starts: from the common value, or from the client's own."""
    newcomer: Literal["zero", "majority", "select"] = "zero"
    """The mask of a client that joins after the first round: nothing personal; what more than
    half of the others hold as their own; or what it finds itself before its first training."""
    select_epochs: int = Field(5, ge=1, strict=True)
    """Epochs of a selection: of each iteration in the workshop form, and of a newcomer's."""
    iterations: int = Field(5, ge=1, strict=True)
    """Iterations L of the workshop form; the personal share is rate ** L."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        mode = values.get("mode") if isinstance(values, Mapping) else None
        return {**PRESETS.get(mode, {}), **values} if isinstance(mode, str) else values

    @model_validator(mode="after")
    def _fits(self) -> "FedSelect":
        if self.mode != "official" and self.quirks:
            raise ValueError("quirks belong to mode 'official'")
        if self.mode != "cvpr" and self.newcomer != "zero":
            raise ValueError(f"in mode {self.mode!r} a newcomer's mask is 'zero'")
        if self.mode == "workshop" and self.reference != "round-start":
            raise ValueError("in mode 'workshop' change is measured from the start of the round")
        if "ties" in self.quirks and self.quota == "global":
            raise ValueError("quirk 'ties' goes with quota 'tensor'")
        return self

    def check(self, setup: Setup, depth: int) -> None:
        """Refuse what the released code cannot be compared on."""
        super().check(setup, depth)
        if self.mode == "official" and setup.task.buffers and setup.buffers != "local":
            raise InputError(
                "model.buffers", repr(setup.buffers), "local with method.mode = 'official'"
            )

    def first_mask(self, setup: Setup) -> Masks:
        """Return that everything is shared, but for what the released code never sends."""
        return filled(setup.task.params, self.unshared(setup.task.params))

    def newcomer_mask(self, node: Node, state: State) -> Masks:
        """Return nothing personal, or the majority's mask, under the limit."""
        first = self.first_mask(node.setup)
        if self.newcomer != "majority" or not state.scalars.get("known"):
            return first
        half = state.number("known") / 2
        votes = {name: count.double() for name, count in state.group("votes").items()}
        most = self.promote(first, votes, 1.0)
        return {n: first[n] | (most[n] & (votes[n] > half)) for n in first}

    def sent_mask(self, node: Node, state: State) -> Masks:
        """Return the mask before or after the last promotions, by where those entries start."""
        chosen = self.used if self.new_entry == "global" else self.next
        return chosen(node.setup, state)

    def receive(self, node: Node, state: State, down: Message) -> State:
        """Return the model for this round, and the mask it is trained with."""
        after = self.received(node, state, down)
        groups = dict(after.groups)
        if self.reference == "last-update":
            groups["reference"] = {**node.setup.task.params, **state.group("reference")}
        return State(groups, {"new": not state})

    def begin(self, node: Node, state: State) -> Work:
        """Return work that carries the mask, and the start where a selection rewinds to it."""
        groups: dict[str, Tensors] = {"mask": state.group("expected")}
        late = node.round > 1 and bool(state.scalars.get("new"))
        if self.mode == "workshop" or (late and self.newcomer == "select"):
            groups["start"] = state.group("model")
            groups["start_buffers"] = state.group("buffers")
        if self.mode == "workshop":
            # Every maskable entry is a candidate; `stages` narrows them down.
            groups["mask"] = self.maskable(node.setup)
        if "frozen-norms" in self.quirks and node.round > 1:
            groups["frozen"] = {}
        return begin_work(node.setup, state.group("model"), state.group("buffers"), **groups)

    def stages(self, node: Node, work: Work, epochs: int) -> Sequence[tuple[str, int]]:
        """Return the selection, where there is one, and the training."""
        if "start" not in work:
            return (("train", epochs),)
        times = self.iterations if self.mode == "workshop" else 1
        selections = [(f"select{k}", self.select_epochs) for k in range(times)]
        return (*selections, ("train", epochs))

    def phases(self, work: Work, stage: str) -> Sequence[str]:
        """Return the personal and the shared pass, without one that no entry would move in."""
        if stage != "train":
            return ("select",)
        masks = work["mask"].values()
        personal = "empty-pass" in self.quirks or any(bool(mask.any()) for mask in masks)
        shared = not all(bool(mask.all()) for mask in masks)
        return (("personal",) if personal else ()) + (("shared",) if shared else ())

    def step(self, setup: Setup, work: Work, batch: Batch, phase: str) -> Work:
        """Return the work after a step that moves only the entries of its phase."""
        mask = work["mask"]
        free: Tensors | None = mask
        if phase == "select" and self.mode != "workshop":
            free = None
        elif self.quirks and phase != "select":
            free = self._official_mask(setup, work, batch, phase)
        elif phase == "shared":
            free = {name: ~m for name, m in mask.items()}
        return train_step(setup, work, batch, phase, mask=free, training="frozen" not in work)

    def after(self, node: Node, work: Work, stage: str) -> Work:
        """After a selection: set the mask by what moved, and rewind (GradLTN)."""
        if stage == "train":
            return work
        start, mask = work["start"], work["mask"]
        moved = {name: (p - start[name]).abs() for name, p in work["params"].items()}
        ranking = self.rank(node, moved)
        if self.mode == "workshop":
            mask = self.keep_highest(mask, ranking)
        else:  # as large a share as clients have that were there from the first round on
            rate = 1 - (1 - self.rate) ** ((node.round - 1) // self.period)
            mask = self.promote(mask, ranking, rate)
        fresh = begin_work(node.setup, start, work["start_buffers"])
        kept = {key: group for key, group in work.items() if not key.startswith("memory.")}
        return {**kept, **fresh, "mask": dict(mask)}

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return the trained model with both masks, and the shared values for the parent."""
        params, mask = work["params"], work["mask"]
        following, due = mask, self._due(node.round) and self.mode != "workshop"
        start = state.group("reference" if self.reference == "last-update" else "model")
        if due:
            moved = {name: (params[name] - start[name]).abs() for name in params}
            following = self.promote(mask, self.rank(node, moved), self.rate)
        groups: dict[str, Tensors] = {
            "model": params,
            "buffers": work["buffers"],
            "mask": mask,
            "next": following,
        }
        if self.reference == "last-update":
            groups["reference"] = params if due else start
        return State(groups), self.report(node, state, work, mask, following)

    def rank(self, node: Node, moved: Tensors) -> Tensors:
        """Return the number by which entries become personal, highest first: how far they moved.

        Args:
            node: the client.
            moved: name -> absolute change of each entry.
        """
        return moved

    def passes(self, setup: Setup) -> int:
        """Return two passes per epoch, and the selection's."""
        times = self.iterations if self.mode == "workshop" else int(self.newcomer == "select")
        return 2 * setup.training.epochs + times * self.select_epochs

    def _due(self, number: int) -> bool:
        """Tell whether masks change at the end of a round, counted from 1."""
        if "late-masks" in self.quirks:
            return number > 1 and (number - 1) % self.period == 0
        return number % self.period == 0

    def _official_mask(self, setup: Setup, work: Work, batch: Batch, phase: str) -> Masks:
        """Return where entries may move, as the released code has it."""
        unshared = self.unshared(work["params"])
        mask: Masks = {n: m & (n not in unshared) for n, m in work["mask"].items()}
        if "misaligned-masks" in self.quirks:
            mask = misaligned(setup, work, batch, mask)
        return mask if phase == "personal" else {name: ~m for name, m in mask.items()}
