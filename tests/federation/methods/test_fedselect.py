"""The acceptance tests of the method, numbered as in its specification in docs/fedselect.md."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hansa.federation.message import Message, MessageError, State
from hansa.federation.methods import FedAvg, FedSelect, LocalOnly
from hansa.federation.methods.base import begin_work
from hansa.federation.methods.masks import grow, pack, unpack
from hansa.federation.node import Child, Node, Reply, Setup
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.store import link_key
from hansa.federation.tree import ROOT, Tree
from hansa.federation.wire import encode
from hansa.models.task import Task
from hansa.seeding import generator
from support import FEATURES, Row, alternating_sgd, clients, engine, everything, net, run, same

MASKS = [[0, 1, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1]]
VALUES = [[1.0, 10, 3, 7], [2.0, 4, 30, 8], [6.0, 20, 40, 9]]
ALL = {"body.weight", "body.bias", "head.weight", "head.bias"}


def row_node() -> Node:
    return Node(ROOT, 1, 1, Setup(Task(Row(4)), Training()))


def hand_links() -> list[State]:
    masks = [{"w": torch.tensor(mask, dtype=torch.bool)} for mask in MASKS]
    return [State({"mask": mask, "next": mask}) for mask in masks]


# 1. Averaging by hand.


def test_server_averages_each_entry_over_the_clients_that_share_it() -> None:
    nothing = {"w": torch.zeros(4, dtype=torch.bool)}
    replies = [
        Reply(
            f"c{k}",
            link,
            Message(
                {
                    "model": pack({"w": torch.tensor(values)}, link.group("mask")),
                    "promoted": nothing,
                }
            ),
        )
        for k, (link, values) in enumerate(zip(hand_links(), VALUES, strict=True))
    ]
    before = State({"model": {"w": torch.tensor([0.0, 0, 0, 5])}})
    after = FedSelect().aggregate(row_node(), before, replies)
    assert after.group("model")["w"].tolist() == [3, 4, 3, 5]


def test_clients_keep_personal_entries_and_take_the_others() -> None:
    method, node = FedSelect(), row_node()
    root = State({"model": {"w": torch.tensor([3.0, 4, 3, 5])}})
    children = [Child(f"c{k}", link) for k, link in enumerate(hand_links())]
    received = []
    for (_, down), values, link in zip(
        method.dispatch(node, root, children), VALUES, hand_links(), strict=True
    ):
        own = State({"model": {"w": torch.tensor(values)}, **link.groups})
        received.append(method.receive(node, own, down).group("model")["w"].tolist())
    assert received == [[3, 10, 3, 7], [3, 4, 30, 8], [3, 20, 40, 9]]


# 2. Growth by hand.

CHANGE = torch.tensor([0.1, 0.8, 0.3, 0.7, 0.2, 0.6, 0.5, 0.4])


def test_mask_grows_by_the_share_of_what_is_still_shared() -> None:
    mask = torch.zeros(8, dtype=torch.bool)
    seen = []
    for _ in range(4):
        mask = grow(mask, CHANGE, 0.25, 1.0)
        seen.append(set(mask.nonzero().flatten().tolist()))
    assert seen == [{1, 3}, {1, 3, 5, 6}, {1, 3, 5, 6, 7}, {1, 2, 3, 5, 6, 7}]


def test_limit_is_a_true_ceiling() -> None:
    mask = torch.zeros(8, dtype=torch.bool)
    for _ in range(5):
        mask = grow(mask, CHANGE, 0.25, 0.6)
    assert mask.nonzero().flatten().tolist() == [1, 3, 5, 6]


def test_share_on_a_big_tensor_follows_the_closed_form() -> None:
    change = torch.rand(100_000, generator=generator(0, "change"))
    mask = torch.zeros(100_000, dtype=torch.bool)
    for i in range(1, 9):
        mask = grow(mask, change, 0.25, 1.0)
        assert mask.float().mean().item() == pytest.approx(1 - 0.75**i, abs=1e-4)


@given(
    st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=40),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 2**32),
)
def test_growth_promotes_exactly_the_quota_of_the_largest_in_order(
    change: list[float], rate: float, limit: float, seed: int
) -> None:
    num = len(change)
    start = torch.rand(num, generator=torch.Generator().manual_seed(seed)) < limit / 2
    after = grow(start, torch.tensor(change), rate, limit)
    shared = [k for k in range(num) if not start[k]]
    quota = min(round(rate * len(shared)), math.floor(limit * num + 1e-9) - int(start.sum()))
    ranked = sorted(shared, key=lambda k: (-change[k], k))[: max(0, quota)]
    assert set(after.nonzero().flatten().tolist()) == set(start.nonzero().flatten().tolist()) | set(
        ranked
    )


# 3. Invariants of a run.


@pytest.mark.parametrize(
    "training",
    [
        Training(lr=0.1, batch_size=3, momentum=0.9, weight_decay=0.1),
        Training(lr=0.01, batch_size=3, optimizer="adam", weight_decay=0.1),
        Training(lr=0.01, batch_size=3, optimizer="adamw", weight_decay=0.1),
    ],
    ids=["momentum", "adam", "adamw"],
)
@pytest.mark.parametrize("between", [nn.ReLU(), nn.BatchNorm1d(6)], ids=["relu", "batchnorm"])
def test_a_pass_moves_only_its_own_entries(training: Training, between: nn.Module) -> None:
    method = FedSelect()
    task = Task(net(between))
    setup = Setup(task, training)
    mask = {n: (torch.arange(p.numel()) % 2 == 0).reshape(p.shape) for n, p in task.params.items()}
    work = begin_work(setup, task.params, task.buffers, mask=mask)
    batch = clients()["c0"].batch("train")
    for phase in ("personal", "shared", "personal", "shared"):
        before = work["params"]
        for _ in range(3):
            work = method.step(setup, work, batch, phase)
        for name, held in mask.items():
            frozen = ~held if phase == "personal" else held
            assert torch.equal(work["params"][name][frozen], before[name][frozen])
            assert not torch.equal(work["params"][name][~frozen], before[name][~frozen])


def test_masks_grow_stay_under_the_limit_and_outlive_the_broadcast() -> None:
    method = FedSelect(rate=0.3, limit=0.5)
    federation = engine(method)
    paths = list(federation.tree.leaves())
    masks: dict[str, dict[str, torch.Tensor]] = {}
    with federation as running:
        for number in range(1, 6):
            root = running.state()
            before = {path: running.state(path) for path in paths}
            node = Node(ROOT, number, 0, running.setup)
            children = running.children(ROOT, paths)
            received = {
                path: method.receive(node, before[path], down)
                for path, down in method.dispatch(node, root, children)
            }
            running.round(number)
            for path in paths:
                state, used = running.state(path), running.state(path).group("mask")
                for name, mask in used.items():
                    assert mask.float().mean() <= 0.5
                    earlier = masks.get(path, {}).get(name, torch.zeros_like(mask))
                    assert torch.equal(mask | earlier, mask)
                    old = before[path].group("mask").get(name, torch.zeros_like(mask))
                    kept = received[path].group("model")[name][old]
                    assert torch.equal(kept, before[path].group("model").get(name, mask)[old])
                masks[path] = dict(state.group("mask"))
            for name in ALL:
                shared_by_all = ~torch.stack([_old(before[p], name, root) for p in paths]).any(0)
                values = [received[p].group("model")[name][shared_by_all] for p in paths]
                assert all(torch.equal(value, values[0]) for value in values)
    assert any(mask.any() for mask in masks[paths[0]].values())


def _old(state: State, name: str, root: State) -> torch.Tensor:
    empty = torch.zeros(root.group("model")[name].shape, dtype=torch.bool)
    return state.group("mask").get(name, empty)


# 4. Limits in which the method is another one.


def test_limit_zero_is_fedavg_bit_for_bit() -> None:
    ours, plain = engine(FedSelect(limit=0)), engine(FedAvg(weighting="uniform"))
    run(ours), run(plain)
    assert same(ours.state().group("model"), plain.state().group("model"))


def test_rate_zero_is_fedavg_bit_for_bit_with_momentum() -> None:
    training = Training(lr=0.1, batch_size=3, epochs=2, momentum=0.9)
    ours = engine(FedSelect(rate=0), training=training)
    plain = engine(FedAvg(weighting="uniform"), training=training)
    run(ours), run(plain)
    assert same(ours.state().group("model"), plain.state().group("model"))


def _set_masks(federation: object, mask: dict[str, torch.Tensor]) -> None:
    store = federation.store  # type: ignore[attr-defined]
    task = federation.setup.task  # type: ignore[attr-defined]
    for path in federation.tree.leaves():  # type: ignore[attr-defined]
        store.put(path, State({"model": task.params, "mask": mask, "next": mask}))
        store.put(link_key(ROOT, path), State({"mask": mask, "next": mask}))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_full_mask_is_local_training_bit_for_bit(optimizer: str) -> None:
    training = Training(optimizer=optimizer, lr=0.05, batch_size=3, epochs=2)  # type: ignore[arg-type]
    ours, local = (engine(m, training=training) for m in (FedSelect(), LocalOnly()))
    full = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in ours.setup.task.params.items()}
    _set_masks(ours, full)
    results = run(ours)
    run(local)
    for path in ours.tree.leaves():
        assert same(ours.state(path).group("model"), local.state(path).group("model"))
    assert same(ours.state().group("model"), ours.setup.task.params)
    assert all(visit.down == 0 for visit in results[0].visits)


def test_one_client_is_centralised_alternating_sgd() -> None:
    data = {"c0": clients()["c0"]}
    federation = engine(FedSelect(rate=0), data=data)
    shapes = {name: p.shape for name, p in federation.setup.task.params.items()}
    mask = {name: torch.rand(s, generator=generator(1, name)) < 0.4 for name, s in shapes.items()}
    _set_masks(federation, mask)
    run(federation, 4)
    alone = net()
    for number in range(1, 5):
        alternating_sgd(alone, data["c0"], "root/c0", number, mask)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(
            federation.state("root/c0").group("model")[name], parameter.detach()
        )


def test_a_fixed_head_mask_is_the_split_of_fedrep() -> None:
    federation = engine(FedSelect(rate=0))
    mask = {
        name: torch.full(p.shape, name.startswith("head"))
        for name, p in federation.setup.task.params.items()
    }
    _set_masks(federation, mask)
    run(federation, 2)
    models = {path: net() for path in federation.tree.leaves()}
    for number in (1, 2):
        for name, data in clients().items():
            path = f"root/{name}"
            # One round at a time, so that bodies can be averaged between rounds.
            inputs, labels = data.batch("train")
            for epoch in range(2):
                order = torch.randperm(len(labels), generator=generator(5, path, number, epoch))
                for part in (models[path].head, models[path].body):
                    optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
                    for chosen in order.split(3):
                        optimizer.zero_grad()
                        F.cross_entropy(models[path](inputs[chosen]), labels[chosen]).backward()
                        optimizer.step()
        heads = {path: model.head for path, model in models.items()}
        if number == 1:
            for body in zip(*(m.body.parameters() for m in models.values()), strict=True):
                mean = torch.stack([p.detach() for p in body]).mean(0)
                for parameter in body:
                    parameter.data.copy_(mean)
        assert len(heads) == 3
    for path, model in models.items():
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                federation.state(path).group("model")[name], parameter.detach()
            )


# 5. Tiny and odd.


@pytest.mark.parametrize(
    ("length", "rate", "limit", "expected"),
    [(1, 1.0, 1.0, 1), (2, 0.25, 1.0, 0), (2, 1.0, 0.5, 1), (5, 0.0, 1.0, 0), (5, 1.0, 1.0, 5)],
)
def test_tiny_tensors_and_extreme_rates(
    length: int, rate: float, limit: float, expected: int
) -> None:
    after = grow(torch.zeros(length, dtype=torch.bool), torch.ones(length), rate, limit)
    assert int(after.sum()) == expected


def test_no_change_and_all_ties_still_give_the_exact_quota() -> None:
    empty = torch.zeros(2, 5, dtype=torch.bool)
    assert grow(empty, torch.zeros(2, 5), 0.3, 1).flatten().nonzero().flatten().tolist() == [
        0,
        1,
        2,
    ]
    assert int(grow(empty, torch.full((2, 5), 7.0), 0.5, 0.4).sum()) == 4


class Odd(nn.Module):
    """Names without weight or bias, a parameter without gradient, a frozen and a 0-dim one."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(FEATURES, 3))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.token * self.scale + self.frozen


def test_odd_models_train() -> None:
    federation = engine(FedSelect(rate=0.5, limit=1.0), model=Odd())
    run(federation, 4)
    state = federation.state("root/c0")
    assert state.group("model").keys() == {"token", "scale", "unused"}
    assert state.group("model")["unused"].tolist() == [1, 1]
    assert int(state.group("mask")["token"].sum()) == 6 + 3 + 2


# 6. Timing.


def test_a_mask_is_first_used_in_the_round_after_it_was_found() -> None:
    federation = engine(FedSelect(rate=0.5, limit=1.0))
    with federation as running:
        running.round(1)
        first = running.state("root/c0")
        running.round(2)
        second = running.state("root/c0")
    assert not any(mask.any() for mask in first.group("mask").values())
    assert any(mask.any() for mask in first.group("next").values())
    assert same(second.group("mask"), first.group("next"))


def test_a_promoted_entry_starts_from_the_common_value() -> None:
    method = FedSelect()
    promoted = {"w": torch.tensor([True, False, False, False])}
    nothing = {"w": torch.zeros(4, dtype=torch.bool)}
    own = State({"model": {"w": torch.full((4,), 9.0)}, "mask": nothing, "next": promoted})
    down = Message({"model": {"w": torch.tensor([1.0, 2, 3, 4])}})
    state = method.receive(row_node(), own, down)
    assert state.group("model")["w"].tolist() == [1, 2, 3, 4]
    assert state.group("expected")["w"].tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("reference", "expected"), [("round-start", [0, 1]), ("last-update", [2, 3])]
)
def test_change_is_measured_from_the_chosen_reference(reference: str, expected: list[int]) -> None:
    method = FedSelect(rate=0.5, limit=1.0, reference=reference)  # type: ignore[arg-type]
    node = row_node()
    trained = torch.tensor([2.0, 2, 1, 1])
    state = State(
        {
            "model": {"w": torch.tensor([0.0, 0, 1, 1])},
            "reference": {"w": torch.tensor([2.0, 2, 0, 0])},
            "expected": {"w": torch.zeros(4, dtype=torch.bool)},
        }
    )
    work = begin_work(node.setup, {"w": trained}, {}, mask=state.group("expected"))
    after, _ = method.end(node, state, work)
    assert after.group("next")["w"].nonzero().flatten().tolist() == expected
    if reference == "last-update":
        assert torch.equal(after.group("reference")["w"], trained)


def test_the_first_reference_of_the_last_update_is_the_initial_model() -> None:
    method = FedSelect(reference="last-update")
    down = Message({"model": {"w": torch.full((4,), 3.0)}})
    state = method.receive(row_node(), State(), down)
    assert state.group("reference")["w"].tolist() == [0, 0, 0, 0]


# 8. Ledger.


def test_values_that_travel_are_the_shared_entries_and_no_others() -> None:
    method = FedSelect(rate=0.25, limit=0.5)
    federation = engine(method)
    total = sum(p.numel() for p in federation.setup.task.params.values())
    counted: dict[str, list[int]] = {path: [] for path in federation.tree.leaves()}
    seen: list[tuple[str, int, int]] = []
    with federation as running:
        for number in range(1, 9):
            node = Node(ROOT, number, 0, running.setup)
            children = running.children(ROOT, list(running.tree.leaves()))
            for path, down in method.dispatch(node, running.state(), children):
                used = running.state(path).group("mask").values()
                zeros = sum(int((~mask).sum()) for mask in used) if used else total
                values = sum(t.numel() for t in down.group("model").values())
                assert values == zeros
            result = running.round(number)
            for visit in result.visits:
                used = running.state(visit.path).group("mask").values()
                zeros = sum(int((~mask).sum()) for mask in used)
                counted[visit.path].append(4 * zeros)
                seen.append((visit.path, visit.up, 4 * zeros))
    for path, payload in counted.items():
        assert payload == sorted(payload, reverse=True)
        assert payload[-1] >= (1 - method.limit) * 4 * total
        assert path
    # Beside the values a reply holds its header and, while the mask grows, the new positions.
    assert all(0 < up - payload < 1200 for _, up, payload in seen)
    first, last = seen[0], seen[-1]
    assert last[1] - last[2] < first[1] - first[2]


# 10. Reproducibility.


def test_a_client_that_is_not_asked_keeps_its_state() -> None:
    federation = engine(
        FedSelect(rate=0.3), data=clients(6), participation=Participation(fraction=0.5)
    )
    with federation as running:
        running.round(1)
        before = {path: running.state(path) for path in running.tree.leaves()}
        asked = {visit.path for visit in running.round(2).visits}
        assert len(asked) == 3
        for path, state in before.items():
            untouched = encode(running.state(path)) == encode(state)
            assert untouched == (path not in asked)


def test_a_newcomer_gets_a_model_without_holes() -> None:
    method = FedSelect(rate=1.0, limit=1.0)
    federation = engine(method, data=clients(4), participation=Participation(fraction=0.5))
    with federation as running:
        asked = set()
        for number in range(1, 4):
            asked |= {visit.path for visit in running.round(number).visits}
            fresh = sorted(set(running.tree.leaves()) - asked)
            for path in fresh:
                held = dict(running.model_of(path).named_parameters())
                root = running.state().group("model")
                assert all(torch.equal(held[name], root[name]) for name in held)
                assert all(tensor.abs().sum() > 0 for tensor in held.values())


def test_a_deeper_tree_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tree.federations: found a tree of depth 2"):
        engine(FedSelect(), tree=Tree.grouped(clients(), 2))


def test_rows_that_do_not_fit_the_mask_are_refused() -> None:
    mask, like = {"w": torch.tensor([True, False])}, {"w": torch.zeros(2)}
    for rows in ({"w": torch.zeros(2)}, {"w": torch.zeros(1).double()}, {}, {"v": torch.zeros(1)}):
        with pytest.raises(MessageError):
            unpack(rows, mask, like)


def test_two_runs_are_equal_bit_for_bit() -> None:
    first, second = engine(FedSelect()), engine(FedSelect())
    assert everything(first, run(first)) == everything(second, run(second))
