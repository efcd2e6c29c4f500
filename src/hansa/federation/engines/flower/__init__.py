"""The Flower engine: the same rounds, with Flower's SuperLink and SuperNodes between the nodes.

This is the only package that imports Flower, and it does so after what stands here.
"""

import os
from importlib.metadata import PackageNotFoundError, version

from hansa.errors import InputError

SUPPORTED = "1.41"
"""The release of Flower that this package is tested with; others have other ports and commands."""

# Nothing is told to anybody unless a user asks for it. Flower reads these when it is imported.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray warns that this will be so
}
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)


def check_version() -> None:
    """Refuse a Flower that is missing or of another release.

    Raises:
        InputError: it is.
    """
    wanted = f"{SUPPORTED}.x: pip install 'hansa[flower]'"
    try:
        found = version("flwr")
    except PackageNotFoundError as error:
        raise InputError("Flower", "not installed", wanted) from error
    if found.split(".")[:2] != SUPPORTED.split("."):
        raise InputError("Flower", f"version {found}", wanted)


check_version()
