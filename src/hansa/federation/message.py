"""What travels between nodes, and what a node keeps of itself: named groups of tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

Tensors = Mapping[str, torch.Tensor]
Scalar = bool | int | float | str


class MessageError(ValueError):
    """A message that is malformed, or that does not fit the model it was meant for."""


@dataclass(frozen=True)
class Message:
    """Named groups of tensors, a few scalars, and metrics as (sum, count).

    The one thing that nodes exchange. A message without any content is not sent and costs nothing.

    Attributes:
        groups: group name -> tensor name -> tensor, for example ``{"model": {"head.bias": ...}}``.
        scalars: small facts, for example the weight of this reply in the mean.
        metrics: metric name -> (sum, count), so that merging over nodes is addition.
    """

    groups: Mapping[str, Tensors] = field(default_factory=dict)
    scalars: Mapping[str, Scalar] = field(default_factory=dict)
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(self.groups.values()) or bool(self.scalars) or bool(self.metrics)

    def group(self, name: str) -> Tensors:
        """Return one group, empty when the message has none of that name."""
        return self.groups.get(name, {})

    def number(self, name: str) -> float:
        """Return one scalar as a number.

        Raises:
            MessageError: the scalar is absent or no number.
        """
        value = self.scalars.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MessageError(f"scalar {name!r} is {value!r}, not a number")
        return value

    def require(self, group: str, like: Tensors) -> Tensors:
        """Return one group after checking it, tensor by tensor, against a template.

        Raises:
            MessageError: names, shapes or dtypes differ from those of ``like``.
        """
        tensors = self.group(group)
        if tensors.keys() != like.keys():
            odd = sorted(tensors.keys() ^ like.keys())
            raise MessageError(f"group {group!r} differs from the model in {', '.join(odd[:3])}")
        for name, tensor in tensors.items():
            want = like[name]
            if tensor.shape != want.shape or tensor.dtype != want.dtype:
                raise MessageError(
                    f"{group}/{name} is {tensor.dtype} {tuple(tensor.shape)}, "
                    f"not {want.dtype} {tuple(want.shape)}"
                )
        return tensors


def check_finite(
    message: Message, metrics: Mapping[str, tuple[float, float]] | None = None
) -> None:
    """Refuse a message in which something is no number.

    Args:
        message: what was sent.
        metrics: more metrics that came with it.

    Raises:
        MessageError: a tensor, scalar or metric is infinite or NaN.
    """
    for group, tensors in message.groups.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise MessageError(f"{group}/{name} is not finite")
    for name, value in message.scalars.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise MessageError(f"{name} is {value}")
    for name, pair in {**message.metrics, **(metrics or {})}.items():
        if not all(math.isfinite(number) for number in pair):
            raise MessageError(f"the metric {name} is {pair[0]} over {pair[1]}")


State = Message
"""What a node keeps between rounds: a message to itself, saved and resumed by the same bytes."""
