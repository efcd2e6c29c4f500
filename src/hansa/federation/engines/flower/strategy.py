"""Hansa's methods for people who write Flower apps of their own: a strategy, and a client's app."""

import logging
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from hansa.data.clients import Client
from hansa.errors import InputError
from hansa.federation.aggregation import add_metrics
from hansa.federation.engines.engine import Visit
from hansa.federation.engines.flower.apps import Answering, client_app
from hansa.federation.engines.flower.exchange import Answer, LostError, Request, Ticket
from hansa.federation.engines.flower.grid import GridPost, answer_in, message_of
from hansa.federation.engines.flower.remote import RemoteEngine
from hansa.federation.engines.flower.site import LeafWorker, Site, largest
from hansa.federation.federation import check_batches, check_model
from hansa.federation.leaf import Leaf, Metrics
from hansa.federation.methods.base import Method
from hansa.federation.node import Buffers, Setup
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.robust import Robust
from hansa.federation.tree import ROOT, Tree, name_of
from hansa.models.task import Task

_log = logging.getLogger("hansa.flower")
_PAUSE = 0.5  # seconds between looks for nodes


class HansaStrategy(Strategy):
    """A method of Hansa's as a strategy of Flower's.

    Flower's loop hands over the common model each round; what a method keeps beside it (masks,
    control variates) stays in here.

    Args:
        method: the federated algorithm.
        task: the model; its parameters are the initial values, here and at every client.
        training: optimizer and local work, the same as in ``client_app``.
        seed: everything random in the run is derived from it.
        participation: who is asked in a round; nothing in it is simulated.
        buffers: what becomes of running statistics.
        min_nodes: nodes that must be connected before the first round.
        wait: seconds they have to connect.
        robust: the rule by which replies are merged; the weighted mean where it is not set.
    """

    def __init__(
        self,
        method: Method,
        task: Task,
        training: Training | None = None,
        *,
        seed: int = 0,
        participation: Participation | None = None,
        buffers: Buffers = "averaged",
        min_nodes: int = 2,
        wait: float = 120.0,
        robust: Robust | None = None,
    ) -> None:
        self.method, self.task = method, task
        training = training or Training()
        adapted = method.adapted(task, training)
        self.setup = Setup(adapted, training, buffers, seed, robust=robust)
        method.check(self.setup, 1)
        if robust is not None:
            asked = (participation or Participation()).choose(
                [str(k) for k in range(min_nodes)], 0, ROOT, 1
            )
            robust.check(len(asked), ROOT)
        self._participation, self._min_nodes, self._wait = participation, min_nodes, wait
        self._engine: RemoteEngine | None = None

    def initial_arrays(self) -> ArrayRecord:
        """Return the model that the federation starts from."""
        return ArrayRecord(dict(self.task.module.state_dict()))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[FlowerMessage]:
        """Return what the chosen clients are sent.

        Raises:
            InputError: too few nodes, or arrays that are not the task's model.
        """
        if self._engine is None:
            self._check(arrays)
            self._engine = self._meet(grid)
        engine = self._engine
        self._post.begin()
        engine.rounds_done = server_round
        self._sent = engine.send(engine.node(ROOT, server_round), engine.state())
        return self._post.outbox

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the replies; return the common model and the means of the training metrics.

        Raises:
            DivergedError: a client's loss is no number.
        """
        engine = self._of()
        self._post.collect(replies)
        visits: list[Visit] = []
        engine.take(self._sent, visits)
        engine.store.commit(server_round)
        total: Metrics = {}
        for visit in visits:
            add_metrics(total, visit.metrics)
        sums = {name: value / count for name, (value, count) in total.items() if count}
        sums |= {"bytes_up": float(sum(visit.up for visit in visits))}
        sums |= {"bytes_down": float(sum(visit.down for visit in visits))}
        return ArrayRecord(dict(engine.common().state_dict())), MetricRecord(dict(sums))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[FlowerMessage]:
        """Return what all clients are sent to be scored."""
        engine = self._of()
        self._post.begin()
        self._scores = engine.send_scores(engine.node(ROOT, server_round), engine.state())
        return self._post.outbox

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> MetricRecord | None:
        """Return the mean over clients of each metric, as ``SPLIT/METRIC``."""
        self._post.collect(replies)
        values: dict[str, list[float]] = {}
        for _, scores in self._of().take_scores(self._scores):
            for split, metrics in scores.items():
                for name, (value, count) in metrics.items():
                    if count:
                        values.setdefault(f"{split}/{name}", []).append(value / count)
        means = {name: sum(each) / len(each) for name, each in values.items()}
        return MetricRecord(dict(means)) if means else None

    def summary(self) -> None:
        """Say which method it is."""
        _log.info("method %s, %s", self.method.name, self.method)

    def _of(self) -> RemoteEngine:
        if self._engine is None:
            raise InputError("strategy", "no round trained yet", "training before evaluation")
        return self._engine

    def _check(self, arrays: ArrayRecord) -> None:
        """Refuse initial arrays that are not the model that clients start from."""
        given, mine = arrays.to_torch_state_dict(), self.task.module.state_dict()
        odd = sorted(given.keys() ^ mine.keys())
        odd = odd or [name for name, value in mine.items() if not torch.equal(given[name], value)]
        if odd:
            raise InputError(
                "initial_arrays", f"another {odd[0]} than the task's", "strategy.initial_arrays()"
            )

    def _meet(self, grid: Grid) -> RemoteEngine:
        """Wait for the nodes, and return the engine of the federation that they are."""
        self._post = _Outbox(grid, secrets.token_hex(8))
        until = time.monotonic() + self._wait
        while len(paths := self._post.everybody()) < self._min_nodes:
            if time.monotonic() > until:
                found = f"{len(paths)} nodes after {self._wait:g} s"
                raise InputError("min_nodes", found, f"at least {self._min_nodes}")
            time.sleep(_PAUSE)
        samples = {path: int(self._post.facts[path].get("samples", 0)) for path in paths}
        return RemoteEngine(
            self._post,
            self._post.run,
            Tree.flat(name_of(path) for path in paths),
            samples,
            self.method,
            self.setup,
            self.setup.seed,
            self._participation,
        )


class _Outbox(GridPost):
    """Leaves the sending to Flower's loop, and finds the answers among its replies."""

    def __init__(self, grid: Grid, run: str) -> None:
        super().__init__(grid, run, None)
        self.outbox: list[FlowerMessage] = []
        self._answers: dict[Ticket, Answer | LostError] = {}

    def begin(self) -> None:
        """Empty the box."""
        self.outbox, self._answers = [], {}

    def send(self, request: Request) -> Ticket:
        """Put a request into the box.

        Raises:
            LostError: the child is not connected.
        """
        self.outbox.append(message_of(request, self.node_of(request.path)))
        return request.path

    def collect(self, replies: Iterable[FlowerMessage]) -> None:
        """Take Flower's replies in."""
        for reply in replies:
            path = self.path_of(reply.metadata.src_node_id)
            try:
                self._answers[path] = answer_in(reply)
            except LostError as error:
                self._answers[path] = error

    def take(self, ticket: Ticket, until: float) -> Answer:
        """Return an answer that has come.

        Raises:
            LostError: none has, or it is of no use.
        """
        answer = self._answers.get(ticket, LostError("late", "no answer by the deadline"))
        if isinstance(answer, LostError):
            raise answer
        return answer


def node_app(
    method: Method,
    task: Task,
    data: Callable[[Context], Client],
    training: Training | None = None,
    *,
    seed: int = 0,
    buffers: Buffers = "averaged",
) -> ClientApp:
    """Return a ``ClientApp`` that trains and scores a client by a method of Hansa's.

    What the client keeps between rounds lies on the node's own disk: in the folder that the
    node's configuration names as ``state`` (``hansa-state`` where it names none), under the name
    it gives as ``name`` (``client-K`` for partition K).

    Args:
        method: the same as in ``strategy``.
        task: the same model, with the same initial values, as in ``strategy``.
        data: called with Flower's context, returns what the client holds.
        training: the same as in ``strategy``.
        seed: the same as in ``strategy``.
        buffers: the same as in ``strategy``.
    """
    training = training or Training()
    setup = Setup(method.adapted(task, training), training, buffers, seed)
    leaf = Leaf(method, setup, seed)

    def site(context: Context) -> Answering:
        path, client, folder = place_of(context, data, task, training.batch_size)
        worker, most = LeafWorker(path, client, leaf), largest(setup.task)
        return Site(path, folder, worker, max_bytes=most).answer

    return client_app(site)


def place_of(
    context: Context, data: Callable[[Context], Client], task: Task, batch_size: int
) -> tuple[str, Client, Path]:
    """Return a client's path, what it holds, and where its states lie, by its node's configuration.

    The process is held to one thread of PyTorch from here on.

    Raises:
        InputError: data that the model cannot be trained on.
    """
    torch.set_num_threads(1)
    config = context.node_config
    name = str(config.get("name", f"client-{config.get('partition-id', 0)}"))
    client = data(context)
    check_model(task.module, {name: client})
    check_batches(task.module, {name: client}, batch_size)
    return f"{ROOT}/{name}", client, Path(str(config.get("state", "hansa-state"))) / name
