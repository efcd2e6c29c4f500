"""Local-only training: no client hears of another. The baseline in every table."""

from typing import ClassVar

from hansa.federation.message import Message, State
from hansa.federation.methods.base import Scored, Work
from hansa.federation.methods.fedavg import FedAvg, Groups
from hansa.federation.node import Child, Node, Setup


class LocalOnly(FedAvg):
    """Every client trains a model of its own from the common initial values; nothing travels."""

    name: ClassVar[str] = "local"
    alone: ClassVar[str] = "nothing is sent"
    scored: ClassVar[Scored] = "trained"
    common: ClassVar[bool] = False
    averages: ClassVar[bool] = False

    def shared(self, setup: Setup) -> Groups:
        """Return that nothing is shared."""
        return {"model": {}, "buffers": {}}

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return the trained model as the client's own, and an empty reply, which is not sent."""
        return super().end(node, state, work)[0], Message()

    def fits(self, node: Node, state: State, child: Child, reply: Message) -> None:
        """Take any reply: there is none."""

    def reply(self, node: Node, state: State) -> Message:
        """Return an empty reply, which is not sent."""
        return Message()
