"""What a tracker is to a run."""

from collections.abc import Mapping, Set
from typing import Protocol


class Sink(Protocol):
    """Somewhere that numbers of steps are kept.

    Attributes:
        name: as the configuration has it.
    """

    name: str

    def steps(self, key: str) -> Set[int]:
        """Return the steps that a number of this name is there for."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the numbers of one step, so that they can be read at once.

        Args:
            step: the round.
            values: name -> number; the last of them is there only if all are.
        """

    def close(self, done: bool) -> None:
        """End, and say whether the run came to its end."""
