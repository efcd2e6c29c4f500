"""What an audit's configuration may say."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hansa.audit.domains import DOMAINS
from hansa.audit.manipulate import Arm, all_arms
from hansa.audit.tamper import Operator
from hansa.errors import InputError

DEFENCES = (
    "none",
    "delimiting",
    "schema",
    "cross-field",
    "allow-list",
    "signature",
    "second-source",
    "history",
    "cited",
)
"""What an answer may be defended by; several are joined by ``+``."""
TargetKind = Literal[
    "reader", "endpoint", "transformers", "bundle", "trusting", "verifying", "constant"
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TargetOptions(_Section):
    """What is audited."""

    kind: TargetKind = "reader"
    """``reader``, the demonstration's; ``endpoint``, an OpenAI-compatible one; ``transformers`` or
    ``bundle``, a local folder; ``trusting``, ``verifying`` or ``constant``, for calibration."""
    url: str = ""
    """Of an endpoint, its base."""
    model: str = ""
    """Of an endpoint, the model's name there."""
    key_variable: str = ""
    """Of an endpoint, the environment variable that holds the key."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Of an endpoint, more headers."""
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of an endpoint."""
    parallel: int = Field(1, ge=1, le=64, strict=True)
    """Of an endpoint, requests at the same time."""
    timeout: float = Field(60.0, gt=0, allow_inf_nan=False)
    """Of an endpoint, seconds for one answer."""
    max_tokens: int = Field(64, ge=1, strict=True)
    """Tokens of an answer."""
    path: str = ""
    """Of a local model its folder; of a reader one that was saved, by default trained here."""
    template: str = "{question}\n{response}\n"
    """Of a bundle, how question and response become its prompt."""
    steps: int = Field(640, ge=1, strict=True)
    """Of a reader that is trained here, optimizer steps."""
    cases: int = Field(1500, ge=3, strict=True)
    """Of a reader that is trained here, made-up cases of a domain."""

    @model_validator(mode="after")
    def _is_whole(self) -> "TargetOptions":
        if self.kind == "endpoint" and not (self.url and self.model):
            raise ValueError("an endpoint with url and model")
        if self.kind in ("transformers", "bundle") and not self.path:
            raise ValueError(f"a {self.kind} target with path")
        return self


class GateOptions(_Section):
    """What continuous integration lets pass."""

    defence: str = ""
    """The application's own defence, one of ``defences``; by default the last of them."""
    operators: tuple[Operator, ...] = ("insertion", "substitution")
    """Arms whose adoption counts."""
    where: tuple[Literal["path", "provider"], ...] = ("path",)
    """Whose tampering counts."""


class ArmOptions(_Section):
    """One arm more than the usual ones."""

    operator: Operator
    action: Literal["value", "single", "unit", "stale"] = "value"
    strength: float = Field(0.25, ge=0, le=1)
    where: Literal["path", "provider"] = "path"

    @property
    def arm(self) -> Arm:
        """The arm."""
        return Arm(self.operator, self.action, self.strength, self.where)


class AuditOptions(_Section):
    """Everything that determines an audit."""

    name: str = Field("audit", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What its folder is called."""
    output: str = "runs"
    """The folder that its own is made in."""
    seed: int = Field(0, ge=0, lt=2**63, strict=True)
    """What false values are drawn from."""
    domains: tuple[str, ...] = Field(DOMAINS, min_length=1)
    """``weather``, ``encyclopedia``, ``news``, ``recorded:PATH``, ``made:DOMAIN?num=48&seed=0``."""
    cases: int = Field(0, ge=0, strict=True)
    """Cases of each domain; 0 for all."""
    strengths: tuple[float, ...] = (0.0, 0.5, 0.75, 1.0)
    """The dose of substitution beside the plausible one."""
    plausible: float = Field(0.25, ge=0, le=1)
    """The strength of all other arms."""
    arms: tuple[ArmOptions, ...] = ()
    """The arms, in the place of the usual ones."""
    defences: tuple[str, ...] = Field(DEFENCES, min_length=1)
    """What is tried; ``none`` is always."""
    least_clean: float = Field(0.95, ge=0, le=1)
    """Least share of clean cases that the target answers; below it the audit does not conclude."""
    target: TargetOptions = TargetOptions()
    gate: GateOptions = GateOptions()

    @field_validator("strengths")
    @classmethod
    def _are_strengths(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 <= each <= 1 for each in value):
            raise ValueError("numbers from 0 (plausible) to 1 (absurd)")
        return value

    @field_validator("defences")
    @classmethod
    def _are_defences(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            parts = name.split("+")
            if any(part not in DEFENCES for part in parts) or ("none" in parts and len(parts) > 1):
                raise ValueError(f"{', '.join(DEFENCES)}, or several joined by +")
        return tuple(dict.fromkeys(("none", *value)))

    @model_validator(mode="after")
    def _gate_is_there(self) -> "AuditOptions":
        if self.gated not in self.defences:
            allowed = f"one of defences ({', '.join(self.defences)})"
            raise InputError("gate.defence", repr(self.gated), allowed)
        return self

    @property
    def chosen(self) -> tuple[Arm, ...]:
        """The arms of the audit."""
        if self.arms:
            return tuple(dict.fromkeys(each.arm for each in self.arms))
        return tuple(all_arms(self.strengths, self.plausible))

    @property
    def gated(self) -> str:
        """The defence that the gate looks at."""
        return self.gate.defence or self.defences[-1]

    def as_dict(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return self.model_dump(mode="json")
