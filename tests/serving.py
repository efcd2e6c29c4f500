"""The server of `hansa ui`, for tests."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hansa.ui import Server


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve a folder of runs in a thread."""
    with Server(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
