"""What a deployment is made of: ``[deploy]`` beside the configuration of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hansa.config import RunConfig, explain, load, read
from hansa.data.federate import FederatedData, federate
from hansa.deploy.charter import Charter, token_classes
from hansa.deploy.holding import own_data
from hansa.deploy.texts import check_inner, rules_of, shared, texts_of, tokenizer_of
from hansa.errors import InputError, first_line
from hansa.federation.message import State
from hansa.federation.node import Child, Node, Reply
from hansa.federation.privacy import Privacy
from hansa.federation.rules import Rules, inherited
from hansa.federation.tree import ROOT, Tree, name_of

_HIGHEST = 60_000  # of ports; a party's other ports lie above its own


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerOptions(_Section):
    """Where a federation's SuperLink listens, and how long it waits."""

    host: str = Field("127.0.0.1", pattern=r"^[A-Za-z0-9.-]+$")
    """Name or address under which its nodes reach it; its certificate is made out to it."""
    port: int | None = Field(None, ge=1, le=60000, strict=True)
    """Its one port; the next free number after the root's by default."""
    deadline: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Seconds after which an answer is late; by default 3600 at the root, and seven tenths of
    what the federation above has at every other."""
    wait: float = Field(300.0, gt=0, allow_inf_nan=False)
    """Seconds that nodes have to connect before the first round."""
    look: float = Field(3.0, ge=0.1, le=60)
    """Seconds between two looks of an idle node for what is asked of it."""


class FederationOptions(ServerOptions):
    """A federation below the root, with the rules that its owner gives it."""

    parent: str = ROOT
    """The federation it is part of."""
    method: dict[str, Any] | None = None
    """Its own method, in place of the run's."""
    training: dict[str, Any] | None = None
    """Its own optimizer and local work."""
    participation: dict[str, Any] | None = None
    """Whom it asks in a round."""
    privacy: Privacy | None = None
    """Differential privacy of all below it that have none of their own."""


class PartyOptions(_Section):
    """A client on a machine of its own."""

    federation: str = ROOT
    """The federation it is part of."""
    data: dict[str, Any] | None = None
    """What it holds, as in ``[data]``; by default its share of the run's data, for a trial."""
    privacy: Privacy | None = None
    """Differential privacy of its training."""


class DeployOptions(ServerOptions):
    """The root's SuperLink, the federations below it, and the clients."""

    shape: tuple[int, ...] | None = None
    """Shape of one input, where no data are at hand to tell."""
    classes: tuple[str, ...] | None = None
    """Names of the classes, in the order of the model's logits, where no data are at hand."""
    privacy: Privacy | None = None
    """Differential privacy of all clients that have none of their own or their federation's."""
    federations: dict[str, FederationOptions] = Field(default_factory=dict)
    parties: dict[str, PartyOptions] = Field(default_factory=dict)


@dataclass(frozen=True)
class Deployment:
    """A deployment as described: the tree, each federation's configuration, the data's shape.

    Attributes:
        options: the ``[deploy]`` section.
        tree: federations and clients.
        configs: federation's path -> the configuration of its run.
        servers: federation's path -> where it listens and how long it waits, all of it set.
        shape: shape of one input.
        classes: names of the classes; of text, the token numbers.
        tokenizer: what the tokens of text stand for; nothing where they are bytes.
        texts: path -> source of the text of its own.
        rules: path -> what holds there and nowhere else.
    """

    options: DeployOptions
    tree: Tree
    configs: Mapping[str, RunConfig]
    servers: Mapping[str, ServerOptions]
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    tokenizer: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)
    rules: Mapping[str, Rules] = field(default_factory=dict)

    def trains(self, path: str) -> bool:
        """Tell whether a node has data of its own: a client, or a server with text."""
        return self.tree.is_leaf(path) or path in self.texts

    def key(self, path: str) -> str:
        """Return where in the description a node's own settings stand."""
        name = name_of(path)
        if self.texts:
            return f"nodes.{name}"
        if path == ROOT:
            return "deploy"
        return f"deploy.{'parties' if self.tree.is_leaf(path) else 'federations'}.{name}"


def read_deployment(path: Path) -> Deployment:
    """Read and check the description of a deployment.

    Raises:
        InputError: naming the first key that is wrong, what was found and what is allowed.
    """
    values = _absolute(read(path))
    section = values.pop("deploy", {})
    try:
        options = DeployOptions.model_validate(section)
    except ValidationError as error:
        raise explain(error, DeployOptions, section, "deploy.") from error
    config = load(values)
    _check(config, options)
    if config.text is not None:
        return _of_text(values, config, options)
    for name, party in options.parties.items():
        own_data(party.data, f"deploy.parties.{name}.data.")
    data = None
    if not options.parties or any(party.data is None for party in options.parties.values()):
        data = federate(config.data, config.seed)
    tree = _tree(config, options, data)
    servers = _servers(options, tree)
    configs = {path: _config(values, options, path) for path in servers}
    shape = options.shape or (data.shape if data else None)
    classes = options.classes or (data.classes if data else None)
    if shape is None or classes is None:
        raise InputError("deploy.shape", "nothing", "shape and classes, where no data tell them")
    if data and (data.shape, data.classes) != (shape, classes):
        raise InputError("deploy.shape", f"{shape}, {classes}", f"{data.shape}, {data.classes}")
    rules = inherited(tree, _private(options))
    return Deployment(options, tree, configs, servers, shape, classes, rules=rules)


def _private(options: DeployOptions) -> dict[str, Rules]:
    """Return name of a node -> its rules, of those for which privacy is asked."""
    asked = {ROOT: options.privacy}
    for sections in (options.federations, options.parties):
        asked |= {name: section.privacy for name, section in sections.items()}
    return {name: Rules(privacy=privacy) for name, privacy in asked.items() if privacy}


def _of_text(values: Mapping[str, Any], config: RunConfig, options: DeployOptions) -> Deployment:
    """Return the deployment of a language model.

    Raises:
        InputError: naming the key.
    """
    assert config.text is not None  # noqa: S101 the caller has looked
    tree = config.shape()
    for key in ("parties", "shape", "classes", "privacy"):
        if getattr(options, key):
            raise InputError(f"deploy.{key}", "something beside [nodes]", "[nodes] and [text]")
    inner = [name_of(path) for path in tree.walk() if path != ROOT and not tree.is_leaf(path)]
    for name, federation in options.federations.items():
        if name not in inner:
            allowed = ", ".join(inner) or "none: no inner node stands in [nodes]"
            raise InputError(f"deploy.federations.{name}", "no inner node", allowed)
        for key in federation.model_fields_set & {"parent", "privacy"}:
            found = repr(getattr(federation, key))
            raise InputError(f"deploy.federations.{name}.{key}", found, f"nodes.{name}.{key}")
    tokenizer, texts = tokenizer_of(config), texts_of(config, tree)
    servers, configs = _servers(options, tree), {}
    for path in servers:
        own = _config(values, options, path)
        check_inner(own, texts, path)
        configs[path] = shared(own, tree, path, tokenizer.size)
    coded = "" if config.text.tokenizer == "bytes" else tokenizer.as_json()
    classes, shape, rules = token_classes(coded), (config.text.context,), rules_of(config, tree)
    return Deployment(options, tree, configs, servers, shape, classes, coded, texts, rules)


def charter_of(deployment: Deployment, path: str) -> Charter:
    """Return what the members of one federation share.

    Raises:
        InputError: its method or model does not fit the others.
    """
    tree = deployment.tree
    children = tree.children(path)
    charter = Charter(
        deployment.configs[path],
        path,
        children,
        tuple(child for child in children if tree.is_leaf(child)),
        deployment.shape,
        deployment.classes,
        max(node.count("/") for node in tree.walk(path)) - path.count("/"),
        deployment.tokenizer,
    )
    charter.setup  # noqa: B018 it is refused here, and not on a machine far away
    return charter


def check_together(above: Charter, below: Charter) -> None:
    """Refuse a federation whose method cannot talk to that of the federation above.

    Raises:
        InputError: it cannot.
    """
    up, down = (c.config.method for c in (above, below))
    parent, child = (Node(c.path, 1, 0, c.setup, len(c.children)) for c in (above, below))
    try:
        state = up.start_root(Node(ROOT, 0, 0, above.setup))
        ((_, sent),) = up.dispatch(parent, state, [Child(below.path, State())])
        received = down.receive(child, State(), sent)
        reply = down.reply(child, down.aggregate(child, received, []))
        up.aggregate(parent, state, [Reply(below.path, State(), reply)])
    except Exception as error:  # two methods may disagree anywhere
        raise InputError(
            f"deploy.federations.{name_of(below.path)}.method",
            f"{down.name!r}, which cannot follow {up.name!r} ({first_line(error)})",
            "a method with the messages of the one above",
        ) from error


def _absolute(values: dict[str, Any]) -> dict[str, Any]:
    """Return values in which paths of data do not depend on the folder one is in."""
    changed: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            changed[key] = _absolute(value)
        elif key in ("source", "text") and isinstance(value, str):
            kind, colon, rest = value.partition(":")
            if kind in ("file", "folder", "parquet") and rest:
                value = f"{kind}{colon}{Path(rest).absolute()}"
            changed[key] = value
        else:
            changed[key] = value
    return changed


def _check(config: RunConfig, options: DeployOptions) -> None:
    rules = config.participation
    if rules.failure_rate or rules.deadline is not None:
        raise InputError(
            "participation.failure_rate",
            "simulated failures or a simulated deadline",
            "neither in a deployment, where both are real; see deploy.deadline",
        )
    if config.tree.federations > 1 and options.federations:
        raise InputError("tree.federations", config.tree.federations, "1 with deploy.federations")
    if config.method.pools:
        raise InputError("method.name", repr(config.method.name), "a method that pools no data")
    if config.method.turns() > 1:
        raise InputError("method.inner_rounds", config.method.turns(), "1 in a deployment")
    if config.attackers is not None:
        raise InputError("attackers", config.attackers.kind, "none in a deployment")
    if config.privacy:
        # Noise of a deployment must come from secrets, and the root has none of the clients'.
        raise InputError("privacy", "a table in a deployment", "deploy.privacy, of its clients")
    if config.pruning:
        raise InputError("pruning", config.pruning.method, "none in a deployment")
    if config.text is not None and config.text.answers is not None:
        raise InputError("text.answers", "questions and answers", "prose in a deployment")
    if config.model.bundle:
        raise InputError("model.bundle", config.model.bundle, "nothing in a deployment")


def _tree(config: RunConfig, options: DeployOptions, data: FederatedData | None) -> Tree:
    """Return the tree of federations and clients."""
    if not options.parties:
        if data is None:
            raise InputError("deploy.parties", "none", "some, or data to be dealt")
        if not options.federations:
            return Tree.grouped(data.clients, config.tree.federations)
        raise InputError("deploy.parties", "none", "the clients of each federation")
    if both := options.parties.keys() & options.federations.keys():
        raise InputError(f"deploy.parties.{min(both)}", "the name of a federation", "another name")
    for name, party in options.parties.items():
        if party.federation != ROOT and party.federation not in options.federations:
            raise InputError(
                f"deploy.parties.{name}.federation",
                repr(party.federation),
                ", ".join([ROOT, *options.federations]),
            )
        if party.data is None and data is not None and name not in data.clients:
            known = ", ".join(list(data.clients)[:5])
            raise InputError(
                f"deploy.parties.{name}",
                "no data, and no client of that name in the run's data",
                f"data of its own, or one of {known}",
            )
    parents = {name: party.federation for name, party in options.parties.items()}
    parents |= {name: below.parent for name, below in options.federations.items()}
    tree = Tree(parents)
    for leaf in tree.leaves():
        if name_of(leaf) in options.federations:
            raise InputError(f"deploy.federations.{name_of(leaf)}", "no parties", "at least one")
    return tree


def _servers(options: DeployOptions, tree: Tree) -> dict[str, ServerOptions]:
    """Return where each federation listens and how long it waits, with nothing left open."""
    servers: dict[str, ServerOptions] = {}
    port, taken = options.port or 8000, set()
    for path in tree.walk():
        if tree.is_leaf(path):
            continue
        own: ServerOptions = options
        if path != ROOT:
            own = options.federations.get(name_of(path), FederationOptions())
        above = servers.get(path.rpartition("/")[0])
        limit = above.deadline if above else None
        deadline = own.deadline or (0.7 * limit if limit else 3600.0)
        key = f"deploy.federations.{name_of(path)}" if above else "deploy"
        if limit and deadline >= limit:
            raise InputError(f"{key}.deadline", deadline, f"less than {limit:g}, the one above")
        chosen = own.port or port
        if (own.host, chosen) in taken:
            raise InputError(f"{key}.port", chosen, "a port that no other federation has")
        taken.add((own.host, chosen))
        if chosen > _HIGHEST:
            raise InputError(f"{key}.port", chosen, f"at most {_HIGHEST}")
        port = max(port, chosen) + 1
        servers[path] = ServerOptions(
            host=own.host, port=chosen, deadline=deadline, wait=own.wait, look=own.look
        )
    return servers


def _config(values: Mapping[str, Any], options: DeployOptions, path: str) -> RunConfig:
    """Return the configuration of one federation's run."""
    name = name_of(path)
    own = options.federations.get(name) if path != ROOT else None
    changes: dict[str, Any] = {"output": "runs"}
    for key in ("method", "training", "participation"):
        if own is not None and (section := getattr(own, key)) is not None:
            changes[key] = section
    config = load({**values, **changes})
    _check(config, options)
    return config.model_copy(update={"engine": config.engine.model_copy(update={"workers": 1})})
