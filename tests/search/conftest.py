import pytest

from hansa.processes import one_thread


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Networks as small as these gain nothing by more."""
    with one_thread():
        yield
