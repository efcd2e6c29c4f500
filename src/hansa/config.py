"""The configuration of a training run: validated, written back, compared."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hansa.curation.options import CurationOptions
from hansa.data.federate import DataOptions
from hansa.data.text import TextOptions
from hansa.errors import InputError
from hansa.federation.attackers import Attackers
from hansa.federation.engines.plan import EngineOptions
from hansa.federation.methods import FedAvg, Method, method_class, named
from hansa.federation.node import Buffers
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.privacy import Privacy
from hansa.federation.robust import Robust
from hansa.federation.rules import Rules
from hansa.federation.tree import ROOT, Tree
from hansa.models.language import LANGUAGE
from hansa.pruning.options import PruningOptions
from hansa.untrusted import read_text, toml_of


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelOptions(_Section):
    """Which model is trained."""

    name: str = "mlp"
    """``mlp``, ``cnn``, ``resnet18``, ``resnet20``, ``vgg16``, ``blox`` or ``module:Class``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the model's class."""
    buffers: Buffers = "averaged"
    """Running statistics (BatchNorm): averaged like parameters, local to each client, or, with a
    method that has masks, personal where their layer's weights are."""
    bundle: str | None = None
    """Folder of a bundle whose weights are the initial values; it must hold this model. Where it
    was pruned, so is what is trained."""
    fresh: bool = Field(False, strict=True)
    """Take no weights of the bundle, which then only stands among the ancestors: for a model that
    was found on other data."""


class PrivacyOptions(Privacy):
    """Differential privacy of all clients of a flat run, or of those below inner nodes."""

    where: Literal["clients", "central"] = "clients"
    """Who adds the noise: each client before anything leaves it, or the root, which is then
    trusted, once for all (``central``)."""

    @model_validator(mode="before")
    @classmethod
    def _of_updates(cls, values: Any) -> Any:
        """Fill in the unit of central privacy, which has one only."""
        if isinstance(values, Mapping) and values.get("where") == "central":
            return {"unit": "update", **values}
        return values

    @model_validator(mode="after")
    def _has_unit(self) -> "PrivacyOptions":
        if self.where == "central" and self.unit != "update":
            raise ValueError("the root sees updates only: where = 'central' needs unit = 'update'")
        return self

    @property
    def rule(self) -> Privacy:
        """The same without who adds the noise."""
        return Privacy.model_validate(self.model_dump(exclude={"where"}))


class TreeOptions(_Section):
    """The shape of the federation."""

    federations: int = Field(1, ge=1, strict=True)
    """Inner nodes over which the clients are dealt in turn; 1 is a flat federation."""


class NodeOptions(Rules):
    """A node of a tree that is written out: where it stands, what it holds, what holds there."""

    parent: str = ROOT
    """The node above it."""
    text: str | None = None
    """Its text: ``python:KIND``, ``file:PATH``, ``folder:PATH``, ``parquet:PATH`` or
    ``hub:NAME``. Every leaf needs some; an inner node may have some."""

    @property
    def rules(self) -> Rules:
        """What holds at the node and nowhere else."""
        return Rules.model_validate({name: getattr(self, name) for name in Rules.model_fields})


class RunEngine(EngineOptions):
    """How the run is computed, and where states are held meanwhile."""

    state_memory_mb: int = Field(1024, ge=0, strict=True)
    """Memory for the states of clients; what does not fit is read from disk when needed."""


Tracker = Literal["tensorboard", "mlflow"]
"""Where a run's figures can be watched beside its own folder."""


class RunConfig(_Section):
    """Everything that determines a run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What the run's folder is called."""
    output: str = "runs"
    """Folder that run folders are made in."""
    seed: int = Field(0, ge=0, lt=2**63, strict=True)
    """Everything random in the run is derived from it."""
    rounds: int = Field(10, ge=1, strict=True)
    """Rounds of the federation."""
    score_every: int = Field(1, ge=0, strict=True)
    """Rounds between scores; the last round is always scored, 0 scores no other."""
    compare_up_to: int = Field(25, ge=0, strict=True)
    """Most clients whose models and masks are compared two by two after the last round."""
    tracking: tuple[Tracker, ...] = ()
    """Where the figures of each round are written as well: ``tensorboard``, ``mlflow``, or both."""
    on_failure: Literal["stop", "drop"] = "stop"
    """A client whose loss is no number stops the run, or is dropped from its round."""
    data: DataOptions = DataOptions()
    text: TextOptions | None = None
    """How texts are cut, where a language model is trained; then ``data`` is not read."""
    nodes: dict[str, NodeOptions] = Field(default_factory=dict)
    """The nodes of the tree by name, ``root`` among them where it has options."""
    model: ModelOptions = ModelOptions()
    training: Training = Training()
    pruning: PruningOptions | None = None
    """What is pruned before the first round; nothing where it is not set."""
    curation: CurationOptions | None = None
    """Which training examples are used, where nodes hold questions and answers; all of them where
    it is not set."""
    method: Method = FedAvg()
    """The algorithm; ``method.name`` is one of ``METHODS`` or ``module:Class``."""
    participation: Participation = Participation()
    robust: Robust | None = None
    """The rule by which replies are merged; the weighted mean where it is not set."""
    attackers: Attackers | None = None
    """Simulated attackers among the clients."""
    privacy: PrivacyOptions | None = None
    """Differential privacy of the clients; none where it is not set."""
    tree: TreeOptions = TreeOptions()
    engine: RunEngine = RunEngine()

    @field_validator("tracking", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Take one name for a list of it."""
        return [value] if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, values: Any) -> Any:
        """Fill in a small language model where text is trained on and none is named."""
        if not isinstance(values, Mapping) or not values.get("nodes"):
            return values
        model = values.get("model", {})
        if isinstance(model, Mapping) and "name" not in model:
            model = {**model, "name": "llama"}
        return {"text": {}, **values, "model": model}

    @property
    def folder(self) -> Path:
        """Where the run lies, unless the name is taken."""
        return Path(self.output) / f"{self.name}-seed{self.seed}"

    @property
    def rules(self) -> dict[str, Rules]:
        """Name of a node -> what holds there, and below it where nothing else does."""
        rules = {name: node.rules for name, node in self.nodes.items()}
        if self.privacy is not None and self.privacy.where == "clients":
            rules[ROOT] = Rules(privacy=self.privacy.rule)
        return rules

    @property
    def central(self) -> Privacy | None:
        """Privacy of the clients' updates that the root takes care of."""
        central = self.privacy is not None and self.privacy.where == "central"
        return self.privacy.rule if self.privacy is not None and central else None

    def shape(self) -> Tree:
        """Return the tree that is written out.

        Raises:
            InputError: an unknown parent, a cycle, or no node below the root.
        """
        return Tree({n: node.parent for n, node in self.nodes.items() if n != ROOT}, "nodes")

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values, without what is not set."""
        unread = {"nodes"} if self.text is None else {"data", "tree"}
        unread |= set() if self.tracking else {"tracking"}
        values = self.model_dump(mode="json", exclude={"method", *unread}, exclude_none=True)
        method = self.method.model_dump(mode="json", exclude_none=True)
        return {**values, "method": {"name": named(self.method), **method}}

    def as_toml(self) -> str:
        """Return the configuration as TOML that reads back equal."""
        return tomli_w.dumps(self.as_dict())


def load(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """Read and validate a configuration.

    Args:
        source: path of a TOML file, or the values themselves.
        overrides: ``key=value`` with dotted keys; a value is TOML, or else a plain string.

    Raises:
        InputError: naming the first key that is wrong, what was found and what is allowed.
    """
    return _validate(values_of(source, overrides))


def values_of(
    source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the values of a configuration, not validated; see ``load``.

    Raises:
        InputError: no file, no TOML, or an override that is none.
    """
    values = dict(source) if isinstance(source, Mapping) else read(Path(source))
    for text in overrides:
        values = override(values, text)
    return values


def difference(first: RunConfig, second: RunConfig) -> list[str]:
    """Return the dotted keys in which two configurations differ."""
    return sorted(_difference(first.as_dict(), second.as_dict()))


def _difference(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key in first.keys() | second.keys():
        a, b = first.get(key), second.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys |= _difference(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.add(f"{prefix}{key}")
    return keys


def read(path: Path) -> dict[str, Any]:
    """Return the values of a TOML file.

    Raises:
        InputError: no such file, or no TOML.
    """
    try:
        return toml_of(read_text(path))
    except FileNotFoundError as error:
        raise InputError(str(path), "no such file", "a configuration in TOML") from error
    except ValueError as error:
        raise InputError(str(path), f"no TOML ({error})", "a configuration in TOML") from error
    except OSError as error:
        raise InputError(str(path), f"unreadable ({error.strerror})", "a file") from error


def override(values: dict[str, Any], text: str) -> dict[str, Any]:
    """Return values with one ``key=value`` put into them.

    Raises:
        InputError: it is no such text, or its key leads through what is no table.
    """
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError("--set", repr(text), "key=value, such as training.lr=0.1")
    try:
        parsed = toml_of(f"value = {value}")["value"]
    except ValueError:
        parsed = value
    return _put(values, parts, parsed, key.strip())


def _put(values: dict[str, Any], parts: list[str], value: Any, key: str) -> dict[str, Any]:
    first, *rest = parts
    if rest:
        below = values.get(first, {})
        if not isinstance(below, dict):
            raise InputError("--set", f"{key!r}, but {first!r} is no table", "a key of a table")
        value = _put(below, rest, value, key)
    return {**values, first: value}


def _validate(values: dict[str, Any]) -> RunConfig:
    _check_texts(values, "")
    if "methods" in values:
        raise InputError("methods", "methods to compare", "[method]; or `hansa compare`")
    _check_tokenizers(values.get("nodes"))
    values = dict(values)
    method = values.pop("method", {"name": "fedavg"})
    if not isinstance(method, Mapping):
        raise InputError("method", repr(method), "a table with a name")
    options = dict(method)
    kind = method_class(options.pop("name", None))
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise explain(error, RunConfig, values) from error
    _check_text(config, values)
    _check_curation(config)
    _check_privacy(config)
    try:
        config = config.model_copy(update={"method": kind.model_validate(options)})
    except ValidationError as error:
        raise explain(error, kind, options, "method.") from error
    _check_scored(config)
    if config.robust is not None and config.pruning is not None:
        found = "a table beside [robust], whose rule does not cover the exchange of gradients"
        raise InputError("pruning", found, "one of them")
    return config


def _check_text(config: RunConfig, values: Mapping[str, Any]) -> None:
    """Refuse what does not go together with text, and text without nodes.

    Raises:
        InputError: naming the key.
    """
    is_language = config.model.name in LANGUAGE
    if config.text is None:
        if is_language:
            raise InputError("nodes", "nothing", f"nodes with text, for model {config.model.name}")
        return
    if not config.nodes:
        raise InputError("nodes", "nothing", "the nodes of the tree, as [nodes.NAME]")
    if not is_language:
        raise InputError("model.name", repr(config.model.name), ", ".join(LANGUAGE))
    for key in ("data", "tree"):
        if values.get(key):
            raise InputError(key, "a table beside [nodes]", "[text] and [nodes]")
    if config.pruning is not None:
        raise InputError("pruning", "a table beside [nodes]", "none: only image models are pruned")
    root = config.nodes.get(ROOT)
    if root is not None and root.privacy is not None and config.text.tokenizer == "bpe":
        # Its vocabulary is learned from the root's text as it is, and goes to every node.
        raise InputError("text.tokenizer", "'bpe' with a private root", "'bytes'")
    if root is not None and root.parent != ROOT:
        raise InputError("nodes.root.parent", repr(root.parent), "nothing: it is the root")
    tree = config.shape()
    for name, node in config.nodes.items():
        path = tree.path_of(name)
        if tree.is_leaf(path) and node.text is None:
            raise InputError(f"nodes.{name}.text", "nothing", "text, which every leaf needs")


def _check_curation(config: RunConfig) -> None:
    """Refuse a filter where there is nothing that it could score.

    Raises:
        InputError: naming the key.
    """
    if config.text is not None and config.text.tokenizer == "bundle" and not config.model.bundle:
        raise InputError("text.tokenizer", "'bundle' and no model.bundle", "a bundle, or 'bytes'")
    if config.curation is None:
        return
    if config.text is None or config.text.answers is None:
        raise InputError("curation", "a table without [text.answers]", "questions and answers")
    for name, node in config.nodes.items():
        if node.privacy is not None:
            raise InputError(
                f"nodes.{name}.privacy",
                "privacy beside [curation], whose looks at the data its budget does not count",
                "one of them",
            )


def _check_privacy(config: RunConfig) -> None:
    """Refuse privacy beside looks at the data that its budget would not count.

    Raises:
        InputError: naming the key.
    """
    if config.privacy is None:
        return
    if config.nodes and config.privacy.where == "clients":
        raise InputError("privacy", "a table beside [nodes]", "[nodes.root.privacy]")
    for key in ("pruning", "curation"):
        if getattr(config, key) is not None:
            found = f"a table beside [{key}], whose looks at the data its budget does not count"
            raise InputError("privacy", found, "one of them")


def _check_scored(config: RunConfig) -> None:
    """Refuse to score by a model that training makes where it makes none that is common.

    Raises:
        InputError: naming the key.
    """
    if config.curation is None or config.method.common:
        return
    for key in ("every", "warm_up"):
        if getattr(config.curation, key):
            found = f"scores by a trained model with method {config.method.name!r}, which has none"
            raise InputError(f"curation.{key}", found, "another method, or scores before training")


def _check_tokenizers(nodes: Any) -> None:
    """Refuse a tokenizer of one node's own, which no other node could read."""
    for name, node in nodes.items() if isinstance(nodes, Mapping) else ():
        if isinstance(node, Mapping) and "tokenizer" in node:
            allowed = "text.tokenizer, which is common to all nodes, as their model is"
            raise InputError(f"nodes.{name}.tokenizer", repr(node["tokenizer"]), allowed)


def _check_texts(value: Any, key: str) -> None:
    """Refuse texts that no file name could hold."""
    if isinstance(value, Mapping):
        for name, below in value.items():
            _check_texts(below, f"{key}.{name}" if key else str(name))
    # Lone surrogates, which the command line makes of bytes that are no UTF-8, turn into "?".
    elif isinstance(value, str) and value.encode(errors="replace").decode() != value.replace(
        "\0", ""
    ):
        raise InputError(key, repr(value), "text in UTF-8 without null characters")


def explain(
    error: ValidationError, model: type[BaseModel], values: Mapping[str, Any], prefix: str = ""
) -> InputError:
    """Return the first thing that is wrong as an error that names key, find and remedy.

    A validator of a whole configuration, whose errors pydantic puts nowhere, may raise an
    ``InputError`` of its own, which is returned.
    """
    details = error.errors(include_url=False)[0]
    if isinstance(own := details.get("ctx", {}).get("error"), InputError):
        return own
    # A union puts the tag it chose into the path; a user knows only what stands in the file.
    path: list[str] = []
    place: Any = values
    for part in details["loc"]:
        if isinstance(place, Mapping) and part not in place and place.get("kind") == part:
            continue
        # So do the kinds of a union without tags: literal[...], tuple[...], float.
        if not isinstance(place, Mapping) and ("[" in str(part) or part == "float"):
            continue
        path.append(str(part))
        if isinstance(place, list | tuple) and isinstance(part, int):
            place = place[part] if part < len(place) else None
        else:
            place = place.get(part) if isinstance(place, Mapping) else None
    key = (prefix + ".".join(path)).rstrip(".")
    if details["type"] == "extra_forbidden":
        names = _fields(model, details["loc"][:-1])
        close = difflib.get_close_matches(path[-1], names, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return InputError(key, "an unknown key", f"{', '.join(names)}{hint}")
    if details["type"] == "missing":
        return InputError(key, "nothing", "a value")
    allowed = details["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    context = details.get("ctx", {})
    if details["type"] == "union_tag_invalid":
        return InputError(f"{key}.kind", repr(context["tag"]), context["expected_tags"])
    if details["type"] == "union_tag_not_found":
        return InputError(f"{key}.kind", "nothing", "one of iid, shards, dirichlet, group, shift")
    if isinstance(details["input"], Mapping) and details["type"] == "value_error":
        return InputError(key, "values that do not go together", allowed)
    return InputError(key, repr(details["input"]), allowed)


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    """Yield the sections that a field may hold."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    else:
        for inner in get_args(kind):
            yield from _models(inner)


def _fields(model: type[BaseModel], path: Iterable[int | str]) -> list[str]:
    """Return the keys that may stand at a place in a configuration."""
    choices = [model]
    for part in path:
        field = model.model_fields.get(str(part))
        if field is not None:
            choices = list(_models(field.annotation)) or choices
            model = choices[0]
            continue
        kinds = {k.model_fields["kind"].default: k for k in choices if "kind" in k.model_fields}
        model = kinds.get(part, model)
    names = list(model.model_fields)
    return ["name", *names] if issubclass(model, Method) else names
