"""The configuration of a pipeline: a list of stages, each with that of its own command."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hansa.config import explain, override, read
from hansa.errors import InputError
from hansa.pipeline.kinds import KINDS

SHIPPED = {path.stem: path for path in sorted((Path(__file__).parent / "shipped").glob("*.toml"))}
"""The pipelines that come with Hansa, by name: small enough for a laptop, on real input."""

_OWN = ("name", "output", "seed")
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StageOptions(_Section):
    """One stage."""

    kind: str
    """What is done: one of ``KINDS``."""
    name: str = Field("", pattern=rf"{_NAME}|^$")
    """What it is called; by default its kind."""
    start: str | None = None
    """The earlier stage whose bundle it starts from; by default the last that writes one."""
    file: str | None = None
    """A configuration in TOML, beside the pipeline's own, that ``config`` is put over."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The configuration of the stage's own command, without what the stages before it say."""

    @property
    def called(self) -> str:
        """The stage's name."""
        return self.name or self.kind


class PipelineOptions(_Section):
    """Everything that determines what a pipeline makes."""

    name: str = Field("pipeline", pattern=_NAME)
    """What the folder is called."""
    output: str = "runs"
    """Folder that it is made in."""
    seed: int = Field(0, ge=0, lt=2**63, strict=True)
    """Of all stages."""
    common: dict[str, Any] = Field(default_factory=dict)
    """What all stages with a configuration of ``hansa train`` have, unless they say otherwise."""
    stages: tuple[StageOptions, ...] = Field(min_length=1)
    """What is done, in order."""

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return Path(self.output) / f"{self.name}-seed{self.seed}"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        earlier: dict[str, StageOptions] = {}
        for stage in self.stages:
            _check_kind(stage, earlier)
            if stage.called in earlier:
                raise InputError(f"stages.{stage.called}", "a name twice", "names of their own")
            if stage.start is not None and stage.start not in earlier:
                allowed = ", ".join(earlier) or "nothing: it is the first"
                raise InputError(f"stages.{stage.called}.start", repr(stage.start), allowed)
            self.start_of(stage.called)
            earlier[stage.called] = stage
        return self

    def start_of(self, name: str) -> StageOptions | None:
        """Return the stage whose bundle a stage starts from, None where it starts from none.

        Raises:
            InputError: it needs a bundle, and no stage before it, or not the one named, makes one.
        """
        stage, *before = reversed(self.stages[: self.position(name) + 1])
        if not KINDS[stage.kind].starts:
            if stage.start is not None:
                found = f"{stage.start!r} for a stage of kind {stage.kind!r}"
                raise InputError(f"stages.{name}.start", found, "nothing: it reads no bundle")
            return None
        makers = [each for each in before if KINDS[each.kind].makes]
        if stage.start is not None:
            makers = [each for each in makers if each.called == stage.start]
        if not makers and (KINDS[stage.kind].needs or stage.start is not None):
            found = (
                "no bundle before it" if stage.start is None else f"{stage.start!r}, without one"
            )
            raise InputError(f"stages.{name}.start", found, "a stage that writes a bundle")
        return makers[0] if makers else None

    def position(self, name: str) -> int:
        """Return where a stage stands in the list.

        Raises:
            InputError: no stage has that name.
        """
        names = [stage.called for stage in self.stages]
        if name not in names:
            raise InputError("stage", repr(name), ", ".join(names))
        return names.index(name)

    def as_toml(self) -> str:
        """Return the configuration as TOML that reads back equal."""
        values = self.model_dump(mode="json", exclude_none=True)
        values["stages"] = [{k: v for k, v in stage.items() if v} for stage in values["stages"]]
        return tomli_w.dumps(values)


def _check_kind(stage: StageOptions, earlier: Mapping[str, StageOptions]) -> None:
    if stage.kind not in KINDS:
        close = difflib.get_close_matches(stage.kind, KINDS, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise InputError("stages.kind", repr(stage.kind), f"{', '.join(KINDS)}{hint}")
    reads = KINDS[stage.kind].reads(stage.config)
    missing = [kind for kind in reads if not any(s.kind == kind for s in earlier.values())]
    if missing and KINDS[stage.kind].needs_read:
        raise InputError(f"stages.{stage.called}", f"no {missing[0]} before it", "that stage first")
    makers = [name for name, each in earlier.items() if KINDS[each.kind].makes]
    if odd := [name for name in KINDS[stage.kind].names(stage.config) if name not in makers]:
        allowed = ", ".join(makers) or "a stage before it that writes a bundle"
        raise InputError(f"stages.{stage.called}", f"the bundle of {odd[0]!r}", allowed)


def load(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> PipelineOptions:
    """Read and validate a pipeline; the files that stages name are read into it.

    Args:
        source: a TOML file, one of ``SHIPPED``, or the values themselves.
        overrides: ``key=value``, of the pipeline (``seed=1``) or with the name of a stage before
            it (``train.rounds=3``).

    Raises:
        InputError: naming the first key that is wrong, what was found and what is allowed.
    """
    if not isinstance(source, Mapping):
        source = SHIPPED.get(str(source), Path(source))
        if not source.suffix and not source.exists():
            allowed = f"a configuration in TOML, {' or '.join(SHIPPED)}"
            raise InputError(str(source), "no such file", allowed)
    folder = Path() if isinstance(source, Mapping) else source.parent
    values = dict(source) if isinstance(source, Mapping) else read(source)
    stages = values.get("stages")
    if not isinstance(stages, list | tuple) or not all(isinstance(s, Mapping) for s in stages):
        raise InputError("stages", "nothing" if stages is None else repr(stages), "[[stages]]")
    common = values.get("common", {})
    if not isinstance(common, Mapping):
        raise InputError("common", repr(common), "a table")
    values["stages"] = stages = [_with_file(stage, folder, common) for stage in stages]
    names = [str(stage.get("name") or stage.get("kind")) for stage in stages]
    for text in overrides:
        first, dot, rest = text.partition(".")
        if first.strip() in names and dot:
            stage = stages[names.index(first.strip())]
            stage["config"] = override(stage["config"], rest)
        elif first.partition("=")[0].strip() in _OWN:
            values = override(values, text)
        else:
            allowed = f"{', '.join(_OWN)}, or STAGE.key=value of {', '.join(names)}"
            raise InputError("--set", repr(text), allowed)
    try:
        options = PipelineOptions.model_validate(values)
    except ValidationError as error:
        raise explain(error, PipelineOptions, values) from error
    for stage in options.stages:
        try:
            KINDS[stage.kind].check(stage.config)
        except InputError as error:
            raise error.within(f"stages.{stage.called}") from error
    return options


def _with_file(stage: Mapping[str, Any], folder: Path, common: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage whose own configuration is put over its file's, and that over the common."""
    config = stage.get("config", {})
    if not isinstance(config, Mapping):
        raise InputError("stages.config", repr(config), "a table")
    file = stage.get("file")
    if file is not None and not isinstance(file, str):
        raise InputError("stages.file", repr(file), "a path")
    kind = KINDS.get(str(stage.get("kind")))
    base = over(common if kind and kind.is_of_run else {}, read(folder / file) if file else {})
    told = {key: value for key, value in stage.items() if key != "file"}
    return {**told, "config": over(base, config)}


def over(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with another put over it, table by table."""
    made = dict(base)
    for key, value in values.items():
        below = made.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        made[key] = over(below, value) if both else value  # type: ignore[arg-type]
    return made
