"""Classes of the user's own, which a configuration names ``module:Class``."""

import importlib
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

from hansa.errors import InputError


def import_class(name: str, key: str, allowed: str) -> Callable[..., Any]:
    """Import what ``module:Class`` names; the current folder is looked at last.

    Code of the module runs: the name must come from somebody the user trusts.

    Args:
        name: the module as ``import`` takes it, a colon, and a name in it.
        key: where the name stands in the configuration, for the error.
        allowed: what may stand there, for the error.

    Raises:
        InputError: it is no such name, the module cannot be imported or does not have the name,
            or what has it cannot be called.
    """
    module_name, colon, class_name = name.partition(":")
    if not (colon and module_name and class_name):
        raise InputError(key, repr(name), allowed)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        kind = attrgetter(class_name)(importlib.import_module(module_name))
    except Exception as error:  # a user's module may raise anything when it is imported
        raise InputError(key, f"{name!r} ({error})", allowed) from error
    if not callable(kind):
        raise InputError(key, f"{name!r}, which cannot be called", allowed)
    return kind  # type: ignore[no-any-return]
