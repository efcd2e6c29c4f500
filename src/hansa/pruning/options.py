"""The pruning that a configuration asks for."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hansa.errors import options_told
from hansa.pruning.find import SCORERS
from hansa.pruning.scorer import Scorer
from hansa.pruning.select import Scope


class PruningOptions(BaseModel):
    """Which weights are trained at all: found before the first round, and kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["prospr", "snip", "force", "grasp", "synflow", "magnitude", "random"] = "prospr"
    """The scorer."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The scorer's own options, such as ``inner_steps``."""
    density: float = Field(gt=0, le=1)
    """Share of the prunable weights that is kept."""
    iterations: int = Field(1, ge=1, strict=True)
    """How often it is scored, on what the time before left."""
    scope: Scope = "global"
    """How the weights kept are dealt to layers: ``global``, ``layer``, ``balanced`` or ``erk``."""
    floor: float = Field(0.0, ge=0, le=1)
    """Least share of its weights that each layer keeps."""
    densities: dict[str, float] = Field(default_factory=dict)
    """Layer, or pattern with ``*`` -> a density of its own."""
    exclude: tuple[str, ...] = ()
    """Patterns of layers that stay dense and are not counted."""
    batch_size: int | None = Field(None, ge=1, strict=True)
    """Samples in a batch that is scored; that of the training where it is not set."""
    combine: Literal["scores", "gradients"] = "scores"
    """In a federation: the mean of the clients' own scores, or scores of their mean gradients."""

    @model_validator(mode="after")
    def _makes_a_scorer(self) -> "PruningOptions":
        try:
            _ = self.scorer
        except ValidationError as error:
            told = options_told(error, self.method, SCORERS[self.method])
            raise ValueError(told) from error
        return self

    @property
    def scorer(self) -> Scorer:
        """The scorer with its options."""
        return SCORERS[self.method].model_validate(self.options)
