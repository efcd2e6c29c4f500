"""Flower's SuperNode: ``python -m hansa.federation.engines.flower.supernode SECONDS ARGUMENTS``.

Where nothing is asked of it, Flower's own sleeps for three seconds before it looks again, and so
short rounds are spent waiting. This one is told how long to sleep.

Flower's own also leaves its process behind, which does nothing any more, once the SuperLink has
answered with an error, as a busy one may. This one ends, so that it is started again.
"""

import os
import sys
import time
from typing import Any

from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode


class _Clock:
    """Python's ``time``, whose sleeps are no longer than some seconds."""

    def __init__(self, longest: float) -> None:
        self._longest = longest

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, self._longest))


def look_every(seconds: float) -> None:
    """Have the SuperNode of this process sleep no longer than this between two looks."""
    vars(start_client_internal)["time"] = _Clock(seconds)


if __name__ == "__main__":
    look_every(float(sys.argv[1]))
    sys.argv = ["flower-supernode", *sys.argv[2:]]
    flower_supernode()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # what is left are threads that would keep the process
