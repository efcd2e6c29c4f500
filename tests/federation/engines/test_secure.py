"""Secure aggregation on Flower's simulation: the mean, and nothing of any one client."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.common import bytes_to_ndarray
from flwr.server.workflow import SecAggPlusWorkflow

from hansa import Federation, InputError, Training
from hansa.data.clients import Client
from hansa.federation.engines.flower import secure
from hansa.federation.engines.flower.secure import SecureOptions, check_summable, secure_apps
from hansa.federation.methods import METHODS, FedAvg, FedPer, Method
from hansa.federation.tree import ROOT
from hansa.models.task import Task
from support import clients, in_turn, made, net

pytestmark = pytest.mark.filterwarnings("ignore")  # what Flower and Ray warn of is theirs
TRAINING = Training(lr=0.1, batch_size=3, epochs=2)
OPTIONS = SecureOptions(most_samples=10)
TOLERANCE = 1e-5
"""Rounding of one entry: 2 / 2^22 at the client, over a sum of weights of 0.7 each."""


class Held:
    """What the nodes of a simulation hold; the state of each lies below a folder of the test's."""

    def __init__(self, folder: Path, num: int, failing: int | None = None) -> None:
        self.folder, self.num, self.failing = folder, num, failing

    def __call__(self, context: Any) -> Client:
        number = int(context.node_config["partition-id"])
        context.node_config["state"] = str(self.folder)
        if number == self.failing:
            raise RuntimeError("this node breaks down in every round")
        return clients(self.num)[f"c{number}"]


def federation(method: Method, num: int, without: int | None = None) -> Federation:
    held = {f"client-{k}": c for k, c in enumerate(clients(num).values()) if k != without}
    return Federation(net(), held, method, TRAINING, seed=5)


def simulated(made: secure.SecureApps, num: int) -> None:
    from flwr.simulation import run_simulation

    options: Any = {
        "init_args": {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False}
    }
    with in_turn(1):
        run_simulation(made.server, made.client, num, backend_config=options)


class Watching(SecAggPlusWorkflow):
    """The protocol of Flower's, which keeps all that its server receives."""

    received: ClassVar[list[Message]] = []

    def collect_masked_vectors_stage(self, grid: Any, context: Any, state: Any) -> bool:
        class Watched:
            def send_and_receive(self, messages: Iterable[Message], **options: Any) -> Any:
                found = list(grid.send_and_receive(messages, **options))
                Watching.received += found
                return found

        return super().collect_masked_vectors_stage(Watched(), context, state)


@pytest.mark.slow(20)
def test_the_server_has_the_mean_and_sees_no_client(tmp_path, monkeypatch) -> None:
    """Two rounds of FedPer at three clients: the body is masked, heads stay where they are."""
    monkeypatch.setattr(secure, "SecAggPlusWorkflow", Watching)
    Watching.received.clear()
    local = federation(FedPer(), 3)
    local.run(2)
    apps = secure_apps(
        FedPer(),
        Task(net()),
        Held(tmp_path, 3),
        TRAINING,
        rounds=2,
        clients=3,
        seed=5,
        options=OPTIONS,
        save=tmp_path / "model.safetensors",
    )
    seen: list[list[np.ndarray[Any, Any]]] = []
    aggregate = apps.strategy.aggregate_fit

    def watched(number: int, results: Any, failures: Any) -> Any:
        assert not failures
        assert all(not result.metrics for _, result in results)
        seen.append([secure.parameters_to_ndarrays(r.parameters)[0] for _, r in results])
        return aggregate(number, results, failures)

    monkeypatch.setattr(apps.strategy, "aggregate_fit", watched)
    simulated(apps, 3)
    assert apps.strategy.rounds == [1, 2]
    expected = local.state_of(ROOT).group("model")
    found = apps.strategy.state.group("model")
    assert found.keys() == expected.keys() == {"body.weight", "body.bias"}
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=3 * TOLERANCE), name
    assert (tmp_path / "model.safetensors").is_file()
    # The strategy has one and the same row in the place of each client's.
    assert [len(rows) for rows in seen] == [3, 3]
    assert all(np.array_equal(rows[0], row) for rows in seen for row in rows)
    # What came from each client is spread over all of the modulus, and no two are alike.
    assert len(Watching.received) == 6
    for message in Watching.received:
        assert not any(len(record) for record in message.content.array_records.values())
        masked = message.content.config_records["secaggplus_configs"]
        (_, row) = (bytes_to_ndarray(part) for part in masked["masked_params"])
        assert row.size == 6 * 4 + 6
        assert row.max() - row.min() > 2**30


@pytest.mark.slow(15)
def test_a_round_survives_a_client_that_breaks_down_after_its_keys(tmp_path, monkeypatch) -> None:
    """Three of four are enough, and the mean is that of those three."""
    local = federation(FedAvg(), 4, without=2)
    local.run(1)
    apps = secure_apps(
        FedAvg(),
        Task(net()),
        Held(tmp_path, 4, failing=2),
        TRAINING,
        rounds=1,
        clients=4,
        seed=5,
        options=OPTIONS,
    )
    simulated(apps, 4)
    assert apps.strategy.rounds == [1]
    expected = local.model_of(ROOT).state_dict()
    for name, tensor in apps.strategy.model().state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=TOLERANCE), name


def member(folder: Path, options: SecureOptions) -> tuple[secure._Member, np.ndarray[Any, Any]]:
    local = federation(FedAvg(), 3)
    leaf = secure.Leaf(FedAvg(), local.setup, 5)
    one = secure._Member(f"{ROOT}/client-0", clients(3)["c0"], leaf, folder, options)
    return one, secure._Shape(FedAvg(), local.setup).row(
        secure.Message(local.state_of(ROOT).groups)
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (SecureOptions(clipping_range=1e-4), "clipping_range"),
        (SecureOptions(most_samples=6), "most_samples"),
    ],
)
def test_what_the_protocol_would_cut_is_refused_at_the_client(options, says, tmp_path) -> None:
    one, row = member(tmp_path, options)
    with pytest.raises(InputError, match=says):
        one.fit([row], {"round": 1, "run": "0" * 16})


def test_a_client_tells_its_change_and_its_weight_alone(tmp_path) -> None:
    one, row = member(tmp_path, OPTIONS)
    (change,), weight, metrics = one.fit([row], {"round": 1, "run": "0" * 16})
    assert change.shape == row.shape
    assert np.abs(change).max() > 0
    assert (weight, metrics) == (7, {})
    with pytest.raises(InputError, match="name of a run"):
        one.fit([row], {"round": 1, "run": "../elsewhere"})


@pytest.mark.parametrize("name", ["fedselect", "lotteryfl", "scaffold", "worldlm", "local"])
def test_methods_that_need_each_reply_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(InputError, match="secure aggregation") as caught:
        check_summable(made(name))
    assert METHODS[name].alone in str(caught.value)


def test_two_clients_have_nobody_to_hide_among(tmp_path) -> None:
    with pytest.raises(InputError, match="at least 3"):
        secure_apps(FedAvg(), Task(net()), Held(tmp_path, 2), TRAINING, rounds=1, clients=2)
