"""Whether a process runs still; without PyTorch, which what watches processes has no use for."""

import os
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that ended and was not waited for keeps its number.

    Args:
        pid: its number; one that no process can have is that of none.
    """
    try:
        os.kill(pid, 0)
        about = Path(f"/proc/{pid}/stat").read_text()
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user, or a system that tells no states
        return pid > 0
    # NUMBER (NAME) STATE ...
    return pid > 0 and about.rpartition(")")[2].split()[0] not in ("Z", "X")
