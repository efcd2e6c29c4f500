"""Several of Flower's commands in one process: ``python -m hansa.deploy.flwr_commands JSON``.

Each ``flwr`` takes seconds to start, and a federation needs one for every member. The commands are
lists of arguments; Flower prints what each has to say as JSON.
"""

import json
import sys
from typing import Any


def answers(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects that stand in a text, whatever stands between them."""
    decoder, found, start = json.JSONDecoder(), [], text.find("{")
    while start >= 0:
        try:
            value, start = decoder.raw_decode(text, start)
            found.append(value)
        except ValueError:
            start += 1
        start = text.find("{", start)
    return found


if __name__ == "__main__":
    from hansa.federation.engines.flower import cli  # a second, which readers need not spend

    for arguments in json.loads(sys.argv[1]):
        cli.run([*arguments, "--format", "json"])
