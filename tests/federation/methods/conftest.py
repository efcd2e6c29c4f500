"""What the tests of methods look on with."""

import pytest

from hansa.federation.engines import engine as engines
from hansa.federation.engines import local
from hansa.federation.message import Message
from hansa.federation.wire import encoded_size
from worldlm_tree import Watched


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    monkeypatch.setattr(Watched, "starts", [])
    monkeypatch.setattr(Watched, "ends", {})
    return Watched


@pytest.fixture
def crossed(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """Every message that the ledger counts."""
    found: list[Message] = []

    def spy(message: Message) -> int:
        found.append(message)
        return encoded_size(message)

    monkeypatch.setattr(engines, "encoded_size", spy)
    monkeypatch.setattr(local, "encoded_size", spy)
    return found
