"""SCAFFOLD: control variates that take the drift of skewed clients out of their steps.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020
(arXiv 1910.06378), Algorithm 1 with option II for the control variates.
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field

from hansa.errors import InputError
from hansa.federation.message import Message, State
from hansa.federation.methods.base import Inner, Work, train_step
from hansa.federation.methods.fedavg import FedAvg
from hansa.federation.node import Child, Node, Reply, Setup
from hansa.models.task import Batch


class Scaffold(FedAvg):
    """FedAvg whose local steps follow gradient - c_k + c, at twice the bytes."""

    name: ClassVar[str] = "scaffold"
    alone: ClassVar[str] = "a reply holds a control variate beside the model"
    inner: ClassVar[Inner | None] = None
    server_lr: float = Field(1.0, gt=0, allow_inf_nan=False, strict=True)
    """Step eta_g of the common model along the mean of the clients' changes."""
    weighting: Literal["samples", "uniform"] = "uniform"
    max_depth: ClassVar[int | None] = 1

    def check(self, setup: Setup, depth: int) -> None:
        """Refuse optimizers whose steps are not learning rate times gradient."""
        super().check(setup, depth)
        training = setup.training
        if training.optimizer != "sgd" or training.momentum or training.clip_norm:
            raise InputError(
                "training.optimizer",
                "momentum, clipping or Adam, with which a control variate is no mean gradient",
                "plain sgd with method 'scaffold'",
            )

    def start_root(self, node: Node) -> State:
        """Return the initial model, and a common control variate of zero."""
        zeros = {name: torch.zeros_like(p) for name, p in node.setup.task.params.items()}
        return State({**super().start_root(node).groups, "control": zeros})

    def receive(self, node: Node, state: State, down: Message) -> State:
        """Return the model, the common control variate, and the client's own."""
        params = node.setup.task.params
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        controls = {
            "common": down.require("control", params),
            "control": {**zeros, **state.group("control")},
        }
        return State({**super().receive(node, state, down).groups, **controls})

    def begin(self, node: Node, state: State) -> Work:
        """Return work that carries c - c_k."""
        common, own = state.group("common"), state.group("control")
        pull = {name: common[name] - own[name] for name in own}
        return super().begin(node, state) | {"pull": pull}

    def step(self, setup: Setup, work: Work, batch: Batch, phase: str) -> Work:
        """Return the work after a step along the corrected gradient."""
        return train_step(setup, work, batch, phase, pull=work["pull"])

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return the client's new control variate, and the model with the variate's change."""
        training = node.setup.training
        steps = training.batches(node.samples) * training.epochs
        after, reply = super().end(node, state, work)
        start, common = state.group("model"), state.group("common")
        # c_k+ = c_k - c + (x - y_k) / (K * lr): the mean gradient over the K steps.
        change = {
            name: (start[name] - p) / (steps * training.rate(node.round)) - common[name]
            for name, p in work["params"].items()
        }
        own = {name: c + change[name] for name, c in state.group("control").items()}
        message = Message({**reply.groups, "control": change}, reply.scalars, reply.metrics)
        return State({**after.groups, "control": own}), message

    def dispatch(
        self, node: Node, state: State, children: Iterable[Child]
    ) -> Iterator[tuple[str, Message]]:
        """Yield the model and the common control variate to every child."""
        for path, down in super().dispatch(node, state, children):
            yield path, Message({**down.groups, "control": state.group("control")})

    def fits(self, node: Node, state: State, child: Child, reply: Message) -> None:
        """Refuse a reply without a whole model, a weight and the variate's change."""
        super().fits(node, state, child, reply)
        reply.require("control", state.group("control"))

    def aggregate(self, node: Node, state: State, replies: Iterable[Reply]) -> State:
        """Return model and control variate after their steps; the latter over all children."""
        changes = node.setup.mean(
            {n: torch.zeros_like(c) for n, c in state.group("control").items()}
        )
        num = 0

        def watched() -> Iterator[Reply]:
            nonlocal num
            for num, reply in enumerate(replies, 1):  # noqa: B007
                changes.add(reply.message.require("control", state.group("control")), 1)
                yield reply

        after = super().aggregate(node, state, watched())
        control = dict(state.group("control"))
        share = num / node.num_children
        for name, change in changes.result().items():
            control[name] = control[name] + share * change
        before = state.group("model")
        model = {
            name: torch.lerp(before[name], p, self.server_lr)
            for name, p in after.group("model").items()
        }
        groups = {**after.groups, "model": model, "control": control}
        return State(groups, after.scalars, after.metrics)
