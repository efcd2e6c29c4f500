"""What a red team tries on a safeguard: ``[redteam]``."""

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hansa.safeguard.adversaries import Schedule

Optimizer = Literal["adamw", "adam", "sgd", "adagrad", "adadelta", "adafactor"]
Grid = Literal["small", "large", "language"]
UNTOUCHED = "untouched"
"""What the scores of a model that nobody has attacked go by."""
_NAME = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=60)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Named(_Section):
    name: str = _NAME
    """What cells and tables call it, different from all others."""
    roles: tuple[str, ...] = ()
    """The models that it is tried on: ``unprotected``, ``before``, ``safeguarded``, ``never`` or
    the name of another control; by default all but the unprotected one, which has nothing to
    recover."""

    def is_for(self, role: str) -> bool:
        """Tell whether it is tried on the model of a role."""
        return role in self.roles if self.roles else role != "unprotected"


class Attack(_Named):
    """A way to fine-tune a model, tried at several learning rates."""

    data: Literal["restricted", "benign", "switch", "mixed", "fresh"] = "restricted"
    """What it trains on: the attacker's restricted text; retained text; first retained, then
    restricted text; both in every batch; or a harmless task that the model has never seen."""
    benign: float = Field(0.5, gt=0, lt=1)
    """Share of retained text: of the steps of ``switch``, of each batch of ``mixed``."""
    rank: int | None = Field(None, ge=1, strict=True)
    """Rank of LoRA adapters in all linear layers; by default every weight is trained."""
    optimizer: Optimizer = "adamw"
    """Which optimizer; ``sgd`` has Nesterov's momentum of 0.9."""
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False)
    """Of ``adamw`` alone."""
    lrs: tuple[float, ...] = Field((1e-4, 3e-4, 1e-3, 3e-3), min_length=1)
    """Learning rates, of which the worst for the safeguard counts."""
    schedule: Schedule = "constant"
    """A warm-up takes the first tenth of the steps; a cosine falls to nothing after it."""
    steps: int = Field(400, ge=1, strict=True)
    """Optimizer steps."""
    batch: int = Field(16, ge=1, strict=True)
    """Rows of a batch."""

    @field_validator("lrs")
    @classmethod
    def _are_rates(cls, lrs: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < lr < float("inf") for lr in lrs) or len(set(lrs)) < len(lrs):
            raise ValueError("different rates above 0")
        return lrs

    @model_validator(mode="after")
    def _has_both(self) -> "Attack":
        if self.data == "mixed" and not 0 < round(self.benign * self.batch) < self.batch:
            raise ValueError("a share benign that leaves a row of either text in a batch")
        if self.data == "switch" and not 0 < int(self.benign * self.steps) < self.steps:
            raise ValueError("a share benign that leaves a step for either text")
        return self

    @property
    def is_benign(self) -> bool:
        """Whether it sees no restricted text."""
        return self.data in ("benign", "fresh")


class Edit(_Named):
    """A change of the weights without any training."""

    kind: Literal["quantise", "prune", "noise", "merge"]
    """Round to few bits; set the smallest to zero; add noise; or mix with the unprotected model,
    which says what is left of the safeguard on the way to a model that has none."""
    amount: float = Field(gt=0, allow_inf_nan=False)
    """Bits; share of the weights; standard deviation of the noise in those of each tensor; share
    of the unprotected model."""

    @model_validator(mode="after")
    def _fits(self) -> "Edit":
        if self.kind == "quantise" and self.amount not in range(2, 17):
            raise ValueError("2 to 16 whole bits as amount of quantise")
        if self.kind in ("prune", "merge") and not self.amount < 1:
            raise ValueError(f"an amount of {self.kind} below 1")
        return self


class Harness(_Section):
    """Benchmarks of the library lm-evaluation-harness, for models of real text."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Its names for them, such as ``mmlu`` or ``wmdp_bio``."""
    shots: int = Field(0, ge=0, strict=True)
    """Examples in the prompt."""
    limit: int | None = Field(None, ge=1, strict=True)
    """Questions of each task; by default all."""
    batch: int = Field(8, ge=1, strict=True)
    """Questions at once."""
    template: bool = False
    """Whether prompts stand in the tokenizer's chat template."""


class RedteamOptions(_Section):
    """Attacks on a safeguard, their seeds, and what counts as recovered."""

    grid: Grid = "small"
    """Which attacks and edits, where they are not named: a few for the made-up world, many for
    it, or many at rates for language models (docs/redteam.md)."""
    attacks: tuple[Attack, ...] | None = None
    """Attacks that train, instead of the grid's."""
    edits: tuple[Edit, ...] | None = None
    """Attacks that do not, instead of the grid's."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Seeds of each attack: order of the data, first values of adapters, noise."""
    probes: tuple[int, ...] = (10, 25, 50, 100, 200, 400)
    """Steps after which a model under attack is asked; the last step of an attack is one, too."""
    templates: tuple[str, ...] = ()
    """Prompts that restricted questions are asked in, of which the one that recovers most counts;
    by default all that the data have."""
    floor: float = Field(0.9, ge=0, le=1)
    """Share of its retained score that an attacked model keeps where it still is of use."""
    processes: int = Field(1, ge=1, strict=True)
    """Attacks at the same time."""
    device: str = "cpu"
    """Where models are attacked, as PyTorch calls it."""
    harness: Harness | None = None
    """Benchmarks of each model before it is attacked, where there are tasks for it."""

    @field_validator("seeds")
    @classmethod
    def _are_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise ValueError("different seeds, 0 or more")
        return seeds

    @field_validator("probes")
    @classmethod
    def _are_steps(cls, probes: tuple[int, ...]) -> tuple[int, ...]:
        if any(step < 1 for step in probes):
            raise ValueError("steps, 1 or more")
        return tuple(sorted(set(probes)))

    @model_validator(mode="after")
    def _are_named_apart(self) -> "RedteamOptions":
        given = [*(self.attacks or ()), *(self.edits or ())]
        if same := repeated(each.name for each in given):
            raise ValueError(f"a name of its own for each attack and edit, not {same!r} twice")
        if any(each.name == UNTOUCHED for each in given):
            raise ValueError(f"other names than {UNTOUCHED!r}, which is taken")
        return self


def repeated(names: Iterable[str]) -> str | None:
    """Return a name that stands there twice, None where all are different."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
