"""The same rounds by Flower's simulation: a ServerApp, a ClientApp, Ray's actors in between."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).parent),
}

import torch
import torch.nn.functional as F
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from work import Clock, Work

client_app = ClientApp()
_held: dict[str, Any] = {}


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the client that the message names for one epoch."""
    config = message.content["config"]
    path, client, number = str(config["work"]), int(config["client"]), int(config["round"])
    if path not in _held:  # data and model live as long as the actor does
        torch.set_num_threads(1)
        held = Work(path)
        _held[path] = held, held.model()
    work, model = _held[path]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr)
    for batch in work.order(number, client).split(work.batch):
        optimizer.zero_grad()
        F.cross_entropy(model(work.images[client, batch]), work.labels[client, batch]).backward()
        optimizer.step()
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": len(work.labels[client])}),
    }
    return Message(RecordDict(content), reply_to=message)


class Scheduled(FedAvg):
    """FedAvg over the cohorts of the work file; a message names the client it is for."""

    def __init__(self, work: Work, clock: Clock) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.work, self.clock = work, clock

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Yield a message for every client of the round's cohort."""
        cohort = self.work.cohorts[server_round - 1]
        for node, client in zip(sorted(grid.get_node_ids()), cohort, strict=False):
            about = {"work": self.work.path, "client": client, "round": server_round - 1}
            content = RecordDict({"arrays": arrays, "config": ConfigRecord(about)})
            yield Message(content, message_type=MessageType.TRAIN, dst_node_id=node)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Return the mean, and mark the end of the round."""
        result = super().aggregate_train(server_round, replies)
        self.clock.tick()
        return result


def main() -> None:
    """Run ``python flower_simulation.py WORK [ACTORS]``."""
    work, actors = Work(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        clock = Clock()
        initial = ArrayRecord(work.initial)
        found = Scheduled(work, clock).start(
            grid=grid, initial_arrays=initial, num_rounds=work.rounds
        )
        # While the actors are still alive, so that they are counted.
        clock.report(work.loss(found.arrays.to_torch_state_dict()))

    run_simulation(
        server_app,
        client_app,
        num_supernodes=len(work.images),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": actors, "logging_level": "ERROR", "log_to_driver": False},
        },
    )


if __name__ == "__main__":
    main()
