"""A federation of unlike devices: each trains the best model that it can run.

Clients whose limits choose the same model form a federation of their own, since a mean needs
models of one shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hansa.errors import InputError
from hansa.search.limits import Limits, best
from hansa.search.table import Table


@dataclass(frozen=True)
class Group:
    """Clients that train one model.

    Attributes:
        model: its number.
        clients: their names, in order.
    """

    model: int
    clients: tuple[str, ...]


def groups(table: Table, common: Limits, clients: Mapping[str, Limits]) -> list[Group]:
    """Choose a model for every client and put those of one model together.

    The model is the best on validation data of those that a client's limits allow, which is the
    last on the front of accuracy against cost that is within them.

    Args:
        table: models with the costs that are limited.
        common: what holds where a client says nothing.
        clients: name -> what it says.

    Returns:
        Groups, the cheapest model first.

    Raises:
        InputError: a client whose limits no model keeps; the key names it.
    """
    chosen: dict[int, list[str]] = {}
    for name, own in clients.items():
        try:
            model = best(table, common.model_copy(update=own.model_dump(exclude_unset=True)))
        except InputError as error:
            key = f"clients.limits.{name}.{error.key.removeprefix('limits.')}"
            raise InputError(key, error.found, error.allowed) from error
        chosen.setdefault(model, []).append(name)
    ordered = sorted(chosen, key=lambda model: (table.multiply_adds(model), model))
    return [Group(model, tuple(chosen[model])) for model in ordered]
