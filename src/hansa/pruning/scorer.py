"""What all scorers share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from hansa.models.task import Tensors
from hansa.pruning.objective import Batch, Objective


class Scorer(BaseModel, ABC):
    """Gives every weight a number; those with the largest are kept.

    Attributes:
        name: what a configuration calls it.
        nested: whether what is pruned in one iteration stays pruned in the next.
        needs_data: whether it looks at more of a batch than the shape of its inputs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    nested: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True

    @property
    def num_batches(self) -> int:
        """Batches that one scoring takes; 0 for a scorer that sees no data."""
        return 0

    @abstractmethod
    def scores(self, objective: Objective, batches: Sequence[Batch], seed: int = 0) -> Tensors:
        """Return name -> scores of the shape of every prunable parameter.

        Args:
            objective: the model, masked by what earlier iterations kept.
            batches: ``num_batches`` of them.
            seed: of what is drawn.
        """


class GradientScorer(Scorer):
    """A scorer by |weight x derivative of some loss with respect to the weight|."""

    @abstractmethod
    def derivative(self, objective: Objective, batches: Sequence[Batch]) -> Tensors:
        """Return the derivative with respect to every trainable parameter."""

    def scores(self, objective: Objective, batches: Sequence[Batch], seed: int = 0) -> Tensors:
        """Return |weight x derivative|."""
        derivative = self.derivative(objective, batches)
        weights = objective.params if self.nested else objective.initial
        return {name: (weights[name] * derivative[name]).abs() for name in objective.names}
