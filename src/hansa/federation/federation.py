"""A federation of one's own objects: a module, clients, a method."""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import nn

from hansa.data.clients import IGNORED, Client
from hansa.errors import InputError
from hansa.federation.attackers import Attackers
from hansa.federation.central_checks import centrally
from hansa.federation.engines.choice import Chooser
from hansa.federation.engines.engine import RoundResult
from hansa.federation.engines.local import LocalEngine
from hansa.federation.engines.plan import EngineOptions, Plan
from hansa.federation.engines.workers import check_sendable
from hansa.federation.history import History, tables_of
from hansa.federation.leaf import Leaf, Newcomer
from hansa.federation.message import State, Tensors
from hansa.federation.methods.base import Method
from hansa.federation.node import Buffers, Setup
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.privacy import Privacy
from hansa.federation.robust import Robust, check_nodes
from hansa.federation.rules import Rules, inherited
from hansa.federation.store import Store
from hansa.federation.tree import ROOT, Tree, name_of
from hansa.models.objective import CLASSIFICATION, NextToken, Objective
from hansa.models.task import Task


class Federation:
    """Clients that train a model together by a method.

    Examples:
        >>> federation = Federation(net, clients, FedSelect(rate=0.05), Training(lr=0.1))
        >>> history = federation.run(rounds=20)
        >>> history.summary()["metrics"]["accuracy"]["mean"]
        >>> net_of_a = federation.model_of("ward-a")

    Args:
        model: a classifier that returns logits [batch, classes], or with the objective
            ``NextToken`` a language model, [batch, T, V]. Its trainable parameters and its buffers
            are the initial values; frozen parameters stay as they are and never travel. Where
            masks are attached to it (``models.masks``), all clients train under them.
        clients: name -> what the client holds: of every leaf, and of inner nodes with data.
        method: the federated algorithm.
        training: optimizer and local work.
        seed: everything random in the run is derived from it.
        participation: who is asked, fails or is late.
        buffers: ``averaged``: running statistics travel; ``local``: each client keeps its own;
            ``personal``: each of their entries follows the mask of its layer's weight.
        tree: the federation's shape over the clients' names; flat by default.
        engine: how the work is done; by default as a short trial finds fastest.
        on_failure: whether a client whose loss is no number stops the run or is dropped.
        compare_up_to: most clients that are compared two by two after the last round: every own
            model on every client's test data, every mask with every other.
        objective: what the model is trained by; classification by default.
        rules: name of a node -> what holds there, and below it where nothing else does.
        robust: the rule by which replies are merged, in the place of the weighted mean.
        attackers: simulated attackers among the clients; no score is about them.
        central: differential privacy of the clients' updates that the root takes care of: it clips
            them and adds noise to their sum.

    Raises:
        InputError: a model that does not fit the clients' inputs and labels, clients that are not
            the leaves of the tree, a method that is not defined on the tree or the model, or a
            BatchNorm that would see a batch of one.
    """

    def __init__(
        self,
        model: nn.Module,
        clients: Mapping[str, Client],
        method: Method,
        training: Training | None = None,
        *,
        seed: int = 0,
        participation: Participation | None = None,
        buffers: Buffers = "averaged",
        tree: Tree | None = None,
        engine: EngineOptions | None = None,
        on_failure: Literal["stop", "drop"] = "stop",
        compare_up_to: int = 25,
        objective: Objective | None = None,
        rules: Mapping[str, Rules] | None = None,
        robust: Robust | None = None,
        attackers: Attackers | None = None,
        central: Privacy | None = None,
    ) -> None:
        self.tree = Tree.flat(name for name in clients if name != ROOT) if tree is None else tree
        if not isinstance(method, Method):
            raise InputError("method", repr(method), "a method such as FedAvg()")
        paths = {name_of(path): path for path in self.tree.walk()}
        _check_holders(self.tree, paths, clients)
        for name, held in (rules or {}).items():
            if not isinstance(held, Rules):
                raise InputError(f"rules of {name}", repr(held), "Rules(...)")
        if engine is not None and engine.kind == "flower" and (method.pools or method.turns() > 1):
            raise InputError("engine.kind", "'flower'", f"another with method {method.name!r}")
        audience: dict[str, Client] = {}
        if method.pools:
            audience = {paths[name]: client for name, client in clients.items()}
            own = {path: inherited(self.tree, rules or {}).get(path) for path in audience}
            clients, training = _pooled(clients, training or Training(), own)
            rules = {}
            self.tree = Tree.flat(clients)
            paths = {name_of(path): path for path in self.tree.walk()}
        _check_inner(self.tree, paths, clients, method)
        for key, value, allowed in (
            ("buffers", buffers, get_args(Buffers)),
            ("on_failure", on_failure, ("stop", "drop")),
        ):
            if value not in allowed:
                raise InputError(key, repr(value), " or ".join(allowed))
        objective = objective or CLASSIFICATION
        check_model(model, clients, objective)
        training = training or Training()
        task = method.adapted(Task(model, objective), training)
        moments = isinstance(objective, NextToken)
        handed_down = inherited(self.tree, rules or {})
        attack = attackers.drawn(self.tree.leaves(), seed) if attackers is not None else None
        self.setup = Setup(task, training, buffers, seed, handed_down, moments, robust, attack)
        if central is not None:
            asking = (handed_down.get(ROOT) or Rules()).participation or participation
            self.setup = replace(
                self.setup, central=centrally(central, method, self.tree, self.setup, asking)
            )
            if ROOT in clients:
                raise InputError("privacy.where", "'central' with data at the root", "none there")
        for path in handed_down:
            # A model or method that cannot be trained so is refused here.
            if self.setup.at(path).privacy is not None:
                check_private(f"nodes.{name_of(path)}.privacy", method)
        method.check(self.setup, self.tree.depth)
        if robust is not None:
            check_nodes(robust, self.tree, participation or Participation(), handed_down)
        check_batches(model, clients, self.setup.training.batch_size)
        _check_newcomers(participation or Participation(), self.tree, rules or {})
        self._compare_up_to = compare_up_to
        self._options = engine or EngineOptions()
        self._options.check()
        self._paths = paths | {name_of(path): ROOT for path in audience}  # they have its model
        if self._options.workers > 1:
            check_sendable(Leaf(method, self.setup, seed), self._options.workers)
        self._engine = LocalEngine(
            self.tree,
            self._poisoned({paths[name]: client for name, client in clients.items()}),
            method,
            self.setup,
            seed,
            participation,
            on_failure,
            audience=audience,
        )

    @property
    def attackers(self) -> tuple[str, ...]:
        """The names of simulated attackers, in order."""
        attack = self.setup.attack
        return tuple(sorted(map(name_of, attack.paths))) if attack is not None else ()

    def _poisoned(self, held: dict[str, Client]) -> dict[str, Client]:
        """Return path -> client, with the labels that attackers train on.

        Raises:
            InputError: an attack that needs classes, or an engine that simulates none.
        """
        attack = self.setup.attack
        if attack is None:
            return held
        if self._options.kind == "flower":
            raise InputError("attackers", "attackers with engine.kind 'flower'", "another engine")
        if attack.kind == "label_flip" and isinstance(self.setup.task.objective, NextToken):
            raise InputError("attackers.kind", "'label_flip' of text", "another kind")
        highest = max(int(client.labels.max()) for client in held.values())
        return attack.poisoned(held, highest + 1)

    @property
    def plan(self) -> Plan:
        """How the work is done at the moment."""
        return self._engine.plan

    def rounds(
        self, last: int, first: int = 1, score_every: int = 1, plan: Plan | None = None
    ) -> Generator[RoundResult]:
        """Run rounds ``first`` to ``last``, yielding each as it ends.

        Every ``score_every``-th round and the last one are scored; 0 scores the last one only.
        After the last one clients are compared two by two, where there are at most
        ``compare_up_to`` of them.

        Args:
            last: the last round.
            first: the first one, counted from 1.
            score_every: rounds between scores.
            plan: how earlier rounds were done, for these to be done alike.
        """
        few = len(self._engine.clients) <= self._compare_up_to
        if self._options.kind == "flower":
            yield from self._on_flower(last, first, score_every, few)
            return
        with self._engine as engine:
            chooser = Chooser(engine, self._options, last + 1 - first)
            engine.use(chooser.choose() if plan is None else chooser.again(plan))
            for number in range(first, last + 1):
                if number > first and (better := chooser.better()):
                    engine.use(better)
                ends = number == last
                yield engine.round(number, is_due(number, last, score_every), pairs=ends and few)

    def _on_flower(
        self, last: int, first: int, score_every: int, pairs: bool
    ) -> Iterator[RoundResult]:
        from hansa.federation.engines.flower.simulation import simulation  # needs an extra

        workers = self._options.workers
        with self._engine as engine, simulation(engine, workers) as simulated:
            for number in range(first, last + 1):
                due = is_due(number, last, score_every)
                yield simulated.round(number, due, pairs=pairs and number == last)

    def run(self, rounds: int, score_every: int = 1) -> History:
        """Run a number of rounds and return what they measured."""
        return History(tables_of(result) for result in self.rounds(rounds, score_every=score_every))

    def model_of(self, name: str) -> nn.Module:
        """Return the model that a client holds, or with ``root`` the common one.

        Raises:
            InputError: no such node.
        """
        return self._engine.model_of(self._path(name))

    def masks_of(self, name: str) -> Tensors:
        """Return a client's masks by parameter, True where an entry is its own.

        Returns:
            Nothing for a method without masks.

        Raises:
            InputError: no such node.
        """
        path = self._path(name)
        return {} if path == ROOT else self._engine.masks_of(path)

    def state_of(self, name: str) -> State:
        """Return what a node remembers, empty for one that has not taken part yet.

        Raises:
            InputError: no such node.
        """
        return self._engine.state(self._path(name))

    def onboard(self, name: str, client: Client, epochs: int | None = None) -> Newcomer:
        """Let a client that was never part of the federation join it, and score it twice.

        It receives what the method sends to a newcomer, is scored, trains locally, and is scored
        again. The federation itself stays as it is.

        Args:
            name: what the client is called; its random draws depend on it.
            client: what it holds.
            epochs: epochs of its training, by default as many as in a round.

        Raises:
            InputError: a name that is taken, a client without test data, or a deeper tree.
        """
        if name in self._paths:
            raise InputError("name", repr(name), "a name that no client has")
        if self.setup.rules:
            raise InputError("rules", "nodes with rules of their own", "a federation without")
        if self.tree.depth > 1:
            raise InputError("tree", f"depth {self.tree.depth}", "a flat federation")
        if not client.count("test"):
            raise InputError("client", "no test data", "a client with test data")
        check_model(self.setup.task.module, {name: client}, self.setup.task.objective)
        return self._engine.onboard(name, client, epochs or self.setup.training.epochs)

    def _path(self, name: str) -> str:
        if name not in self._paths:
            raise InputError("name", repr(name), f"one of {', '.join(sorted(self._paths))}")
        return self._paths[name]

    def keep_states_in(self, store: Store, rounds: int = 0) -> None:
        """Keep the nodes' states in a store, and go on from those that it holds.

        Args:
            store: the states.
            rounds: the number of rounds they have behind them.
        """
        self._engine.store, self._engine.rounds_done = store, rounds


def is_due(number: int, last: int, score_every: int) -> bool:
    """Tell whether a round is scored."""
    return number == last or (score_every > 0 and number % score_every == 0)


def _check_newcomers(participation: Participation, tree: Tree, rules: Mapping[str, Rules]) -> None:
    """Refuse newcomers where nobody would be there before them, or below inner nodes."""
    if not participation.newcomers:
        return
    if ROOT in rules and rules[ROOT].participation is not None:
        raise InputError("participation.newcomers", "a root with rules of its own", "one of them")
    if tree.depth > 1:
        raise InputError("participation.newcomers", "a tree of federations", "a flat federation")
    if participation.newcomers >= len(tree.children(ROOT)):
        raise InputError(
            "participation.newcomers", participation.newcomers, "fewer than there are clients"
        )


def _pooled(
    clients: Mapping[str, Client], training: Training, rules: Mapping[str, Rules | None]
) -> tuple[dict[str, Client], Training]:
    """Return one client in the place of all, and training of as many steps as all would make."""
    for path, own in rules.items():
        if own is not None and own.privacy is not None:
            name = name_of(path)
            raise InputError(f"nodes.{name}.privacy", "data to be pooled", "no privacy")
    each = {p: training if own is None else own.applied(training) for p, own in rules.items()}
    if any(own.steps is not None for own in each.values()):
        sizes = dict(
            zip(rules, (client.count("train") for client in clients.values()), strict=True)
        )
        steps = sum(own.batches(sizes[path]) for path, own in each.items())
        training = training.model_copy(update={"steps": steps})
    return {"pooled": Client.pooled(clients.values())}, training


def check_private(key: str, method: Method) -> None:
    """Refuse methods whose looks at private data the accountant would not count, or not all.

    It counts one look at each batch, by the step that all methods share.

    Args:
        key: where privacy is asked for.
        method: the node's.

    Raises:
        InputError: such a method.
    """
    kind = type(method)
    plain = all(
        getattr(kind, name) is getattr(Method, name)
        for name in ("stages", "phases", "after", "step", "adapt")
    )
    if not plain or method.scored == "tuned":
        raise InputError(
            key,
            f"method {method.name!r}, whose training is its own",
            "fedavg, fedper, lg-fedavg, local, hierfavg, diloco or worldlm",
        )


def _check_holders(tree: Tree, paths: Mapping[str, str], clients: Mapping[str, Client]) -> None:
    """Refuse leaves without data, and data without a node."""
    leaves = {name for name, path in paths.items() if tree.is_leaf(path)}
    if odd := sorted((leaves - clients.keys()) | (clients.keys() - paths.keys())):
        raise InputError(
            "clients", f"{', '.join(odd[:3])} in one of them only", "the leaves of the tree"
        )


def _check_inner(
    tree: Tree, paths: Mapping[str, str], clients: Mapping[str, Client], method: Method
) -> None:
    """Refuse data of inner nodes with a method that has no use for them."""
    inner = sorted(name for name in clients if not tree.is_leaf(paths[name]))
    if inner and method.inner_training() is None:
        raise InputError(
            f"nodes.{inner[0]}",
            f"data of an inner node with method {method.name!r}",
            "data at the leaves alone, or a method such as 'fedavg' or 'worldlm'",
        )


def check_model(
    model: nn.Module, clients: Mapping[str, Client], objective: Objective = CLASSIFICATION
) -> None:
    """Try the model on the clients' inputs, and their labels against the number of logits."""
    was = model.training
    model.eval()
    pools: dict[int, tuple[str, Client]] = {}
    for name, client in clients.items():
        pools.setdefault(id(client.inputs), (name, client))
    for name, client in pools.values():  # one client for all that share a pool
        try:
            with torch.no_grad():
                shape = model(client.batch("train")[0][:1]).shape
            classes = shape[2 if isinstance(objective, NextToken) else 1]
        except Exception as error:  # a user's module may raise anything
            raise InputError(
                "model", f"{error} on {name}'s data", "a model of its inputs"
            ) from error
        highest, lowest = int(client.labels.max()), int(client.labels.min())
        # Of sequences, tokens may be left out of the loss.
        fits = lowest >= 0 or (lowest == IGNORED and isinstance(objective, NextToken))
        if not fits or highest >= classes:
            raise InputError(
                f"labels of {name}", f"up to {highest}", f"0 to {classes - 1}, one per logit"
            )
    model.train(was)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("model", "no trainable parameters", "some")


def check_batches(model: nn.Module, clients: Mapping[str, Client], size: int) -> None:
    """Refuse batches of one sample for layers that normalise over the batch."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return
    for name, client in clients.items():
        if size == 1 or client.count("train") % size == 1:
            raise InputError(
                "training.batch_size",
                f"{size}, which leaves {name} with a batch of one of its "
                f"{client.count('train')} samples under BatchNorm",
                "a size that leaves no single sample, or a model with GroupNorm",
            )
