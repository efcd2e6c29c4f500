"""The same rounds by Hansa: ``python hansa_engine.py WORK KIND [WORKERS]``."""

import sys
from typing import Literal, cast

import numpy as np
from work import Clock, Work

from hansa import FedAvg, Federation, Participation, Training
from hansa.data.clients import Client
from hansa.federation.engines.plan import EngineOptions
from hansa.federation.tree import ROOT
from hansa.seeding import generator

Kind = Literal["auto", "sequential", "stacked", "compiled"]
SEED = 0
LONG = 1000
"""Rounds that a run of kind ``auto`` is said to have, for it to be worth compiling."""
PATIENCE = 400
"""Rounds after which one stops waiting for ``auto`` to compile."""


def name(client: int) -> str:
    """Return what a client is called."""
    return f"client-{client:04}"


def main() -> None:
    """Do all rounds; with ``auto`` go on until it has settled, and as many again."""
    work, kind = Work(sys.argv[1]), cast(Kind, sys.argv[2])
    workers = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    pool = work.images.flatten(0, 1), work.labels.flatten()
    num, samples = work.labels.shape
    clients = {}
    for k in range(num):
        rows = np.arange(k * samples, (k + 1) * samples)
        clients[name(k)] = Client(*pool, {"train": rows, "validation": rows[:0], "test": rows[:1]})
    federation = Federation(
        work.model(),
        clients,
        FedAvg(),
        Training(lr=work.lr, batch_size=work.batch),
        seed=SEED,
        participation=Participation(fraction=len(work.cohorts[0]) / num),
        engine=EngineOptions(kind=kind, workers=workers),
    )
    clock, loss, skip, engine = Clock(), float("nan"), 3, ""
    total = LONG if kind == "auto" else work.rounds + 1
    for result in federation.rounds(total, score_every=0):
        clock.tick()
        if result.number <= work.rounds:
            asked = {visit.path.rpartition("/")[2] for visit in result.visits}
            if asked != {name(k) for k in work.cohorts[result.number - 1]}:
                raise SystemExit("another cohort than that of the work file")
        if result.number == work.rounds:
            loss = work.loss(federation.model_of(ROOT).state_dict())
        if result.engine != engine:  # what came before is left out
            engine, skip = result.engine, result.number + 3
        settled = engine.startswith("compiled") or result.number > PATIENCE
        if kind == "auto" and settled and result.number >= max(work.rounds, skip + work.rounds):
            break
        if kind != "auto" and result.number == work.rounds:
            break  # the last round would also score every client
    clock.report(loss, skip if kind == "auto" else 3, engine=engine)


def order_of(client: int, round_: int, samples: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the order in which Hansa takes a client's samples in a round, counted from 1."""
    import torch

    path = f"{ROOT}/{name(client)}"
    return torch.randperm(samples, generator=generator(SEED, path, round_, 0)).numpy()


def cohort_of(num: int, size: int, round_: int) -> list[int]:
    """Return whom Hansa asks in a round, counted from 1."""
    paths = [f"{ROOT}/{name(k)}" for k in range(num)]
    chosen = Participation(fraction=size / num).choose(paths, SEED, ROOT, round_)
    return [paths.index(path) for path in chosen]


if __name__ == "__main__":
    main()
