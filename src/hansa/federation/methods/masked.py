"""The ground that methods with masks stand on: every client shares its own part of the model.

What crosses the network are values of shared entries, packed in a row. Positions travel only when
a mask changes: ``changed`` is how the mask that a client trained with differs from the one its
parent expected, ``promoted`` how its next mask differs from that. A client keeps its masks in its
state, the parent keeps both in its link to the client.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

import torch

from hansa.errors import InputError
from hansa.federation.aggregation import add_metrics, flattened, regrouped
from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods.base import Method, Scored, Work, training_metrics
from hansa.federation.methods.fedavg import check_number
from hansa.federation.methods.masks import (
    Masks,
    check_rows,
    filled,
    flipped,
    flips,
    pack,
    unpack,
)
from hansa.federation.node import Child, Node, Reply, Setup


class MaskedSharing(Method):
    """Average each entry over the clients that share it, under the masks they trained with."""

    weighting: Literal["samples", "uniform"] = "uniform"
    """A client's weight in the mean of an entry: its number of training samples, or one."""
    scored: ClassVar[Scored] = "trained"
    max_depth: ClassVar[int | None] = 1
    masked: ClassVar[bool] = True
    averages: ClassVar[bool] = True
    alone: ClassVar[str] = (
        "each reply counts where its client's mask says, and the mask is part of it"
    )
    mask_is: ClassVar[str] = "personal"
    """What a masked entry is called in figures."""

    def check(self, setup: Setup, depth: int) -> None:
        """Refuse attackers that would have to compare replies of unlike shape."""
        super().check(setup, depth)
        if setup.attack is not None and setup.attack.colludes:
            found = f"{setup.attack.kind!r} with method {self.name!r}, whose replies differ in form"
            raise InputError("attackers.kind", found, "sign_flip, noise or label_flip")

    def first_mask(self, setup: Setup) -> Masks:
        """Return the mask that a client begins with: everything is shared."""
        return filled(setup.task.params)

    def newcomer_mask(self, node: Node, state: State) -> Masks:
        """Return the mask that the parent gives to a client it has not heard of before."""
        return self.first_mask(node.setup)

    def vacant(self, last: torch.Tensor) -> torch.Tensor:
        """Return the common values of entries that nobody shares: the last ones."""
        return last

    @abstractmethod
    def sent_mask(self, node: Node, state: State) -> Masks:
        """Return the mask under which a client is sent values, from its state or its link."""

    def used(self, setup: Setup, state: State) -> Masks:
        """Return the mask that a client last trained with, from its state or its link."""
        return {**self.first_mask(setup), **state.group("mask")}

    def next(self, setup: Setup, state: State) -> Masks:
        """Return the mask that a client is expected to train with next."""
        return {**self.first_mask(setup), **state.group("next")}

    def start_root(self, node: Node) -> State:
        """Return the initial model; every entry is of age zero."""
        params = node.setup.task.params
        age = {name: torch.zeros(t.shape, dtype=torch.int32) for name, t in params.items()}
        return State({"model": params, "buffers": node.setup.shared_buffers, "age": age})

    def dispatch(
        self, node: Node, state: State, children: Iterable[Child]
    ) -> Iterator[tuple[str, Message]]:
        """Yield to each child the entries that it shares; to a newcomer everything, and a mask."""
        setup = node.setup
        model = state.require("model", setup.task.params)
        buffers = state.require("buffers", setup.shared_buffers)
        nothing = filled(setup.task.params)
        for child in children:
            mask, groups = nothing, {}
            if child.link:
                mask = self.sent_mask(node, child.link)
            else:
                given = self.newcomer_mask(node, state)
                groups["mask"] = flips(self.first_mask(setup), given)
            groups["model"] = pack(model, mask)
            groups["buffers"] = pack(buffers, buffer_masks(setup, mask))
            yield child.path, Message(groups)

    def received(self, node: Node, state: State, down: Message) -> State:
        """Return a leaf's model after the parent's message, and both its masks."""
        setup, groups = node.setup, {}
        params, shared = setup.task.params, setup.shared_buffers
        if state:
            mask, following = self.sent_mask(node, state), self.next(setup, state)
        else:
            mask = filled(params)
            following = flipped(self.first_mask(setup), down, "mask")
        over = buffer_masks(setup, mask)
        common = unpack(down.group("model"), mask, params)
        statistics = unpack(down.group("buffers"), over, shared, "buffers")
        own = {**params, **state.group("model")}
        kept = {**setup.task.buffers, **state.group("buffers")}
        groups["model"] = {n: torch.where(mask[n], own[n], common[n]) for n in params}
        groups["buffers"] = kept | {n: torch.where(over[n], kept[n], statistics[n]) for n in shared}
        groups["expected"] = following
        return State(groups)

    def report(
        self, node: Node, state: State, work: Work, used: Tensors, following: Tensors
    ) -> Message:
        """Return a leaf's reply: shared values, and how its masks differ from what was expected."""
        setup = node.setup
        statistics = {name: work["buffers"][name] for name in setup.shared_buffers}
        return Message(
            {
                "model": pack(work["params"], used),
                "buffers": pack(statistics, buffer_masks(setup, used)),
                "changed": flips(state.group("expected"), used),
                "promoted": flips(used, following),
            },
            {"weight": node.samples} if self.weighting == "samples" else {},
            training_metrics(work),
        )

    def remember(self, node: Node, state: State, child: Child, reply: Message) -> State:
        """Return the child's masks: the one it trained with, and the one it trains with next."""
        used = self._heard(node, state, child.link, reply)
        return State({"mask": used, "next": flipped(used, reply, "promoted")})

    def _heard(self, node: Node, state: State, link: State, reply: Message) -> Masks:
        """Return the mask that a child trained with, as its reply tells."""
        given = self.next(node.setup, link) if link else self.newcomer_mask(node, state)
        return flipped(given, reply, "changed")

    def fits(self, node: Node, state: State, child: Child, reply: Message) -> None:
        """Refuse a reply whose rows are not as long as its masks ask for, or without a weight."""
        setup = node.setup
        used = self._heard(node, state, child.link, reply)
        flipped(used, reply, "promoted")
        check_rows(reply.group("model"), used, setup.task.params)
        over = buffer_masks(setup, used)
        check_rows(reply.group("buffers"), over, setup.shared_buffers, "buffers")
        if self.weighting == "samples":
            check_number(reply, "weight")

    def aggregate(self, node: Node, state: State, replies: Iterable[Reply]) -> State:
        """Return, entry by entry, the mean over the clients that share it.

        ``age`` counts the rounds since an entry was last sent by anyone; ``votes`` counts the
        clients that hold it as their own, of ``known`` that ever replied.
        """
        setup = node.setup
        like = state.require("model", setup.task.params)
        last = state.require("buffers", setup.shared_buffers)
        common = {"model": like, "buffers": last}
        mean = setup.masked_mean(flattened(common))
        votes = {n: torch.zeros(t.shape, dtype=torch.int32) for n, t in like.items()}
        votes |= {name: count.clone() for name, count in state.group("votes").items()}
        known = int(state.scalars.get("known", 0))
        metrics: dict[str, tuple[float, float]] = {}
        heard = 0
        for reply in replies:
            heard += 1
            message = reply.message
            weight = message.number("weight") if self.weighting == "samples" else 1
            used = self._heard(node, state, reply.link, message)
            following = flipped(used, message, "promoted")
            over = buffer_masks(setup, used)
            dense = {
                "model": unpack(message.group("model"), used, like),
                "buffers": unpack(message.group("buffers"), over, last, "buffers"),
            }
            masks = {"model": used, "buffers": over}
            mean.add(flattened(dense), flattened(masks), weight)
            before = self.next(setup, reply.link) if reply.link else filled(like)
            known += not reply.link
            for name, count in votes.items():
                count += following[name].int() - before[name].int()
            add_metrics(metrics, message.metrics)
        sent = regrouped(mean.sent(), common)["model"]
        age = {n: torch.where(sent[n], 0, count + 1) for n, count in state.group("age").items()}
        vacant = {name: self.vacant(tensor) for name, tensor in like.items()}
        made = regrouped(mean.result(flattened({"model": vacant, "buffers": last})), common)
        groups = {
            "model": made["model"] if heard else like,
            "buffers": made["buffers"],
            "age": age,
            "votes": votes,
        }
        return State(groups, {"known": known}, metrics)

    def reply(self, node: Node, state: State) -> Message:
        """Never called: the method is defined on flat federations, whose only parent is the root.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"{self.name} is defined on flat federations")

    def describe(self, setup: Setup, state: State) -> dict[str, tuple[float, float]]:
        """Return the masked share of each parameter of a leaf, such as ``personal:NAME``.

        At the root: ``unshared``, the entries that nobody sent in the round, and ``age``, the
        rounds since they were last sent, both over all entries.
        """
        age = state.group("age")
        if not age:
            return {
                f"{self.mask_is}:{name}": (float(mask.sum()), float(mask.numel()))
                for name, mask in self.masks(setup, state).items()
            }
        row = torch.cat([count.flatten() for count in age.values()])
        count = float(len(row))
        return {"unshared": (float((row > 0).sum()), count), "age": (float(row.sum()), count)}

    def masks(self, setup: Setup, state: State) -> Tensors:
        """Return the mask that a client last trained with, or is about to train with first."""
        return self.used(
            setup, state if state.group("mask") else State({"mask": state.group("expected")})
        )


def buffer_masks(setup: Setup, masks: Tensors) -> Masks:
    """Return masks over the buffers that travel.

    With ``buffers = "personal"`` a buffer follows the ``weight`` of its layer where that has its
    shape (the running statistics of a norm layer); any other is shared whole.
    """
    made = filled(setup.shared_buffers)
    if setup.buffers == "personal":
        for name, mask in made.items():
            weight = masks.get(f"{name.rpartition('.')[0]}.weight".lstrip("."))
            if weight is not None and weight.shape == mask.shape:
                made[name] = weight
    return made
