"""Residuals: key blocks that travel to where they are more at home than in their federation.

Each knows where it was cut, when, and how far it has come, so that none goes back to its origin,
and all can be counted: every one is used, expires, or waits somewhere.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from hansa.federation.attention import Blocks, likeness
from hansa.federation.message import Message, MessageError, Scalar, Tensors

_GROUP = "residual."
_TOOK = "took|"
Entry = Callable[["Residual", Tensors, Blocks], Tensors]


@dataclass(frozen=True, eq=False)
class Residual:
    """One key block on its way.

    Attributes:
        origin: the node it was cut from, below the one that cut it.
        round: the pass in which it was cut.
        block: the key block.
        tensors: name -> tensor of the block.
        hops: edges it has passed and passes it has waited.
        upward: whether it is about to leave for the parent.
    """

    origin: str
    round: int
    block: str
    tensors: Tensors
    hops: int = 0
    upward: bool = False

    @property
    def id(self) -> str:
        """What it is called in messages and states."""
        return f"{self.origin}@{self.round}@{self.block}"

    def moved(self) -> "Residual":
        """Return it one edge or one wait further."""
        return replace(self, hops=self.hops + 1, upward=False)

    def is_from(self, path: str) -> bool:
        """Tell whether it was cut from a node or from below it."""
        return self.origin == path or self.origin.startswith(f"{path}/")

    def cut_at(self, path: str) -> bool:
        """Tell whether a node has just cut it from one of its children."""
        return self.hops == 0 and self.origin.rpartition("/")[0] == path


def cut(
    number: int,
    bank: Mapping[str, Tensors],
    keys: Tensors,
    blocks: Blocks,
    threshold: float,
    most: int,
    difference: bool,
) -> list[Residual]:
    """Return the children's blocks least like their federation's, at most ``most``.

    Args:
        number: the pass.
        bank: child -> its key blocks.
        keys: the federation's own.
        blocks: the key blocks and their tensors.
        threshold: cosine below which a block is unlike.
        most: how many may leave.
        difference: whether the difference travels, and not the block itself.
    """
    found: list[tuple[float, str, str]] = []
    for path, child in bank.items():
        for block, names in blocks.items():
            alike = likeness(child, keys, names)
            if alike < threshold:
                found.append((alike, path, block))
    cuts = []
    for _, path, block in sorted(found)[:most]:
        tensors = {
            n: bank[path][n] - keys[n] if difference else bank[path][n] for n in blocks[block]
        }
        cuts.append(Residual(path, number, block, tensors))
    return cuts


def route(
    held: Iterable[Residual],
    links: Mapping[str, Tensors],
    blocks: Blocks,
    most: int,
    entry: Entry,
) -> dict[str, list[Residual]]:
    """Return child -> the residuals it is sent: each goes to the child most like it.

    Args:
        held: the residuals.
        links: child -> the key blocks it sent last.
        blocks: the key blocks and their tensors.
        most: how many a child may be sent; the least alike wait.
        entry: a residual as a child's bank would hold it.
    """
    chosen: dict[str, list[tuple[float, str, Residual]]] = {}
    for residual in held:
        names = blocks[residual.block]
        scores = {
            path: likeness(entry(residual, keys, blocks), keys, names)
            for path, keys in links.items()
            if not residual.is_from(path)
        }
        if scores:
            best = max(scores, key=lambda path: (scores[path], path))
            chosen.setdefault(best, []).append((-scores[best], residual.id, residual))
    return {
        path: [residual for _, _, residual in sorted(row, key=lambda r: r[:2])[:most]]
        for path, row in chosen.items()
    }


def pack(message: Message, residuals: Iterable[Residual]) -> Message:
    """Return a message or state that held no residuals with some put into it."""
    groups, scalars = dict(message.groups), dict(message.scalars)
    for number, residual in enumerate(residuals):
        group = f"{_GROUP}{number}"
        groups[group] = residual.tensors
        scalars[group] = residual.id
        scalars[f"{group}.hops"] = residual.hops
        scalars[f"{group}.upward"] = residual.upward
    return Message(groups, scalars, message.metrics)


def unpack(message: Message, blocks: Blocks, like: Tensors) -> list[Residual]:
    """Return the residuals in a message or state, in the order of their names.

    Raises:
        MessageError: one that does not fit the model, or one that is there twice.
    """
    found: dict[str, Residual] = {}
    for group in sorted(g for g in message.groups if g.startswith(_GROUP)):
        name = str(message.scalars.get(group))
        origin, number, block = [*name.split("@", 2), "", ""][:3]
        if block not in blocks or not number.isdecimal() or name in found:
            raise MessageError(f"a residual called {name!r}")
        tensors = message.require(group, {n: like[n] for n in blocks[block]})
        hops = int(message.number(f"{group}.hops"))
        upward = bool(message.scalars.get(f"{group}.upward"))
        found[name] = Residual(origin, int(number), block, tensors, hops, upward)
    return [found[name] for name in sorted(found)]


def taken(state: Message) -> dict[str, Scalar]:
    """Return what tells the parent which residuals have arrived."""
    return {key: True for key in state.scalars if key.startswith(_TOOK)}


def delivered(reply: Message) -> set[str]:
    """Return the residuals that a child says have arrived."""
    return {key.removeprefix(_TOOK) for key in reply.scalars if key.startswith(_TOOK)}
