"""The pre-round of a run: masks that all clients share, from exchanges that are counted."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import nn

from hansa.data.clients import Client
from hansa.errors import InputError
from hansa.federation.engines.engine import RoundResult, Visit
from hansa.federation.engines.plan import EngineOptions
from hansa.federation.federation import Federation
from hansa.federation.message import Tensors
from hansa.federation.optimizer import Training
from hansa.federation.tree import ROOT, Tree
from hansa.pruning.exchange import Exchange
from hansa.pruning.find import find_masks
from hansa.pruning.objective import prunable
from hansa.pruning.options import PruningOptions
from hansa.pruning.select import select

Watch = Callable[[int, int], None]


def check_pruning(model: nn.Module, options: PruningOptions, federated: bool = True) -> None:
    """Refuse what is bound to fail, before anything is computed.

    Raises:
        InputError: options that do not fit the model, or each other in a federation.
    """
    try:
        names = prunable(model, options.exclude)
        select(
            {name: torch.zeros(model.get_parameter(name).shape) for name in names},
            options.density,
            scope=options.scope,
            floor=options.floor,
            densities=options.densities,
        )
    except InputError as error:
        own = error.key in ("model", "scores")
        key = error.key if own else f"pruning.{error.key}"
        raise InputError(key, error.found, error.allowed) from error
    if federated:
        _exchange(options, None).check_scorer()


def _exchange(options: PruningOptions, given: Tensors | None) -> Exchange:
    about = options.model_dump(exclude={"method", "options", "batch_size"})
    return Exchange(scorer=options.scorer, given=given, **about)


def pre_round(
    model: nn.Module,
    clients: Mapping[str, Client],
    options: PruningOptions,
    training: Training | None = None,
    *,
    seed: int = 0,
    tree: Tree | None = None,
    engine: EngineOptions | None = None,
    on_failure: Literal["stop", "drop"] = "stop",
    watch: Watch | None = None,
) -> tuple[dict[str, torch.Tensor], RoundResult]:
    """Find one mask for all clients, asking every one of them in each exchange.

    Scorers that see no data are computed at the root; then only the masks travel.

    Args:
        model: as for ``Federation``.
        clients: name -> what the client holds.
        options: the scorer and what it is to keep.
        training: whose ``batch_size`` is that of the scoring, where the options have none.
        seed: everything random is derived from it.
        tree: the federation's shape.
        engine: how the work is done: on Flower, or leaf by leaf by so many processes.
        on_failure: whether a client whose scores are no numbers stops the search or is left out.
        watch: called with the exchange and their number.

    Returns:
        name -> bool tensor, True where an entry is kept; and the exchanges as one round, the 0th.

    Raises:
        InputError: options that do not fit the model or each other.
    """
    engine, training = engine or EngineOptions(), training or Training()
    if options.batch_size:
        training = training.model_copy(update={"batch_size": options.batch_size})
    check_pruning(model, options)
    given = None
    if not options.scorer.needs_data:
        about = options.model_dump(exclude={"method", "options", "batch_size", "combine"})
        inputs = next(iter(clients.values())).batch("train")[0][:1]  # for its shape
        batch = (inputs, torch.zeros(1, dtype=torch.int64))
        given = find_masks(model, [batch], scorer=options.scorer, seed=seed, **about).masks
    exchange = _exchange(options, given)
    federation = Federation(
        model,
        clients,
        exchange,
        training,
        seed=seed,
        buffers="local",
        tree=tree,
        # Second derivatives of many clients at once are beyond `vmap`.
        engine=EngineOptions(
            kind="flower" if engine.kind == "flower" else "sequential", workers=engine.workers
        ),
        on_failure=on_failure,
    )
    last, visits, seconds, how = exchange.exchanges + 1, list[Visit](), 0.0, ""
    for result in federation.rounds(last + 1, score_every=0):
        visits += result.visits
        seconds += result.seconds
        how = result.engine
        if watch is not None:
            watch(result.number, last)
        if result.number == last:  # before the round that would be scored
            break
    masks = dict(federation.state_of(ROOT).group("mask"))
    return masks, RoundResult(0, tuple(visits), {}, seconds, (), f"pruning, {how}")
