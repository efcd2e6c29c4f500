"""A client's own model out of a run, as a bundle."""

from pathlib import Path
from typing import Any

from hansa import bundle
from hansa.errors import InputError
from hansa.runs import Run
from hansa.training import prepare


def export(run: str | Path | Run, client: str, out: str | Path | None = None) -> bundle.Bundle:
    """Write the model by which a client is scored after a run's last round, with its masks.

    That is its own, the common one, or the common one after fine-tuning, as the method has it.
    The bundle's lineage goes through the run's common model, where the method has one.

    Args:
        run: a run, or its folder.
        client: the client's name.
        out: the folder to make; by default ``clients/CLIENT`` in the run's folder.

    Raises:
        InputError: no such run or client, a run without a whole round, one that is under way, or
            data that has changed since.
    """
    run = run if isinstance(run, Run) else Run(run)
    if not run.round:
        raise InputError(str(run.path), "a run without a whole round", "at least one round")
    trial = prepare(run.config, masks=run.masks)
    if client not in trial.data.clients:
        raise InputError("client", repr(client), f"one of {', '.join(trial.data.clients)}")
    with run.claimed(run.config, trial.facts):
        federation = trial.federation
        federation.keep_states_in(run.store(), run.round)
        weights = federation.model_of(client).state_dict()
        masks = federation.masks_of(client)
    common = run.path / "bundle"
    finished = (run.path / "summary.json").exists() and common.exists()
    parent = bundle.read_bundle(common) if finished else None
    return trial.write_bundle(
        Path(out) if out is not None else run.path / "clients" / client,
        "personalise",
        weights,
        _scores(run, client),
        masks,
        parent,
        None if parent else run.privacy(),  # the common model's card tells it already
    )


def _scores(run: Run, client: str) -> dict[str, Any]:
    """Return the client's last scores: split -> metric -> value, and the round they are of."""
    language = run.config.text is not None
    scored = "aggregated" if language else run.config.method.scored
    scores: dict[str, Any] = {"client": client, "scored": scored}
    for split in ("validation", "test"):
        for metric in ("perplexity", "bits_per_byte") if language else ("accuracy", "loss"):
            by_round = run.history.scored(split, metric)
            mine = {
                number: values[client] for number, values in by_round.items() if client in values
            }
            if mine:
                scores["round"] = max(mine)
                scores.setdefault(split, {})[metric] = mine[max(mine)]
    return scores
