"""Federated averaging, and the ground that other averaging methods stand on.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, Algorithm 1.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from hansa.federation.aggregation import add_metrics, check_weight, flattened, regrouped
from hansa.federation.message import Message, MessageError, State, Tensors
from hansa.federation.methods.base import Inner, Method, Work, begin_work, training_metrics
from hansa.federation.node import Child, Node, Reply, Setup

Groups = Mapping[str, Tensors]


class FedAvg(Method):
    """Average the clients' models; every client starts each round from the mean.

    On a deeper tree every inner node averages its children, weighted by what lies below them, so
    the root's mean is that of the flat federation.
    """

    name: ClassVar[str] = "fedavg"
    inner: ClassVar[Inner | None] = "beside"
    averages: ClassVar[bool] = True
    alone: ClassVar[str] = ""
    weighting: Literal["samples", "uniform"] = "samples"
    """A client's weight in the mean: its number of training samples, or one."""

    def own(self, setup: Setup) -> frozenset[str]:
        """Return the names of the parameters that stay at their client; none in FedAvg."""
        return frozenset()

    def shared(self, setup: Setup) -> Groups:
        """Return what travels, parameters and buffers, at its initial values."""
        own = self.own(setup)
        model = {name: p for name, p in setup.task.params.items() if name not in own}
        return {"model": model, "buffers": setup.shared_buffers}

    def start_root(self, node: Node) -> State:
        """Return the initial model, as far as it is shared, or all of it to train on."""
        task = node.setup.task
        if node.samples:
            return State({"model": task.params, "buffers": task.buffers})
        return State(self.shared(node.setup))

    def receive(self, node: Node, state: State, down: Message) -> State:
        """Return the whole model: the parent's part, completed by what stays here."""
        initial = {"model": node.setup.task.params, "buffers": node.setup.task.buffers}
        return State(
            {
                group: {**initial[group], **state.group(group), **down.require(group, like)}
                for group, like in self.shared(node.setup).items()
            }
        )

    def begin(self, node: Node, state: State) -> Work:
        """Return work that starts from the received model."""
        return begin_work(node.setup, state.group("model"), state.group("buffers"))

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return what stays at the client, and the trained shared part with its weight."""
        shared = self.shared(node.setup)
        trained = {"model": work["params"], "buffers": work["buffers"]}
        weight = node.samples if self.weighting == "samples" else 1
        reply = Message(_pick(trained, shared), {"weight": weight}, training_metrics(work))
        if self.scored != "trained":
            trained = {
                group: {name: t for name, t in tensors.items() if name not in shared[group]}
                for group, tensors in trained.items()
            }
        return State({group: tensors for group, tensors in trained.items() if tensors}), reply

    def settle(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return the trained model to dispatch, or what is the node's own with its share."""
        if self.inner_training() == "before":
            return State({"model": work["params"], "buffers": work["buffers"]}), Message()
        _, share = self.end(node, state, work)
        shared = self.shared(node.setup)
        trained = {"model": work["params"], "buffers": work["buffers"]}
        # What is shared stays as it was: children start where this node did, as one of them.
        groups = {
            group: {n: t if n in like else trained[group][n] for n, t in state.group(group).items()}
            for group, like in shared.items()
        }
        return replace(state, groups={**state.groups, **groups}), share

    def dispatch(
        self, node: Node, state: State, children: Iterable[Child]
    ) -> Iterator[tuple[str, Message]]:
        """Yield the same message to every child: the shared part of the model."""
        down = Message(_pick(state.groups, self.shared(node.setup)))
        return ((child.path, down) for child in children)

    def fits(self, node: Node, state: State, child: Child, reply: Message) -> None:
        """Refuse a reply without the whole shared part, or without a weight."""
        for group, like in self.shared(node.setup).items():
            reply.require(group, like)
        check_number(reply, "weight")

    def unchanged(self, node: Node, state: State) -> Groups:
        """Return the shared part of the model as the children were sent it."""
        return _pick(state.groups, self.shared(node.setup))

    def aggregate(self, node: Node, state: State, replies: Iterable[Reply]) -> State:
        """Return the mean of the replies, weighted or robust; the model as it was if none came."""
        shared = self.shared(node.setup)
        mean = node.setup.mean(flattened(self.unchanged(node, state)))
        weight = 0.0
        metrics: dict[str, tuple[float, float]] = {}
        for reply in replies:
            weight += reply.message.number("weight")
            held = {group: reply.message.require(group, like) for group, like in shared.items()}
            mean.add(flattened(held), reply.message.number("weight"))
            add_metrics(metrics, reply.message.metrics)
        if not weight:
            return State(state.groups, {"weight": 0})
        groups: Groups = regrouped(mean.result(), shared)
        if node.samples:  # what is personal stays with whoever trains it
            groups = {group: {**state.group(group), **mean} for group, mean in groups.items()}
        return State(groups, {"weight": weight}, metrics)

    def reply(self, node: Node, state: State) -> Message:
        """Return the mean, with the weight and the metrics of all that lies below."""
        groups = _pick(state.groups, self.shared(node.setup))
        return Message(groups, {"weight": state.number("weight")}, state.metrics)


def check_number(reply: Message, name: str) -> None:
    """Refuse a reply without a weight of some name that a mean can take.

    Raises:
        MessageError: there is none, or it is negative.
    """
    try:
        check_weight(reply.number(name))
    except MessageError:
        raise
    except ValueError as error:
        raise MessageError(f"{name} is {reply.number(name)}: {error}") from error


def _pick(groups: Groups, like: Groups) -> Groups:
    return {g: {name: groups[g][name] for name in names} for g, names in like.items() if names}
