"""A federation's server: the rounds of the root, or those that the federation above asks for."""

import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hansa.config import RunConfig
from hansa.deploy.charter import Charter
from hansa.deploy.holding import Holding
from hansa.deploy.mailbox import Mailbox
from hansa.deploy.party import Server, tell
from hansa.errors import InputError
from hansa.federation.aggregation import add_metrics
from hansa.federation.engines.engine import RoundResult, trained, with_trained
from hansa.federation.engines.flower.grid import Grid, GridPost
from hansa.federation.engines.flower.remote import RemoteEngine
from hansa.federation.engines.flower.site import Site, largest
from hansa.federation.engines.plan import Plan
from hansa.federation.federation import is_due
from hansa.federation.leaf import DivergedError, Metrics, Scores
from hansa.federation.message import Message
from hansa.federation.store import Store
from hansa.federation.tree import ROOT, name_of
from hansa.runs import BusyError, Run
from hansa.training import diverged, fixed_difference, write_bundle

_log = logging.getLogger("hansa.deploy")
_PAUSE = 0.5  # seconds between looks for members


def serve(
    charter: Charter,
    server: Server,
    folder: Path,
    grid: Grid,
    keys: Mapping[bytes, str] | None,
    holding: Holding | None = None,
) -> None:
    """Run a federation's server until its run is over.

    The root's rounds come from its configuration, those of every other federation from the one
    above, through a mailbox. Called again after an interruption, it goes on where it was.

    Args:
        charter: what the federation's members share.
        server: how long it waits.
        folder: of the party whose server it is.
        grid: Flower's.
        keys: public key -> the member that it belongs to; None where nodes have none.
        holding: what the party holds beside; nothing by default.

    Raises:
        InputError: members that do not connect, a loss that is no number, a run of another
            configuration.
    """
    torch.set_num_threads(1)
    config = charter.config.model_copy(update={"output": str(folder / "runs")})
    run, is_new = open_run(config)
    facts: dict[str, Any] = {
        "run": str(run.checkpoint.get("run") or secrets.token_hex(8)),
        "data": "held by the parties",
        "bundle": "none",
        "clients": len(charter.children),
        "classes": list(charter.classes),
    }
    try:
        with run.claimed(config, facts):
            post = _Server(charter, server, folder, grid, keys, run, holding)
            if charter.path == ROOT:
                post.lead(is_new)
            else:
                post.follow(is_new)
    except BusyError:
        _log.warning("the run is under way already")


class _Server:
    """A federation's server, its run and its members."""

    def __init__(
        self,
        charter: Charter,
        server: Server,
        folder: Path,
        grid: Grid,
        keys: Mapping[bytes, str] | None,
        run: Run,
        holding: Holding | None,
    ) -> None:
        self.charter, self.folder, self.server = charter, folder, server
        self.run, config = run, run.config
        token = str(run.checkpoint["run"])
        deadline = server.deadline
        self.post = GridPost(grid, token, charter.children, deadline, keys)
        self.engine = RemoteEngine(
            self.post,
            token,
            charter.tree,
            {},
            config.method,
            holding.setup(charter) if holding else charter.setup,
            config.seed,
            config.participation,
            config.on_failure,
            charter.path,
            deadline,
        )
        self.engine.store = self.run.store()
        if holding is not None and holding.text is not None:
            self.engine.data = {charter.path: holding.client(charter)}

    def meet(self, is_new: bool) -> None:
        """Wait for the members: for all of them before the first round.

        Args:
            is_new: whether this is the run's start. Later on members may be at work still on what
                was asked of them before, and the run can do without some.

        Raises:
            InputError: some did not connect at the start.
        """
        children = self.charter.children
        until = time.monotonic() + (self.server.wait if is_new else self.server.deadline)
        while missing := sorted(set(children) - set(self.post.present(children))):
            names = ", ".join(name_of(path) for path in missing)
            why = "".join(f"; {text}" for text in sorted(set(self.post.objections.values())))
            self._tell("waiting", f"for {names}{why}")
            if time.monotonic() > until:
                if is_new:
                    found = f"nothing of {names} after {self.server.wait:g} s{why}"
                    raise InputError("members", found, "all of them connected at the start")
                _log.warning("going on without %s", names)
                break
            time.sleep(_PAUSE)
        samples = {p: int(f.get("samples", 0)) for p, f in self.post.facts.items()}
        own = {path: client.count("train") for path, client in self.engine.data.items()}
        self.engine.samples = samples | own

    def lead(self, is_new: bool) -> None:
        """Run the rounds of the configuration, and keep the common model."""
        config, run = self.run.config, self.run
        if run.round < config.rounds:
            self.meet(is_new)
        for number in range(run.round + 1, config.rounds + 1):
            self._somebody()
            self._tell("running", f"round {number} of {config.rounds}")
            try:
                due = is_due(number, config.rounds, config.score_every)
                result = self.engine.round(number, due)
            except DivergedError as error:
                raise diverged(config, error) from error
            run.record(result, Plan())
        if not (run.path / "summary.json").exists():
            self._finish()
        self.engine.end(self._federations)
        self._tell("finished", f"after {run.round} rounds: {run.path}")

    def follow(self, is_new: bool) -> None:
        """Answer what the federation above asks, until it says that the run is over."""
        self.meet(is_new)
        mailbox = Mailbox(self.folder / "mailbox")
        worker = FederationWorker(self.engine, self.run, self._federations)
        most = largest(self.engine.setup.task)
        site = Site(self.charter.path, self.folder / "state", worker, max_bytes=most)
        self._tell("running", "nothing asked of it yet")
        for request in mailbox.requests():
            if request is None:
                continue
            if request.kind in ("train", "score"):
                self._tell("running", f"{request.kind} of round {request.round}")
            self.engine.run = request.run
            answer = site.answer(request)
            if request.kind == "end":  # done before it is said, or a kill would leave it undone
                self.run.finish(None)
                self._tell("finished", f"after {self.run.round} rounds: {self.run.path}")
            mailbox.reply(request, answer)
            if request.kind == "end":
                break

    def _finish(self) -> None:
        config, charter, run = self.run.config, self.charter, self.run
        common = None
        if config.method.common:
            scored = "aggregated" if config.text else config.method.scored
            metrics = {"scored": scored, **run.history.summary()["metrics"]}
            common = write_bundle(
                run.path / "bundle",
                "train",
                self.engine.common().state_dict(),
                metrics,
                config=config,
                architecture=charter.architecture,
                data=str(run.checkpoint["data"]),
                tokenizer=charter.tokens.as_json() if config.text else "",
                privacy=run.privacy(drawn="secret"),
                labels=charter.classes,
            )
        run.finish(common)

    @property
    def _federations(self) -> list[str]:
        clients = self.charter.clients
        return [path for path in self.charter.children if path not in clients]

    def _somebody(self) -> None:
        """Wait until a member is connected; a federation outlives an outage of all of them."""
        while not self.post.present(self.charter.children):
            self._tell("waiting", "for any of its members")
            time.sleep(_PAUSE)

    def _tell(self, state: str, what: str) -> None:
        about = {"state": state, "what": what, "round": self.run.round, "pid": os.getpid()}
        tell(self.folder, "run", **about)


class FederationWorker:
    """Runs one round of a federation for each that the federation above asks for.

    Args:
        engine: of the federation.
        run: where its own tables are kept.
        federations: those of its members that are federations.
    """

    samples = 0

    def __init__(self, engine: RemoteEngine, run: Run, federations: Sequence[str]) -> None:
        self._engine, self._run, self._federations = engine, run, federations
        self._last: RoundResult | None = None

    def train(self, number: int, store: Store, down: Message) -> tuple[Message, Metrics]:
        """Run a round below, and return what the federation makes of it."""
        engine, path = self._engine, self._engine.top
        engine.store = store
        self._last = engine.round(number, score=False, down=down)
        self._run.record(self._last, Plan())
        metrics: Metrics = {}
        for visit in self._last.visits:  # those of its own training, and scores of all below it
            add_metrics(metrics, visit.metrics if visit.path == path else trained(visit.metrics))
        return engine.method.reply(engine.node(path, number), engine.state(path)), metrics

    def score(self, number: int, store: Store, down: Message) -> Scores:
        """Return the sums of the members' scores; each one's own stand in the federation's run."""
        engine = self._engine
        engine.store = store
        node = engine.node(engine.top, number)
        found = dict(engine.score(node, engine.method.held(node, store.get(node.path), down)))
        if self._last is not None and self._last.number == number:
            whole = with_trained(found, self._last.visits)
            self._run.record(replace(self._last, scores=whole), Plan())
        total: Scores = {}
        for scores in found.values():
            for split, metrics in scores.items():
                add_metrics(total.setdefault(split, {}), metrics)
        return total

    def end(self) -> None:
        """Tell the federations below; a client has nothing to end."""
        self._engine.end(self._federations)


def open_run(wanted: RunConfig) -> tuple[Run, bool]:
    """Return the run of a configuration, and whether it is a new one.

    Raises:
        InputError: the run that is there is of another configuration.
    """
    if not (wanted.folder / "config.toml").exists():
        return Run.create(wanted), True
    run = Run(wanted.folder)
    # A party's folder may have been moved.
    if keys := [key for key in fixed_difference(run.config, wanted) if key != "output"]:
        raise InputError(
            keys[0], f"another value than that of {run.path}", "the same, or another `name`"
        )
    return run, False
