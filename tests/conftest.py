import os
import tempfile

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache():
    """Keep what tests compile and measure apart from what the user's own runs did."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HANSA_CACHE"] = folder
        yield
