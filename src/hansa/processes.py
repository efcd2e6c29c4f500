"""Pools of processes that leave nothing behind, however the main process ends."""

import multiprocessing
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

SMALL = 2**22
"""Parameters from which on one product of a model keeps several threads busy."""


@contextmanager
def pool(
    num: int, start: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool whose processes have one thread of PyTorch each and end with this process.

    Processes are spawned, not forked: a fork of a process whose PyTorch has started threads may
    hang. When the block ends by an exception, Ctrl-C included, they are ended at once.

    Args:
        num: number of processes.
        start: called with ``arguments`` at the start of each.
        *arguments: what can be pickled.
    """
    executor = ProcessPoolExecutor(
        num,
        mp_context=torch.multiprocessing.get_context("spawn"),
        initializer=_enter,
        initargs=(start, arguments),
    )
    try:
        yield executor
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _enter(start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what Ctrl-C means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    if start is not None:
        start(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextmanager
def threads(num: int) -> Iterator[None]:
    """Hold PyTorch to so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold PyTorch to one thread, on whose number the rounding of a sum may depend."""
    with threads(1):
        yield


def threads_for(parameters: int) -> AbstractContextManager[None]:
    """Hold PyTorch to one thread for a small model, whose threads would only wait for each other.

    Args:
        parameters: of the model; from ``SMALL`` on nothing is changed.
    """
    return one_thread() if parameters < SMALL else nullcontext()


def processor() -> str:
    """Return the kind of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), "")
