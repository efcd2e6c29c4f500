"""The configuration of a safeguard and of its red team: validated, TOML in and out."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hansa.bundle import CARD, read_bundle
from hansa.config import explain, values_of
from hansa.errors import InputError
from hansa.safeguard.adversaries import Adversary
from hansa.safeguard.phases import TAR, AnyPhase
from hansa.safeguard.phases.random_mapping import RandomMapping
from hansa.safeguard.phases.refusal import Refusal
from hansa.safeguard.redteam_options import RedteamOptions
from hansa.safeguard.texts import TextsOptions
from hansa.safeguard.world import WorldOptions

PRESETS: dict[str, tuple[AnyPhase, ...]] = {
    "knowledge": (
        RandomMapping(steps=600, lr=1e-5, warm_up=100),
        TAR(),
    ),
    "refusal": (
        Refusal(steps=600, lr=1e-5, warm_up=100),
        TAR(
            steps=100,
            lr=6e-5,
            weight=0.1,
            loss="dpo",
            adversaries=(Adversary(lrs=(2e-6, 2e-5, 4e-5)),),
        ),
    ),
    "debug": (
        RandomMapping(steps=5, warm_up=1),
        TAR(steps=3, lr=5e-4, warm_up=1, inner_steps=4, every=2),
    ),
}
"""Phases by name. TAR's values are the released ones of the biology domain (``knowledge``) and
those reported for refusals; the first phases' are this project's."""


RESERVED = ("unprotected", "before", "safeguarded")
"""Models that every safeguard has: as it came, after all phases but the last, and after all."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSource(_Section):
    """Which model is safeguarded."""

    path: str | None = None
    """A bundle, a folder of ``transformers``, or a name on the hub. Without one a model is built,
    and a first phase ``pretrain`` teaches it the made-up world."""
    name: Literal["llama", "gpt2"] = "llama"
    """What is built."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its options, as for ``hansa train``."""


class Control(_Section):
    """Another way from the same start, for the red team to compare with."""

    after: int = Field(0, ge=0, strict=True)
    """How many of the safeguard's own phases come first."""
    phases: tuple[AnyPhase, ...] = ()
    """What follows them."""
    path: str | None = None
    """Another model in the place of both, as ``model.path`` names it: one that never saw what is
    restricted, as the control ``never``."""

    @model_validator(mode="after")
    def _is_one(self) -> "Control":
        if bool(self.phases) == (self.path is not None) or (self.path is not None and self.after):
            raise ValueError("phases, maybe after some of the safeguard's, or a path alone")
        return self


class SafeguardConfig(_Section):
    """Everything that determines a safeguard, and how it is attacked."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What the folder is called."""
    output: str = "runs"
    """Folder that it is made in."""
    seed: int = Field(0, ge=0, lt=2**63, strict=True)
    """Everything random is derived from it, the made-up world apart."""
    model: ModelSource = ModelSource()
    data: Annotated[WorldOptions | TextsOptions, Field(discriminator="kind")] = WorldOptions()
    precision: Literal["float32", "bfloat16"] = "float32"
    """What matrix products are computed in; weights are float32 in any case."""
    preset: Literal["knowledge", "refusal", "debug"] | None = None
    """Phases that follow those of ``phases``."""
    phases: tuple[AnyPhase, ...] = ()
    """What is done, one after another."""
    controls: dict[str, Control] = Field(default_factory=dict)
    """Models that are compared with, by the name that the scorecard calls them."""
    redteam: RedteamOptions = RedteamOptions()
    """How all of them are attacked."""

    @model_validator(mode="before")
    @classmethod
    def _with_kind(cls, values: Any) -> Any:
        """Take the made-up world where no kind of data is named."""
        if isinstance(values, Mapping) and isinstance(values.get("data"), Mapping):
            return {**values, "data": {"kind": "world", **values["data"]}}
        return values

    @model_validator(mode="after")
    def _fits(self) -> "SafeguardConfig":
        chain = self.chain
        if not any(not phase.is_pretraining for phase in chain):
            raise ValueError("phases or a preset must name a safeguard")
        for name, control in self.controls.items():
            if control.after > len(chain):
                raise ValueError(f"controls.{name}.after is more than the phases there are")
            if name in RESERVED or not name.isidentifier():
                raise ValueError(f"controls.{name} must be a word other than {RESERVED}")
        return self

    @property
    def chain(self) -> tuple[AnyPhase, ...]:
        """The safeguard's phases, those of the preset last."""
        return (*self.phases, *(PRESETS[self.preset] if self.preset else ()))

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return Path(self.output) / f"{self.name}-seed{self.seed}-safeguard"

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values, without what is not set."""
        return self.model_dump(mode="json", exclude_none=True)

    def as_toml(self) -> str:
        """Return the configuration as TOML that reads back equal."""
        return tomli_w.dumps(self.as_dict())


def load(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> SafeguardConfig:
    """Read and validate a configuration.

    Args:
        source: a TOML file, the values themselves, or the folder of a bundle that a safeguard has
            made, whose card has them.
        overrides: ``key=value`` with dotted keys.

    Raises:
        InputError: naming the first key that is wrong, what was found and what is allowed.
    """
    if not isinstance(source, Mapping) and (Path(source) / CARD).is_file():
        made = of_card(read_bundle(source).card)
        if "phases" not in made:
            raise InputError(str(source), "a bundle without a safeguard", "a safeguard's bundle")
        source = made
    values = values_of(source, overrides)
    try:
        return SafeguardConfig.model_validate(values)
    except ValidationError as error:
        raise _explained(error, values) from error


def of_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration in a bundle's card, without that of an audit since."""
    return {key: value for key, value in card["config"].items() if key != "audit"}


def _explained(error: ValidationError, values: Mapping[str, Any]) -> InputError:
    details = error.errors(include_url=False)[0]
    if details["type"] == "union_tag_not_found":
        key = ".".join(str(part) for part in details["loc"])
        return InputError(f"{key}.kind", "nothing", "what kind it is")
    return explain(error, SafeguardConfig, values)
