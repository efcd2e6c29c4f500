from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from hansa.data.clients import Client
from hansa.errors import InputError
from hansa.federation.engines import local, workers
from hansa.federation.engines.local import LocalEngine
from hansa.federation.engines.plan import Plan
from hansa.federation.leaf import DivergedError
from hansa.federation.message import Message
from hansa.federation.methods import (
    METHODS,
    FedAvg,
    FedPer,
    FedSelect,
    LocalOnly,
    Method,
)
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.store import DiskStore
from hansa.federation.tree import ROOT, Tree
from hansa.federation.wire import encode
from hansa.models.task import Task
from support import clients, engine, everything, made, net, run

HARD = Participation(fraction=0.7, failure_rate=0.2, deadline=0.7, speed_spread=0.7)


def build(method: Method, workers: int = 1, tree: Tree | None = None) -> LocalEngine:
    # Dropout and BatchNorm: random streams and buffers must be in order as well.
    model = net(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.2)))
    return engine(
        method,
        model=model,
        data=clients(5, per_client=8),
        participation=HARD,
        plan=Plan(workers=workers),
        tree=tree,
    )


@pytest.mark.parametrize("name", ["fedselect", "fedavg-tuned"])
def test_worker_processes_change_nothing(name: str) -> None:
    method = made(name)
    here, there = build(method), build(method, workers=4)
    assert everything(here, run(here, 4)) == everything(there, run(there, 4))


def test_worker_processes_change_nothing_on_a_deep_tree() -> None:
    tree = Tree.grouped(clients(5), 2)
    here, there = build(FedAvg(), tree=tree), build(FedAvg(), workers=2, tree=tree)
    assert everything(here, run(here)) == everything(there, run(there))


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_work_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = made(name)
    forward = build(method)
    expected = everything(forward, run(forward))

    def backward(calls: Iterator[Callable[[], object]], num: int) -> Iterator[Callable[[], object]]:
        asked = list(calls)
        done = [ask() for ask in reversed(asked)][::-1]
        return ((lambda result=result: result) for result in done)

    monkeypatch.setattr(local, "_ahead", backward)
    reversed_ = build(method)
    assert everything(reversed_, run(reversed_)) == expected


@pytest.mark.parametrize("name", METHODS)
def test_the_order_in_which_clients_are_named_changes_nothing(name: str) -> None:
    method = made(name)
    data = clients(4)
    shuffled = {key: data[key] for key in ("c2", "c0", "c3", "c1")}
    first, second = engine(method, data=data), engine(method, data=shuffled)
    assert everything(first, run(first)) == everything(second, run(second))


@pytest.mark.parametrize("name", METHODS)
def test_states_on_disk_change_nothing(name: str, tmp_path) -> None:
    method = made(name)
    memory, disk = build(method), build(method)
    disk.store = DiskStore(tmp_path, cache_bytes=0)
    assert everything(memory, run(memory)) == everything(disk, run(disk))


class Tapped(FedAvg):
    """FedAvg that keeps the bytes of whatever it is handed."""

    def receive(self, node, state, down: Message):
        TAPPED[node.path, "down"] = len(encode(down))
        return super().receive(node, state, down)

    def end(self, node, state, work):
        after, reply = super().end(node, state, work)
        TAPPED[node.path, "up"] = len(encode(reply))
        return after, reply


TAPPED: dict[tuple[str, str], int] = {}


def test_the_ledger_counts_the_bytes_of_the_encoded_messages() -> None:
    TAPPED.clear()
    with engine(Tapped()) as running:
        visits = running.round(1, score=False).visits
    assert len(visits) == 3
    for visit in visits:
        assert (visit.down, visit.up) == (TAPPED[visit.path, "down"], TAPPED[visit.path, "up"])


def test_clients_that_fail_or_are_late_are_recorded_and_leave_no_trace() -> None:
    federation = build(FedSelect())
    fates = {}
    with federation as running:
        for number in range(1, 9):
            before = {path: encode(running.state(path)) for path in running.tree.leaves()}
            for visit in running.round(number).visits:
                fates.setdefault(visit.fate, []).append(visit)
                if visit.fate != "ok":
                    assert visit.down > 0
                    assert visit.up == 0
                    assert encode(running.state(visit.path)) == before[visit.path]
    assert fates.keys() == {"ok", "late", "failed"}
    assert all(visit.seconds == 0.7 for visit in fates["late"])


def poisoned() -> dict[str, Client]:
    data = clients(3)
    inputs, labels = data["c1"].batch("train")
    bad = Client.of((inputs * float("nan"), labels), test=data["c1"].batch("test"))
    return {**data, "c1": bad}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_client(workers: int) -> None:
    federation = engine(FedAvg(), data=poisoned(), plan=Plan(workers=workers))
    with pytest.raises(DivergedError, match="the loss is nan in round 1 at c1"):
        run(federation)


def test_or_the_client_is_dropped_and_never_averaged() -> None:
    federation = engine(FedAvg(), data=poisoned(), on_failure="drop")
    results = run(federation)
    failed = [visit for visit in results[0].visits if visit.fate == "failed"]
    assert [(visit.path, visit.error) for visit in failed] == [
        ("root/c1", "the loss is nan in round 1 at c1")
    ]
    assert all(tensor.isfinite().all() for tensor in federation.state().group("model").values())


def test_a_round_can_go_unscored() -> None:
    with engine(FedAvg()) as running:
        assert running.round(1, score=False).scores == {}
        assert running.round(2).scores.keys() == {"root/c0", "root/c1", "root/c2"}


def test_every_client_is_scored_whoever_took_part() -> None:
    federation = engine(FedSelect(), data=clients(6), participation=Participation(fraction=0.3))
    results = run(federation, 2)
    assert all(len(result.visits) == 2 for result in results)
    leaves = set(federation.tree.leaves())
    assert all(result.scores.keys() == leaves | {ROOT} for result in results)
    assert all(result.scores[ROOT].keys() == {"state"} for result in results)


def test_pytorchs_threads_are_given_back() -> None:
    torch.set_num_threads(before := 2)  # for the fixture of all these tests to put back
    with engine(FedAvg()):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_model_that_cannot_be_sent_to_a_process_is_named() -> None:
    class Hidden(nn.Linear):
        pass

    with pytest.raises(InputError, match=r"engine\.workers"):
        engine(FedAvg(), model=Hidden(4, 3), plan=Plan(workers=2))


def test_a_client_whose_weights_overflow_in_its_last_step_is_dropped() -> None:
    data = clients(3)
    inputs, labels = data["c1"].batch("train")
    # One step: the loss is still finite, the weights after it are not.
    huge = Client.of((inputs * 1e37, labels), test=data["c1"].batch("test"))
    training = Training(lr=1e3, batch_size=7)
    federation = engine(FedAvg(), data={**data, "c1": huge}, training=training, on_failure="drop")
    with federation as running:
        failed = [v for v in running.round(1, score=False).visits if v.fate == "failed"]
    assert [visit.path for visit in failed] == ["root/c1"]
    assert "is not finite in round 1 at c1" in failed[0].error


def test_a_client_that_cannot_be_scored_is_left_out_of_the_scores_when_dropping() -> None:
    data = clients(3)
    inputs, labels = data["c1"].batch("test")
    blind = Client.of(data["c1"].batch("train"), test=(inputs * float("nan"), labels))
    federation = engine(FedAvg(), data={**data, "c1": blind}, on_failure="drop")
    assert run(federation, 1)[0].scores.keys() == {"root/c0", "root/c2"}
    with pytest.raises(DivergedError):
        run(engine(FedAvg(), data={**data, "c1": blind}), 1)


def test_scoring_draws_from_its_own_stream_and_changes_no_state() -> None:
    class Restless(nn.Module):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return torch.nn.functional.dropout(self.head(inputs), 0.5)

    first = engine(FedAvg(), model=Restless())
    expected = run(first)
    second = engine(FedAvg(), model=Restless())
    torch.manual_seed(99)
    assert [r.scores for r in run(second)] == [r.scores for r in expected]
    with engine(FedAvg(), model=Restless()) as running:
        running.round(1, score=False)
        before = encode(running.state())
        dict(running.score(running.node("root", 1), running.state()))
        assert encode(running.state()) == before


def test_parameters_are_contiguous_whatever_the_layout_of_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).to(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    assert Task(model).params["0.weight"].is_contiguous()


@pytest.mark.parametrize("method", [FedAvg(), FedPer()])
def test_a_client_s_model_is_common_weights_with_its_own_buffers(method: Method) -> None:
    data = clients(per_client=8)
    federation = engine(method, model=net(nn.BatchNorm1d(6)), data=data, buffers="local")
    run(federation, 2)
    model = federation.model_of("root/c1").state_dict()
    assert torch.equal(
        model["between.running_mean"],
        federation.state("root/c1").group("buffers")["between.running_mean"],
    )
    holder = "root/c1" if isinstance(method, FedPer) else "root"
    assert torch.equal(model["body.weight"], federation.state(holder).group("model")["body.weight"])


def test_local_only_sends_nothing_on_a_deep_tree_either() -> None:
    federation = engine(LocalOnly(), tree=Tree.grouped(clients(), 2))
    assert all(visit.up == visit.down == 0 for visit in run(federation, 1)[0].visits)


def test_clients_are_compared_two_by_two() -> None:
    federation = engine(FedSelect(rate=0.3, limit=0.6), data=clients(3))
    with federation as running:
        running.round(1)
        assert running.round(2).pairs == ()
        pairs = running.round(3, pairs=True).pairs
    paths = list(federation.tree.leaves())
    crossed = {(a, b): (total, count) for a, b, name, total, count in pairs if name == "accuracy"}
    assert crossed.keys() == {(a, b) for a in paths for b in paths}
    for (first, second), (correct, count) in crossed.items():
        inputs, labels = federation.clients[second].batch("test")
        found = federation.model_of(first)(inputs).argmax(1)
        assert (correct, count) == (int((found == labels).sum()), len(labels))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        one, other = (federation.state(paths[k]).group("mask") for k in (first, second))
        for name in one:
            shares = int((one[name] & other[name]).sum()), int((one[name] | other[name]).sum())
            assert (paths[first], paths[second], f"iou:{name}", *shares) in pairs


def test_only_models_of_the_clients_own_are_compared() -> None:
    for method, names in ((FedAvg(), set()), (LocalOnly(), {"accuracy"})):
        federation = engine(method)
        with federation as running:
            pairs = running.round(1, pairs=True).pairs
        assert {name for _, _, name, _, _ in pairs} == names


@pytest.mark.parametrize("name", METHODS)
def test_a_newcomer_is_scored_before_and_after_its_training(name: str) -> None:
    federation = engine(made(name), data=clients(3))
    results = run(federation, 3)
    before = everything(federation, results)
    client = clients(4)["c3"]
    found = federation.onboard("late", client, epochs=3)
    assert everything(federation, results) == before
    inputs, labels = client.batch("test")
    after = federation.setup.task.materialise(found.params, found.buffers)(inputs).argmax(1)
    assert found.after["accuracy"] == (int((after == labels).sum()), len(labels))
    # Before its training it is worth what it received: the common model as far as there is one.
    start = federation.common()
    correct = int((start(inputs).argmax(1) == labels).sum())
    assert found.before["accuracy"] == (correct, len(labels))


def test_a_newcomer_s_mask_depends_on_the_rounds_before_it() -> None:
    method = FedSelect(rate=0.3, limit=0.9, newcomer="select")
    federation = engine(method)
    run(federation, 3)
    found = federation.onboard("late", clients(4)["c3"], epochs=1)
    assert int(found.masks["body.weight"].sum()) == round((1 - 0.7**3) * 24)


def test_clients_with_data_of_their_own_reach_other_processes(monkeypatch) -> None:
    monkeypatch.setattr(workers, "SHARED", 1)  # so that tensors are copied, not shared
    here, there = build(FedAvg()), build(FedAvg(), workers=2)
    assert everything(here, run(here)) == everything(there, run(there))
