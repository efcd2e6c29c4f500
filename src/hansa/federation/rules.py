"""What holds at one node of a tree and nowhere else."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from hansa.errors import InputError
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.privacy import Privacy
from hansa.federation.tree import Tree, name_of


class Rules(BaseModel):
    """A node's own rules; what is not set holds as everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(None, ge=1, lt=2**31, strict=True)
    """Optimizer steps on the node's own data per round."""
    lr: float | None = Field(None, gt=0, allow_inf_nan=False, strict=True)
    """Learning rate on the node's own data."""
    participation: Participation | None = None
    """How the node asks its children."""
    privacy: Privacy | None = None
    """Differential privacy of the node's own training."""

    def applied(self, training: Training) -> Training:
        """Return how the node trains, where all others train so."""
        own = {"steps": self.steps, "lr": self.lr}
        return training.model_copy(update={k: v for k, v in own.items() if v is not None})

    def below(self, child: "Rules") -> "Rules":
        """Return a child's rules, with what it takes over from this node.

        How a node asks its children is its own matter and is not handed down.
        """
        inherited = {
            name: getattr(self, name)
            for name in ("steps", "lr", "privacy")
            if getattr(child, name) is None
        }
        return child.model_copy(update=inherited)


def inherited(tree: Tree, rules: Mapping[str, Rules]) -> dict[str, Rules]:
    """Return node path -> its rules, with what it takes over from the nodes above it.

    Args:
        tree: the nodes.
        rules: name of a node -> its own.

    Raises:
        InputError: rules of a node that is not there, or newcomers at a single node.
    """
    found: dict[str, Rules] = {}
    known = {name_of(path) for path in tree.walk()}
    if unknown := sorted(rules.keys() - known):
        raise InputError(f"nodes.{unknown[0]}", "no such node", ", ".join(sorted(known)))
    for name, own in rules.items():
        if own.participation is not None and own.participation.newcomers:
            raise InputError(
                f"nodes.{name}.participation.newcomers",
                own.participation.newcomers,
                "participation.newcomers, of the whole federation",
            )
    for path in tree.walk():
        own = rules.get(name_of(path), Rules())
        above = found.get(path.rpartition("/")[0])
        own = own if above is None else above.below(own)
        if own != Rules():
            found[path] = own
    return found
