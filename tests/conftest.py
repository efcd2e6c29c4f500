import os
import tempfile

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what is marked as slow, the slowest first, at each of pytest's workers one.

    Each worker starts with an equal part of the tests in a row. What takes minutes and stood at the
    end of such a part would run alone when all the others are done.
    """
    slow = sorted(
        (item for item in items if item.get_closest_marker("slow")),
        key=lambda item: -float(item.get_closest_marker("slow").args[0]),  # type: ignore[union-attr]
    )
    rest = [item for item in items if not item.get_closest_marker("slow")]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    size = -(-len(items) // workers)
    parts = [slow[k::workers] for k in range(workers)]
    items[:] = []
    for part in parts:
        num = max(0, size - len(part))
        items += [*part, *rest[:num]]
        del rest[:num]
    items += rest


@pytest.fixture(scope="session", autouse=True)
def _own_cache():
    """Keep what tests compile and measure apart from what the user's own runs did."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HANSA_CACHE"] = folder
        yield
