"""ZeroFL: sparse local training, and uploads that hold the largest entries only.

Qiu et al., "ZeroFL: Efficient On-Device Training for Federated Learning with Local Sparsity",
ICLR 2022 (arXiv 2208.02507), Algorithm 1 and section 5. A client starts at w_t, ends its local
work at w_E, and keeps of each sparse layer the share q = 1 - sparsity + mask_ratio:

======================  ================================================  =====================
uplink                  sent_k                                            w_{t+1}
======================  ================================================  =====================
``topk_weights``        w_E where abs(w_E) is among the largest q         sum_k n_k/n sent_k
``diff_topk_weights``   w_E - w_t where abs(w_E) is among the largest q   w_t + the same sum
``topk_diff``           w_E - w_t where its own size is among those       w_t + the same sum
======================  ================================================  =====================
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from hansa.errors import InputError
from hansa.federation.message import Message, State, Tensors
from hansa.federation.methods.base import Work
from hansa.federation.methods.fedavg import Groups
from hansa.federation.methods.swat import Swat, largest
from hansa.federation.node import Child, Node, Reply, Setup
from hansa.federation.tree import ROOT
from hansa.sparse.thresholds import keep, threshold


class ZeroFL(Swat):
    """SWAT whose clients send the largest entries of each sparse layer, and zeros.

    All other parameters and all buffers travel whole, as values with every uplink. A reply holds
    what it sends of sparse layers in the group ``sparse``.
    """

    name: ClassVar[str] = "zerofl"
    uplink: Literal["topk_weights", "diff_topk_weights", "topk_diff"] = "topk_weights"
    """Which entries are sent, and whether as weights or as what local training changed."""
    mask_ratio: float = Field(0.1, ge=0, lt=1, strict=True)
    """Share r_mask sent beyond the (1 - sparsity) that is used; at ``sparsity`` all is sent."""
    aggregation: Literal["mean", "counts"] = "mean"
    """``mean``: zeros count, as in the paper; ``counts``: each entry is divided by the weight of
    those who sent it (the masked average of FLASH, Babakniya et al., TMLR 2023)."""
    values: Literal["float32", "float16"] = "float32"
    """What sparse layers are sent as: their own type, or half the bytes."""

    @model_validator(mode="after")
    def _shares(self) -> "ZeroFL":
        if self.mask_ratio > self.sparsity:
            raise ValueError(f"mask_ratio must not exceed sparsity, {self.sparsity}")
        return self

    @property
    def sends_change(self) -> bool:
        """Whether differences to w_t are sent."""
        return self.uplink != "topk_weights"

    def check(self, setup: Setup, depth: int) -> None:
        """Refuse counts on a deeper tree, on which the root would not know them."""
        super().check(setup, depth)
        if self.aggregation == "counts" and depth > 1:
            found = f"'counts' on a tree of depth {depth}"
            raise InputError("method.aggregation", found, "mean, or a flat federation")

    def end(self, node: Node, state: State, work: Work) -> tuple[State, Message]:
        """Return what stays at the client, and the largest entries with their weight."""
        after, reply = super().end(node, state, work)
        start, ended = state.group("model"), work["params"]
        sent = {n: self._chosen(start[n], ended[n]) for n in self.weights(node.setup)}
        return after, self._packed(reply, sent)

    def _chosen(self, start: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
        sent = ended - start if self.sends_change else ended
        dropped = self.sparsity - self.mask_ratio
        if dropped <= 0:  # zeros among them as well
            return sent
        if self.uplink == "diff_topk_weights":
            return torch.where(keep(ended, threshold(ended, dropped)), sent, 0.0)
        return largest(sent, dropped)

    def fits(self, node: Node, state: State, child: Child, reply: Message) -> None:
        """Refuse a reply without the whole model, packed as it is sent, or without a weight."""
        super().fits(node, state, child, self._unpacked(node.setup, reply))

    def unchanged(self, node: Node, state: State) -> Groups:
        """Return the model as it was sent, and zeros where a reply holds changes."""
        groups = super().unchanged(node, state)
        if not self.sends_change:
            return groups
        model = groups["model"]
        zeros = {name: torch.zeros_like(model[name]) for name in self.weights(node.setup)}
        return {**groups, "model": {**model, **zeros}}

    def merge(self, node: Node, state: State, replies: Iterable[Reply]) -> State:
        """Return the state with the mean of the replies."""
        setup, model = node.setup, state.group("model")
        like = {name: model[name] for name in self.weights(setup)}
        zeros = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
        counted = None
        if self.aggregation == "counts":
            counted = setup.masked_mean(zeros if self.sends_change else like)

        def whole() -> Iterator[Reply]:
            for reply in replies:
                message = self._unpacked(setup, reply.message)
                if counted is not None:
                    sent = {name: message.group("model")[name] for name in like}
                    nothing = {name: tensor == 0 for name, tensor in sent.items()}
                    counted.add(sent, nothing, message.number("weight"))
                yield Reply(reply.path, reply.link, message)

        after = super().merge(node, state, whole())
        if not after.number("weight"):
            return after
        mean = {name: after.group("model")[name] for name in like}
        if counted is not None:
            mean = counted.result(zeros if self.sends_change else like)
        groups = dict(after.groups)
        if self.sends_change and node.path != ROOT:
            groups["change"] = mean  # for the reply
        if self.sends_change:
            # What nobody moved keeps its bits, the sign of a zero included.
            mean = {n: torch.where(d == 0, like[n], like[n] + d) for n, d in mean.items()}
        groups["model"] = {**after.group("model"), **mean}
        return State(groups, after.scalars, after.metrics)

    def reply(self, node: Node, state: State) -> Message:
        """Return the mean of what came, in the form in which it came."""
        whole = super().reply(node, state)
        model = whole.group("model")
        sent = {name: torch.zeros_like(model[name]) for name in self.weights(node.setup)}
        if whole.number("weight"):
            came = state.group("change") if self.sends_change else model
            sent = {name: came[name] for name in sent}
        return self._packed(whole, sent)

    def describe(self, setup: Setup, state: State) -> dict[str, tuple[float, float]]:
        """Return at the root ``nonzero``, what is not zero of the aggregated sparse layers."""
        return self.nonzero(setup, state)

    def _packed(self, reply: Message, sent: Tensors) -> Message:
        """Return a reply with something else for its sparse layers."""
        rest = {name: t for name, t in reply.group("model").items() if name not in sent}
        if self.values == "float16":
            sent = {name: _halved(name, tensor) for name, tensor in sent.items()}
        groups = {**reply.groups, "model": rest, "sparse": sent}
        kept = {group: tensors for group, tensors in groups.items() if tensors}
        return Message(kept, reply.scalars, reply.metrics)

    def _unpacked(self, setup: Setup, reply: Message) -> Message:
        """Return a reply whose sparse layers stand among the others, in their own type."""
        like, names = self.shared(setup)["model"], self.weights(setup)
        half = self.values == "float16"
        form = {name: like[name].half() if half else like[name] for name in names}
        rest = reply.require("model", {name: t for name, t in like.items() if name not in form})
        sent = reply.require("sparse", form)
        model = {n: sent[n].to(t.dtype) if n in form else rest[n] for n, t in like.items()}
        return Message({**reply.groups, "model": model}, reply.scalars, reply.metrics)


def _halved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in half precision.

    Raises:
        InputError: it lies beyond the range of that.
    """
    half = tensor.half()
    if not half.isfinite().all():
        most = float(tensor.abs().max())
        raise InputError("method.values", f"'float16' for {most:g} in {name}", "float32")
    return half
