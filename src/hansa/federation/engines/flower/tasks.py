"""What runs a member's app for each message: ``python -m hansa.federation.engines.flower.tasks``.

Flower's own program for this starts Python anew for every message, which costs two seconds of a
core before the app is called. This one has imported what such a process needs, and forks.
"""

import os
import signal
import sys
import time
from contextlib import suppress

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import run_clientapp

from hansa.federation.engines.flower import apps as apps  # imported for the forks

_PAUSE = 0.4  # seconds between looks for a task


def run_tasks(address: str) -> None:
    """Run each task of a SuperNode in a process of its own, until this one is ended.

    Args:
        address: ``host:port`` of the SuperNode's Runtime API, on this machine. It may come later
            than this, and go, and come again; tasks that are under way then are given up.
    """
    patience = make_simple_http_retry_invoker()
    patience.max_tries = 1
    client = RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
        retry_invoker=patience,
    )
    wanted = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    running: set[int] = set()
    while True:
        running = {pid for pid in running if os.waitpid(pid, os.WNOHANG)[0] == 0}
        try:
            found = client.AcquireTask(wanted)
        except httpx.HTTPError:
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            if found.token:
                running.add(_forked(address, found.token))
        time.sleep(_PAUSE)


def _forked(address: str, token: str) -> int:
    """Return the number of a new process that runs one task."""
    sys.stdout.flush()
    sys.stderr.flush()
    above = os.getpid()
    if pid := os.fork():
        return pid
    try:
        run_clientapp(address, token, insecure=True, parent_pid=above)
    finally:  # however it ends, nothing of the process above must run here
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    run_tasks(sys.argv[1])
