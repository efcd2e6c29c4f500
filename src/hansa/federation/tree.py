"""The shape of a federation: a tree of nodes named by their paths."""

import re
from collections.abc import Iterable, Iterator, Mapping

from hansa.errors import InputError

ROOT = "root"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Tree:
    """A tree of nodes; a flat federation is a tree of depth one.

    A node's path is the names from the root to it, ``root/north/ward-1``. Children are always
    visited in the order of their paths, so that sums do not depend on how the tree was written.
    """

    def __init__(self, parents: Mapping[str, str], key: str = "tree") -> None:
        """Build a tree from each node's parent: ``{"north": "root", "ward-1": "north"}``.

        Args:
            parents: node -> its parent.
            key: configuration key of the nodes, for errors.

        Raises:
            InputError: no node, a name that cannot be a path, an unknown parent, a cycle.
        """
        if not parents:
            raise InputError(key, "no node", "at least one node below the root")
        for name, parent in parents.items():
            if not is_name(name):
                raise InputError(
                    f"{key}.{name}",
                    f"the name {name!r}",
                    "letters, digits, '.', '_' and '-', at most 64, and not 'root'",
                )
            if parent != ROOT and parent not in parents:
                raise InputError(
                    f"{key}.{name}", f"the parent {parent!r}", "'root' or a named node"
                )
        paths = {name: _path(name, parents, key) for name in parents}
        self._paths = {ROOT: ROOT, **paths}
        below: dict[str, list[str]] = {}
        for name, path in sorted(paths.items(), key=lambda item: item[1]):
            below.setdefault(paths.get(parents[name], ROOT), []).append(path)
        self._children = {path: tuple(children) for path, children in below.items()}

    @classmethod
    def flat(cls, names: Iterable[str]) -> "Tree":
        """Return the tree whose nodes all stand directly below the root."""
        return cls(dict.fromkeys(names, ROOT))

    @classmethod
    def grouped(cls, names: Iterable[str], federations: int) -> "Tree":
        """Return a tree of depth two: the names dealt in turn to that many inner nodes.

        With one federation the tree is flat.

        Raises:
            InputError: fewer names than federations, or a name that an inner node bears.
        """
        names = sorted(names)
        if federations == 1:
            return cls.flat(names)
        if not 1 <= federations <= len(names):
            raise InputError("tree.federations", federations, f"1 to {len(names)}")
        inner = [f"federation-{k}" for k in range(federations)]
        if taken := set(inner).intersection(names):
            raise InputError(f"tree.{min(taken)}", "the name of an inner node", "another name")
        parents = dict.fromkeys(inner, ROOT)
        parents |= {name: inner[k % federations] for k, name in enumerate(names)}
        return cls(parents)

    def children(self, path: str) -> tuple[str, ...]:
        """Return the paths of a node's children, sorted; none for a leaf."""
        return self._children.get(path, ())

    def path_of(self, name: str) -> str:
        """Return the path of a node.

        Raises:
            KeyError: no such node.
        """
        return self._paths[name]

    def is_leaf(self, path: str) -> bool:
        """Tell whether a node has no children."""
        return path not in self._children

    def leaves(self) -> Iterator[str]:
        """Yield the paths of all leaves, in order."""
        return (path for path in self.walk() if self.is_leaf(path))

    def walk(self, path: str = ROOT) -> Iterator[str]:
        """Yield a node and everything below it, parents first, siblings in order."""
        yield path
        for child in self.children(path):
            yield from self.walk(child)

    @property
    def depth(self) -> int:
        """Steps from the root to the deepest leaf."""
        return max(path.count("/") for path in self.leaves())


def is_name(text: str) -> bool:
    """Tell whether a node below the root may be called that."""
    return text != ROOT and _NAME.fullmatch(text) is not None


def name_of(path: str) -> str:
    """Return the last name of a path, which is how people know the node."""
    return path.rpartition("/")[2]


def _path(name: str, parents: Mapping[str, str], key: str) -> str:
    names = [name]
    while parents[names[-1]] != ROOT:
        if parents[names[-1]] in names:
            circle = " -> ".join([*names, parents[names[-1]]])
            raise InputError(f"{key}.{name}", f"the cycle {circle}", "parents that lead to 'root'")
        names.append(parents[names[-1]])
    return "/".join([ROOT, *reversed(names)])
