"""Which plan is fastest for a federation: found by a short timed trial, and remembered.

A trial runs two rounds of a small federation, made of the first clients with a few batches each,
by every plan that comes into question. What it finds is kept in the user's cache by method, model,
batch and machine. A compiled step is made in the background; once it is there a trial tells whether
the run changes over to it.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from hansa.errors import InputError
from hansa.federation.compiled import Programs, has_compiler
from hansa.federation.engines.local import LocalEngine
from hansa.federation.engines.plan import EngineOptions, Plan
from hansa.federation.engines.workers import check_sendable
from hansa.federation.stack import try_out
from hansa.federation.tree import Tree, name_of
from hansa.files import cache_folder, write_atomic

SHORT = 500
"""Local steps of a run below which clients are trained one by one without any trial."""
STACKS = (2, 5, 10, 20, 50, 100)
WORTH_TRYING = 5.0
"""Seconds of training from which on other plans are tried."""
TRIED = 4
"""Batches of a client in a trial."""
WORTH_WORKERS = 60.0
"""Seconds of training from which on other processes are worth their start."""
WORTH_COMPILING = 60.0
"""Seconds of training from which on a compiled step is worth making."""
POLL = 2.0
"""Seconds between looks whether a compiled step is there."""

_log = logging.getLogger("hansa.engine")


class Chooser:
    """Chooses plans for one engine.

    Args:
        engine: the engine, before its first round.
        options: what the user asked for.
        rounds: rounds that lie ahead.
    """

    def __init__(self, engine: LocalEngine, options: EngineOptions, rounds: int) -> None:
        self._engine, self._options, self._rounds = engine, options, rounds
        self._clients = engine.clients
        leaves = list(engine.tree.leaves())
        fraction = engine.participation.fraction
        self._asked = max(1, round(len(leaves) * fraction))
        # Leaves are stacked with those below the same node.
        nodes = Counter(path.rpartition("/")[0] for path in leaves)
        self._cohort = max(1, round(max(nodes.values()) * fraction))
        self._first = leaves[: min(len(leaves), max(STACKS))]
        self._compiling: tuple[LocalEngine, Programs] | None = None
        self._best = float("inf")
        self._looked = 0.0
        self._stackable: Plan | None = None
        self.plan = Plan()

    def choose(self) -> Plan:
        """Return the plan to begin with, and say why."""
        options, short = self._options, self._steps() < SHORT
        if self._engine.setup.uneven:
            why = "nodes train by rules of their own"
            if options.kind not in ("auto", "sequential") or not self._is_exact:
                _log.warning("clients are trained one by one on the CPU: %s", why)
            return self._say(self._alone(), why)
        if self._is_exact and short and options.kind in ("auto", "sequential"):
            return self._say(Plan(workers=self._workers(0.0)), "a short run")
        if options.kind == "sequential":
            return self._say(self._alone(), "as configured")
        if options.kind == "auto" and self._is_exact:
            method = self._engine.method
            if why := method.one_by_one(self._engine.setup):
                return self._say(self._alone(), why)
        plan, failure = self._fitting()
        if failure:
            _log.warning("clients are trained one by one: %s", failure)
            return self._say(self._alone(), "what fits the model")
        if options.kind == "auto" and self._is_exact and self._most(1, plan) == 1:
            return self._say(self._alone(), "no two clients to stack")
        self._stackable = plan
        if options.kind == "compiled" and has_compiler():
            workers = self._alone().workers
            size = self._compiled_size(workers, plan)
            return self._say(
                replace(plan, kind="compiled", stack=size, workers=workers), "as configured"
            )
        if options.kind == "compiled":
            _log.warning("there is no C++ compiler, so that steps are not compiled")
        plan, why = self._sized_plan(plan)
        return self._say(replace(plan, workers=self._workers(self._best * self._steps())), why)

    def _alone(self) -> Plan:
        """Return the plan of single clients."""
        known = self._options.workers or self._steps() < SHORT
        return Plan(workers=self._workers(0.0 if known else self._time(Plan()) * self._steps()))

    def _sized_plan(self, plan: Plan) -> tuple[Plan, str]:
        """Return a plan with the size of its stacks, and why it is that."""
        if self._options.stack is not None:
            plan = replace(plan, stack=self._options.stack)
            self._best = self._time(plan)
            return plan, "as configured"
        if known := self._recall():
            self._best = known["seconds"]
            return self._of_size(plan, int(known["stack"])), "as in a trial before"
        return self._tried(plan)

    def again(self, plan: Plan) -> Plan:
        """Return a plan that was chosen before, with the processes that are asked for now."""
        self._options = self._options.model_copy(update={"kind": plan.kind})
        workers = self._options.workers or plan.workers
        return self._say(replace(plan, workers=workers), "as the run began")

    def better(self) -> Plan | None:
        """Return a compiled plan once there is one that is faster, between two rounds."""
        if self._options.kind != "auto" or self._stackable is None or not has_compiler():
            return None
        if self._best * self._steps() < WORTH_COMPILING or not self._on_cpu:
            return None
        if self._compiling is None:
            self._compiling = self._begin_compiling(self._stackable)
        engine, programs = self._compiling
        if time.monotonic() - self._looked < POLL or not programs.arrived():
            return None
        self._looked = time.monotonic()
        seconds = _timed(engine)
        if programs.pending:
            return None  # one step led to another
        self._options = self._options.model_copy(update={"kind": "stacked"})  # this was all
        if seconds > 0.95 * self._best:
            _log.info("the compiled step is no faster")
            return None
        why = f"{self._best / seconds:.1f} times as fast as {self.plan}"
        self._best = seconds
        return self._say(replace(engine.plan, workers=self.plan.workers), why)

    def _begin_compiling(self, plan: Plan) -> tuple[LocalEngine, Programs]:
        size = self._compiled_size(self.plan.workers, plan)
        engine = self._small(replace(plan, kind="compiled", stack=size, wait=False), size)
        _timed(engine)
        assert engine.stack.programs is not None  # noqa: S101
        return engine, engine.stack.programs

    def _compiled_size(self, processes: int, plan: Plan) -> int:
        # Activations of few clients fit a core's cache, and a compiled step has little overhead.
        return self._options.stack or max(2, min(5, self._most(processes, plan)))

    def _most(self, processes: int, plan: Plan) -> int:
        """Return the most clients per stack that leave every process something to do."""
        most = -(-self._cohort // processes)
        if not plan.pads:  # only clients of equal size are stacked
            sizes = Counter(self._clients[path].count("train") for path in self._first)
            most = min(most, max(sizes.values()))
        return min(len(self._first), most)

    def _say(self, plan: Plan, why: str) -> Plan:
        self.plan = plan
        _log.info("engine: %s (%s)", plan, why)
        return plan

    def _steps(self) -> float:
        """Return the local steps that lie ahead."""
        engine = self._engine
        few = [self._clients[path] for path in self._first]
        training = engine.setup.training
        batches = sum(training.batches(client.count("train")) for client in few) / len(few)
        return self._rounds * self._asked * batches * engine.method.passes(engine.setup)

    def _workers(self, seconds: float) -> int:
        """Return the number of processes for so many seconds of training."""
        if self._options.workers:
            return self._options.workers
        if seconds < WORTH_WORKERS or not _may_start_processes():
            return 1
        num = min(_cores(), self._cohort)
        try:
            check_sendable(self._engine.leaf, num)
        except InputError:
            return 1
        return num

    def _fitting(self) -> tuple[Plan, str]:
        """Return a plan that says what may be stacked, and why nothing may, if so."""
        options = self._options
        plan = Plan("stacked", 2, device=options.device, precision=options.precision)
        small = self._small(plan, 2)
        return try_out(small.leaf, small.jobs(1), plan)

    def _tried(self, plan: Plan) -> tuple[Plan, str]:
        """Return the fastest plan by a trial of growing stacks, and what it showed."""
        found: dict[int, float] = {}
        if self._is_exact and self._options.kind == "auto":
            found[1] = self._best = self._time(Plan())
            if found[1] * self._steps() < WORTH_TRYING:
                return Plan(), f"about {found[1] * self._steps():.1f} seconds of training"
        processes = self._workers(found.get(1, 0.0) * self._steps())
        limit = self._options.stack_memory_mb * 2**20 / processes
        before, start = _peak(plan.device), time.monotonic()
        budget = max(2.0, 0.03 * found.get(1, 0.0) * self._steps())
        for size in sorted({max(2, min(size, self._most(processes, plan))) for size in STACKS}):
            found[size] = self._time(replace(plan, stack=size))
            # A stack of two bears the overhead of many, so that it says little about larger ones.
            worse = self._on_cpu and size >= 10 and found[size] > 1.3 * min(found.values())
            # The next size takes two or three times as much.
            full = 3 * (_peak(plan.device) - before) > limit
            if worse or full or time.monotonic() - start > budget:
                break
        best = min(found, key=lambda size: found[size])
        self._best = found[best]
        write_atomic(self._place(), json.dumps({"stack": best, "seconds": self._best}) + "\n")
        told = ", ".join(f"{size}: {1e3 * found[size]:.2f}" for size in found)
        return self._of_size(plan, best), f"trial, ms per step by clients per stack: {told}"

    @property
    def _is_exact(self) -> bool:
        """Whether single clients are computed as they were asked for."""
        return self._on_cpu and self._options.precision == "float32"

    @property
    def _on_cpu(self) -> bool:
        return torch.device(self._options.device).type == "cpu"

    def _of_size(self, plan: Plan, size: int) -> Plan:
        return replace(plan, stack=size) if size > 1 else Plan()

    def _time(self, plan: Plan) -> float:
        """Return the seconds per local step of one client, by a plan."""
        return _timed(self._small(plan, plan.stack if plan.stack > 1 else 2))

    def _small(self, plan: Plan, num: int) -> LocalEngine:
        """Return an engine over the first clients, with a few batches each."""
        engine = self._engine
        training = engine.setup.training.model_copy(update={"epochs": 1, "steps": None})
        clients = {}
        for k in range(num):  # as many as asked for, even where there are fewer
            client = self._clients[self._first[k % len(self._first)]]
            most = {s: index[: TRIED * training.batch_size] for s, index in client.splits.items()}
            clients[f"c{k:03}"] = replace(client, splits=most)
        tree = Tree.flat(clients)
        small = LocalEngine(
            tree,
            {path: clients[name_of(path)] for path in tree.leaves()},
            engine.method,
            replace(engine.setup, training=training),
            engine.seed,
            on_failure="drop",
            plan=replace(plan, workers=1),
        )
        small.use(small.plan)
        return small

    def _recall(self) -> dict[str, float] | None:
        """Return what an earlier trial found for such a federation on this machine."""
        try:
            known = json.loads(self._place().read_text())
            return {"stack": max(1, int(known["stack"])), "seconds": float(known["seconds"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _place(self) -> Path:
        engine, options = self._engine, self._options
        setup = engine.setup
        about = (
            engine.method.model_dump_json(),
            engine.method.name,
            repr(setup.task.module),
            [(n, tuple(p.shape), str(p.dtype)) for n, p in setup.task.params.items()],
            setup.training.model_dump_json(exclude={"epochs", "lr", "steps"}),
            tuple(self._clients[self._first[0]].inputs.shape[1:]),
            self._cohort,
            options.model_dump_json(),
            (torch.__version__, platform.machine(), platform.node(), os.cpu_count()),
        )
        name = hashlib.sha256(repr(about).encode()).hexdigest()[:32]
        return cache_folder("choices") / f"{name}.json"


def _timed(engine: LocalEngine) -> float:
    """Return the seconds per local step of one client, after a round that warms up."""
    training, passes = engine.setup.training, engine.method.passes(engine.setup)
    counts = [client.count("train") for client in engine.clients.values()]
    steps = passes * sum(training.batches(count) for count in counts)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        engine.round(engine.rounds_done + 1, score=False)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / steps


def _may_start_processes() -> bool:
    """Tell whether processes can be started without being asked for.

    They run the main script again, which must be guarded against starting all over.
    """
    if multiprocessing.parent_process() is not None:
        return False
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    try:
        # A notebook has no script; classes that it defines are not found in another process.
        return script is not None and "__main__" in Path(script).read_text()
    except (OSError, UnicodeDecodeError):
        return False


def _peak(device: str) -> int:
    """Return the most bytes that were held so far."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
