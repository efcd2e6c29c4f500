"""Flower's command line, called in this process."""

import sys

from flwr.cli.app import app


def run(arguments: list[str]) -> None:
    """Run ``flwr ARGUMENTS``; what it says goes to stdout, why it failed to stderr."""
    try:
        app(arguments, standalone_mode=False)
    except SystemExit:
        pass
    except Exception as error:  # whatever it is, the caller reads what was said
        print(error, file=sys.stderr)
