"""What a node has spent of its privacy, and whether one more round fits its budget.

In a simulation the count stands in the node's state, and so is undone with it. In a deployment it
stands where nothing undoes it (``releases.py``).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from hansa.federation.message import Message, State, Tensors
from hansa.federation.node import Node, Reply
from hansa.federation.privacy import affordable, epsilon, mechanisms
from hansa.seeding import generator

PRIVATE_STEPS = "private_steps"
SPENT: dict[str, tuple[float, float]] = {"spent": (1.0, 1.0)}
"""What is told of a node whose privacy budget does not allow for the round."""


def opened(node: Node, state: State) -> Node | None:
    """Return a node as it may train for one round, or nothing where its budget is spent.

    Where releases are counted, this one is before anything is drawn for it.

    Args:
        node: where and when.
        state: its state before the round.
    """
    setup = node.setup
    if setup.privacy is None:
        return node
    size, steps = setup.training.batch_size, _steps(node)
    if setup.releases is None:
        fits = affordable(setup.privacy, node.samples, size, _done(state), steps)
        return node if fits else None
    release = setup.releases.open(mechanisms(setup.privacy, node.samples, size, steps))
    return None if release is None else replace(node, setup=setup.releasing(release))


def spent(node: Node, before: State) -> dict[str, int]:
    """Return what a node keeps in its state of its private steps, this round's included."""
    if node.setup.releases is not None:
        return {}
    return {PRIVATE_STEPS: _done(before) + _steps(node)}


def counted(state: State, before: State) -> State:
    """Return a state that knows as many private steps as an earlier one of the same node."""
    if PRIVATE_STEPS not in before.scalars:
        return state
    steps = before.scalars[PRIVATE_STEPS]
    return replace(state, scalars={**state.scalars, PRIVATE_STEPS: steps})


def told(node: Node, state: State) -> dict[str, tuple[float, float]]:
    """Return the privacy that a node has spent so far as (sum, count); nothing without any."""
    privacy = node.setup.privacy
    if privacy is None or not privacy.noise:  # without noise it is infinite
        return {}
    if node.setup.releases is not None:
        found = node.setup.releases.epsilon
        return {"epsilon": (found, 1.0)} if found < float("inf") else {}
    size = node.setup.training.batch_size
    return {"epsilon": (epsilon(privacy, node.samples, size, _done(state)), 1.0)}


def afforded(node: Node, state: State) -> bool:
    """Tell whether the budget of central privacy, where there is one, allows for one more round."""
    central = node.setup.central
    return central is None or central.affords(_done(state) + 1)


def noised_mean(
    node: Node,
    before: State,
    replies: Iterable[Reply],
    aggregate: Callable[[Node, State, Iterable[Reply]], State],
) -> State:
    """Return what the root makes of its replies under central privacy, and count the round.

    The method is given their noised mean as the only reply, and so never sees one by itself.

    Args:
        node: the root.
        before: its state when it dispatched.
        replies: what its children answer.
        aggregate: the method's.
    """
    central, sent = node.setup.central, before.group("model")
    assert central is not None  # noqa: S101 the caller has looked

    def models() -> Iterator[Tensors]:
        for reply in replies:
            yield reply.message.require("model", sent)

    rng = generator(node.setup.seed, node.path, node.round, "privacy")
    mean = central.mean(sent, models(), node.num_children, rng)
    # Without metrics: a training loss would tell of the clients without noise.
    reply = Reply(node.path, State(), Message({"model": mean}, {"weight": 1}))
    state = aggregate(node, before, [reply])
    return replace(state, scalars={**state.scalars, PRIVATE_STEPS: _done(before) + 1})


def told_centrally(node: Node, state: State) -> dict[str, tuple[float, float]]:
    """Return what central privacy has spent so far as (sum, count); nothing without any."""
    central = node.setup.central
    if central is None or not central.privacy.noise:  # without noise it is infinite
        return {}
    return {"epsilon": (central.epsilon(_done(state)), 1.0)}


def _done(state: State) -> int:
    """Return the private steps behind a state."""
    return int(state.scalars.get(PRIVATE_STEPS, 0))


def _steps(node: Node) -> int:
    """Return how often a round looks at a node's data, as its accountant counts."""
    setup = node.setup
    if setup.privacy is not None and setup.privacy.unit == "update":
        return 1
    return setup.training.batches(node.samples) * setup.training.epochs
