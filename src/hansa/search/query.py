"""What a person writes for a model: its number, or its raw vector."""

import json

from hansa.errors import InputError
from hansa.models.blox_space import id_of
from hansa.search.spaces import BLOX
from hansa.search.table import Table


def model_of(text: str, table: Table) -> int:
    """Return the number of the model that a text means in a table.

    Args:
        text: a number, or in Blox a raw vector as JSON; of NAS-Bench-Macro, its eight digits.
        table: where it is to be looked up.

    Raises:
        InputError: neither, or a model that the table does not hold.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, list) and table.space == BLOX:
        model = id_of(value)
    elif len(text) == len(table.space.sizes) > 3 and set(text) <= set("0123456789"):
        model = table.space.number([int(digit) for digit in text])
    elif isinstance(value, int) and not isinstance(value, bool):
        model = value
    else:
        allowed = "a number, or [[[op1], [op2, prev, inp, sc]], ...]"
        raise InputError("MODEL", text, allowed)
    table.row(model)
    return model
