"""Where central privacy is defined: what its proof needs of method, tree, sampling and model."""

from hansa.errors import InputError
from hansa.federation.accountant import check_installed
from hansa.federation.central import Central
from hansa.federation.methods.base import Method
from hansa.federation.node import Setup
from hansa.federation.participation import Participation
from hansa.federation.privacy import Privacy
from hansa.federation.tree import Tree

_CENTRAL = "privacy.where"


def centrally(
    privacy: Privacy,
    method: Method,
    tree: Tree,
    setup: Setup,
    participation: Participation | None = None,
) -> Central:
    """Return how the root keeps its clients private.

    Args:
        privacy: clip, noise, delta and budget.
        method: the run's.
        tree: the run's.
        setup: what is the same at every node.
        participation: how the root asks its children.

    Raises:
        InputError: something with which the accountant's bound would not hold.
    """
    if privacy.unit != "update":
        raise InputError("privacy.unit", f"{privacy.unit!r} of central privacy", "'update'")
    if method.alone:
        raise InputError(
            _CENTRAL,
            f"'central' with method {method.name!r}: {method.alone}",
            "a method that needs no more than the mean, such as fedavg, fedprox, fedper or diloco",
        )
    if tree.depth > 1:
        raise InputError(
            _CENTRAL,
            f"'central' on a tree of depth {tree.depth}, whose inner nodes send means of clients "
            "that nobody has clipped",
            "a flat federation",
        )
    if setup.shared_buffers:
        raise InputError(
            _CENTRAL,
            "'central' with running statistics, which would be averaged without noise",
            "model.buffers = 'local', or a model without any",
        )
    if any(rules.privacy is not None for rules in setup.rules.values()):
        raise InputError(
            _CENTRAL, "'central' beside nodes with privacy of their own", "one of them"
        )
    asking = participation or Participation()
    if setup.robust is not None:
        found = f"'central' beside the rule {setup.robust.rule!r}, which needs replies one by one"
        raise InputError(_CENTRAL, found, "one of them")
    if asking.newcomers:
        raise InputError(
            "participation.newcomers",
            f"{asking.newcomers} with central privacy, whose clients have one chance in all rounds",
            "none",
        )
    if asking.sampling != "poisson" and asking.fraction < 1:
        raise InputError(
            "participation.sampling",
            f"{asking.sampling!r} with central privacy, whose bound is for clients that are each "
            "asked by a chance of their own",
            "'poisson', or fraction = 1",
        )
    check_installed()
    return Central(privacy, asking.fraction)
