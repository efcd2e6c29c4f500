"""The curation that a configuration asks for: ``[curation]``."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hansa.curation.scores import SCORES
from hansa.curation.thresholds import ThresholdOptions


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Guard(_Section):
    """What a filter must not do unnoticed."""

    client: float = Field(0.1, ge=0, le=1)
    """Least share of its samples that a client keeps; none at all is always too little."""
    domain: float = Field(0.1, ge=0, le=1)
    """Least share of a domain's samples that is kept over all clients."""
    action: Literal["stop", "warn"] = "stop"
    """What follows where a floor is not reached."""


class WarmUp(_Section):
    """Training before the scores, on all data, whose checkpoints gradients are taken at."""

    rounds: int = Field(10, ge=1, strict=True)
    """Rounds of the run's own method."""
    keep: tuple[int, ...] = ()
    """Rounds after which the common model is a checkpoint; by default the last one."""

    @model_validator(mode="after")
    def _keeps_its_rounds(self) -> "WarmUp":
        if any(not 1 <= number <= self.rounds for number in self.keep):
            raise ValueError("rounds to keep from 1 to the last one")
        return self

    @property
    def kept(self) -> tuple[int, ...]:
        """The rounds that are checkpoints, in order."""
        return tuple(sorted(set(self.keep))) or (self.rounds,)


class CurationOptions(_Section):
    """Which training samples are used at all: scored by their holders, cut by one threshold."""

    scores: tuple[str, ...] = ("ifd",)
    """What samples are scored by."""
    by: tuple[str, ...] = ()
    """The scores that decide, combined by mean rank where they are several; by default the first
    of ``scores``."""
    anchors: str | None = None
    """Public examples that the threshold is set by, as ``nodes.NAME.text`` names examples."""
    validation: str | None = None
    """Public examples whose gradients others are compared with."""
    threshold: ThresholdOptions = ThresholdOptions()
    guard: Guard = Guard()
    warm_up: WarmUp | None = None
    """Nothing where it is not set; then gradients are taken where losses are."""
    sketch: int | None = Field(None, ge=1, strict=True)
    """Numbers that the gradient of a tensor is projected to; all of it where it is not set."""
    epsilon: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Differential privacy of the counts that a client tells, per curation; exact counts where it
    is not set."""
    soft: bool = False
    """Whether samples below the threshold count less in training, instead of not at all."""
    every: int = Field(0, ge=0, strict=True)
    """Rounds of training after which samples are scored anew by the model as it then is; 0: once,
    before the first round."""
    masks: str | None = None
    """Folder that ``hansa curate`` made, whose masks a training run takes."""

    @field_validator("scores", "by")
    @classmethod
    def _is_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in SCORES:
                raise ValueError(f"scores among {', '.join(SCORES)}")
        if len(set(names)) < len(names):
            raise ValueError("each score once")
        return names

    @model_validator(mode="after")
    def _goes_together(self) -> "CurationOptions":
        if not self.scores:
            raise ValueError("at least one of scores")
        if odd := [name for name in self.by if name not in self.scores]:
            raise ValueError(f"by among scores, and so {odd[0]!r} in both")
        if self.masks is not None:  # they were made by then
            if self.every:
                raise ValueError("masks or every, not both")
            return self
        if self.anchors is None and (self.threshold.kind != "share" or len(self.deciding) > 1):
            raise ValueError("anchors, by which the threshold is set")
        if self.validation is None and any(SCORES[name].gradients for name in self.scores):
            raise ValueError("validation, which scores of gradients need")
        if self.soft and self.threshold.kind != "anchor_quantile":
            raise ValueError("soft with the threshold anchor_quantile alone")
        if self.epsilon is not None:
            self._check_private()
        return self

    def _check_private(self) -> None:
        # Else one sample more could change what becomes of many others.
        if self.threshold.kind == "share" or "duplicates" in self.deciding:
            raise ValueError("epsilon where each sample is judged by itself")

    @property
    def deciding(self) -> tuple[str, ...]:
        """The scores that decide."""
        return self.by or self.scores[:1]
