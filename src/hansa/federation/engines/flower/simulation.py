"""Flower's simulation: the nodes are tasks of Ray on this machine.

It is here to show that a federation runs on Flower as it does on the local engine, which is far
faster. The nodes find their data in files that this process writes; their states lie below the
same folder, and after each round a copy of them is taken into the run's store.
"""

import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid
from flwr.simulation import run_simulation

from hansa.data.clients import Client
from hansa.errors import InputError, first_line
from hansa.federation.engines.engine import Visit
from hansa.federation.engines.flower.apps import Answering, client_app, server_app
from hansa.federation.engines.flower.grid import GridPost
from hansa.federation.engines.flower.remote import RemoteEngine
from hansa.federation.engines.flower.site import LeafWorker, Site
from hansa.federation.engines.local import LocalEngine
from hansa.federation.engines.workers import check_sendable
from hansa.federation.leaf import Leaf
from hansa.federation.message import State
from hansa.federation.node import Node
from hansa.federation.store import DiskStore
from hansa.files import write_atomic

RUN = "simulation"
_START = 300.0  # seconds that Ray and the nodes have to start


class SimulatedEngine(RemoteEngine):
    """Runs a federation on Flower's simulation, in the place of a local engine.

    Args:
        local: what would run it here; it holds tree, clients, method, and the store.
        grid: Flower's.
        folder: where the nodes' states lie meanwhile.
    """

    def __init__(self, local: LocalEngine, grid: Grid, folder: Path) -> None:
        leaves = list(local.tree.leaves())
        post = GridPost(grid, RUN, leaves, name="Flower, simulated")
        super().__init__(
            post,
            RUN,
            local.tree,
            local.samples,
            local.method,
            local.setup,
            local.seed,
            local.participation,
            local.on_failure,
        )
        self._local, self._folder, self.store = local, folder, local.store
        self.data = local.data
        post.wait(leaves, _START)

    def visit(self, node: Node, state: State, visits: list[Visit]) -> State:
        """Run a round, and take a copy of what it left at the clients."""
        state = super().visit(node, state, visits)
        for visit in visits:
            if visit.fate == "ok" and self.tree.is_leaf(visit.path):
                left = DiskStore(_states(self._folder, visit.path), node.round).get(visit.path)
                if left:
                    self.store.put(visit.path, left)
        return state

    def pairs(self) -> Iterator[tuple[str, str, str, float, float]]:
        """Yield how clients compare, two by two."""
        self._local.rounds_done = self.rounds_done
        return self._local.pairs()


def _states(folder: Path, path: str) -> Path:
    return folder / path / RUN / "states"


@contextmanager
def simulation(local: LocalEngine, workers: int = 0) -> Iterator[SimulatedEngine]:
    """Yield a federation on Flower's simulation, which ends with the block.

    Args:
        local: the federation.
        workers: processes that train clients; 0 starts one per core.

    Raises:
        InputError: the model cannot be sent to another process, or the simulation did not start.
    """
    clients = {path: local.clients[path] for path in local.tree.leaves()}
    check_sendable(local.leaf, len(clients))
    with tempfile.TemporaryDirectory(prefix="hansa-flower-") as name:
        folder = Path(name)
        for path in clients:
            if state := local.state(path):
                _put(_states(folder, path), path, state)
        for number, client in enumerate(clients.values()):
            client.save(folder / f"{number}.safetensors")
        with _grid(_Nodes(folder, local.leaf, list(clients)), len(clients), workers) as grid:
            yield SimulatedEngine(local, grid, folder)


def _put(folder: Path, path: str, state: State) -> None:
    """Give a node the state it has, in whichever round it came by it."""
    store = DiskStore(folder, writes=0)
    store.put(path, state)
    store.commit(0)
    write_atomic(folder.parent / "known", "0")


@contextmanager
def _grid(nodes: "_Nodes", num: int, workers: int) -> Iterator[Grid]:
    """Yield the Grid of a simulation that runs in a thread until the block ends."""
    came: Queue[Grid | BaseException] = Queue()
    over = threading.Event()

    def serve(grid: Grid) -> None:
        came.put(grid)
        over.wait()

    def run() -> None:
        try:
            cores = min(num, workers or os.cpu_count() or 1)
            options: Any = {
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {
                    "num_cpus": cores,
                    "include_dashboard": False,
                    "logging_level": logging.ERROR,
                    "log_to_driver": False,
                },
            }
            run_simulation(server_app(serve), client_app(nodes), num, backend_config=options)
        except BaseException as error:  # it must reach the thread that waits
            came.put(error)

    thread = threading.Thread(target=run, name="flower-simulation")
    flower = logging.getLogger("flwr")
    level = flower.level
    flower.setLevel(logging.ERROR)  # it calls its only way to do this in Python deprecated
    thread.start()
    try:
        grid = came.get(timeout=_START)
        if isinstance(grid, BaseException):
            raise InputError("Flower", first_line(Exception(grid)), "a simulation that starts")
        yield grid
    except Empty as error:
        found = f"no simulation after {_START:g} s"
        raise InputError("Flower", found, "one that starts") from error
    finally:
        over.set()
        thread.join()
        flower.setLevel(level)


class _Nodes:
    """Finds the site of a simulated node: the nodes are the leaves, in path order."""

    def __init__(self, folder: Path, leaf: Leaf, paths: list[str]) -> None:
        self._folder, self._leaf, self._paths = folder, leaf, paths

    def __call__(self, context: Context) -> Answering:
        torch.set_num_threads(1)
        number = int(context.node_config["partition-id"])
        path, client = self._paths[number], _client(self._folder / f"{number}.safetensors")
        return Site(path, self._folder / path, LeafWorker(path, client, self._leaf)).answer


@cache
def _client(path: Path) -> Client:
    """Return what this process has read once."""
    return Client.load(path)
