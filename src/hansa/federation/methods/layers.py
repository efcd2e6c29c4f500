"""Which parameters make up the head of a model: those that patterns name, or the last layer."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from hansa.errors import InputError
from hansa.federation.message import Tensors


def head(params: Tensors, patterns: Iterable[str] | None = None) -> frozenset[str]:
    """Return the names that fit a pattern such as ``head.*``; without patterns the last layer's.

    The last layer is the module that the last parameter belongs to.
    """
    names = list(params)
    if patterns is None:
        last = names[-1].rpartition(".")[0]
        return frozenset(name for name in names if name.rpartition(".")[0] == last)
    return frozenset(n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns))


def check_patterns(key: str, params: Tensors, patterns: Iterable[str] | None) -> None:
    """Refuse patterns that fit no parameter.

    Raises:
        InputError: naming the key, the pattern, and the names there are.
    """
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in params):
            raise InputError(key, repr(pattern), f"patterns of these: {', '.join(params)}")
