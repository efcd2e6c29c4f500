"""How the local engine does its work."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["sequential", "stacked", "compiled"]


@dataclass(frozen=True)
class Plan:
    """What an engine was chosen to do, and why.

    Attributes:
        kind: clients one by one; several at once by ``vmap``; or several at once by a compiled
            step.
        stack: clients per stack, 1 for one by one.
        workers: processes that train clients.
        why: the reason, for the log.
    """

    kind: Kind = "sequential"
    stack: int = 1
    workers: int = 1
    why: str = ""
