import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments import check_logs, hansa, init, kill
from hansa.deploy.trial import down, parties, processes
from support import in_turn


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Path]]:
    """Start deployments, and end every process of theirs."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    places: list[Path] = []

    def start(description: dict[str, Any]) -> Path:
        places.append(init(tmp_path, description))
        hansa("up", places[-1])
        return places[-1]

    with in_turn(0, 1):
        try:
            yield start
        finally:
            for place in places:
                down(place)
                for party in parties(place):
                    for log in (party / "logs").glob("*.log"):
                        print(f"==> {log}", log.read_text(errors="replace")[-1500:], sep="\n")
                check_logs(place)
                left = [pid for party in parties(place) for pid in processes(party)]
                kill(left)
                assert not left
