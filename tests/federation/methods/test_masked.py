"""What masked sharing offers beside the conference method: switches, ages, newcomers."""

import pytest
import torch
from torch import nn

from hansa.errors import InputError
from hansa.federation.aggregation import MaskedMean
from hansa.federation.message import Message, MessageError, State
from hansa.federation.methods import FedAvg, FedSelect
from hansa.federation.methods.masks import flipped, flips, grow, pack
from hansa.federation.node import Child, Node, Reply, Setup
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.store import link_key
from hansa.federation.tree import ROOT
from hansa.models.task import Task
from support import Net, Row, clients, engine, net, run, same


def mask(*entries: int) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(entries, dtype=torch.bool)}


def row_node(length: int = 4, number: int = 1) -> Node:
    return Node(ROOT, number, 1, Setup(Task(Row(length)), Training()))


def reply(path: str, held: dict[str, torch.Tensor], values: list[float], **scalars: float) -> Reply:
    message = Message({"model": pack({"w": torch.tensor(values)}, held)}, scalars)
    return Reply(path, State({"mask": held, "next": held}), message)


# Weights and ages.


def test_entries_can_be_weighted_by_samples() -> None:
    replies = [
        reply("a", mask(0, 1), [2.0, 9], weight=1),
        reply("b", mask(0, 0), [6.0, 4], weight=3),
    ]
    before = State({"model": {"w": torch.zeros(2)}})
    by_samples = FedSelect(weighting="samples").aggregate(row_node(2), before, replies)
    by_count = FedSelect().aggregate(row_node(2), before, replies)
    assert by_samples.group("model")["w"].tolist() == [5, 4]
    assert by_count.group("model")["w"].tolist() == [4, 4]


def test_limit_zero_by_samples_is_fedavg_by_samples() -> None:
    data = {**clients(2), "c2": clients(3, 5)["c2"]}
    ours = engine(FedSelect(limit=0.0, weighting="samples"), data=data)
    plain = engine(FedAvg(), data=data)
    run(ours), run(plain)
    for name, value in plain.state().group("model").items():
        torch.testing.assert_close(ours.state().group("model")[name], value)


def test_age_counts_the_rounds_since_an_entry_was_sent() -> None:
    method, node = FedSelect(), row_node(3)
    state = method.start_root(node)
    seen = []
    for held in (mask(0, 0, 1), mask(0, 1, 1), mask(0, 0, 1)):
        state = method.aggregate(node, state, [reply("a", held, [1.0, 1, 1])])
        seen.append(state.group("age")["w"].tolist())
    assert seen == [[0, 0, 1], [0, 1, 2], [0, 0, 3]]
    assert method.describe(node.setup, state) == {"unshared": (1.0, 3.0), "age": (3.0, 3.0)}


def test_a_round_without_replies_keeps_the_model_and_ages_it() -> None:
    method, node = FedSelect(), row_node(2)
    before = method.aggregate(node, method.start_root(node), [reply("a", mask(0, 0), [1.0, 2])])
    after = method.aggregate(node, before, [])
    assert same(after.group("model"), before.group("model"))
    assert after.group("age")["w"].tolist() == [1, 1]


def test_a_masked_mean_rounds_integers_and_refuses_weights_that_are_none() -> None:
    like = {"n": torch.zeros(2, dtype=torch.int64)}
    mean = MaskedMean(like)
    mean.add({"n": torch.tensor([1, 5])}, {"n": torch.tensor([False, True])}, 1)
    mean.add({"n": torch.tensor([4, 5])}, {"n": torch.tensor([False, True])}, 2)
    assert mean.result({"n": torch.tensor([8, 9])})["n"].tolist() == [3, 9]
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a weight must be finite"):
            mean.add(like, {"n": torch.zeros(2, dtype=torch.bool)}, weight)


# What travels.


def test_flips_carry_any_mask_to_any_other() -> None:
    before = {"a": torch.tensor([True, False, True]), "b": torch.tensor([False])}
    after = {"a": torch.tensor([False, False, True]), "b": torch.tensor([False])}
    message = Message({"changed": flips(before, after)})
    assert message.groups["changed"].keys() == {"a"}
    assert same(flipped(before, message, "changed"), after)
    for odd in ({"c": torch.tensor([True])}, {"a": torch.tensor([True])}):
        with pytest.raises(MessageError):
            flipped(before, Message({"changed": odd}), "changed")


def test_a_new_entry_can_keep_the_client_s_own_value_and_is_then_not_sent() -> None:
    for start, expected, sent in (("global", [1.0, 2.0], 2), ("local", [9.0, 2.0], 1)):
        method, node = FedSelect(new_entry=start), row_node(2)  # type: ignore[arg-type]
        link = State({"mask": mask(0, 0), "next": mask(1, 0)})
        root = State({"model": {"w": torch.tensor([1.0, 2.0])}})
        ((_, down),) = method.dispatch(node, root, [Child("c0", link)])
        assert down.group("model")["w"].numel() == sent
        own = State({"model": {"w": torch.tensor([9.0, 9.0])}, **link.groups})
        after = method.receive(node, own, down)
        assert after.group("model")["w"].tolist() == expected
        assert same(after.group("expected"), mask(1, 0))


def test_at_saturation_bytes_are_within_the_limit() -> None:
    method = FedSelect(rate=0.25, limit=0.8)
    torch.manual_seed(0)
    model = Net()
    model.body, model.head = nn.Linear(4, 400), nn.Linear(400, 3)
    federation = engine(method, model=model)
    total = sum(p.numel() for p in federation.setup.task.params.values())
    dense = 4 * total
    results = run(federation, 14)
    # A bias of three entries holds floor(0.8 * 3) = 2 of them at most, and a share of a quarter
    # rounds to nothing where two or fewer are left; that is all that the ceiling leaves above.
    slack = 4 * 2 * len(federation.setup.task.params)
    first, last = results[0].visits[0], results[-1].visits[0]
    header = first.up - dense - _mask_cost(federation)
    assert header < 1000
    for visit in results[-1].visits:
        for size in (visit.up, visit.down):
            assert (1 - method.limit) * dense <= size <= (1 - method.limit) * dense + slack + 1000
    assert last.up < first.up / 3


def _mask_cost(federation: object) -> int:
    params = federation.setup.task.params.values()  # type: ignore[attr-defined]
    return sum(-(-p.numel() // 8) for p in params)


# Quotas.


def test_a_global_quota_takes_the_largest_of_all_tensors() -> None:
    moved = {"a": torch.tensor([9.0, 8, 7, 6]), "b": torch.tensor([1.0, 2, 3, 4, 5, 0])}
    empty = {name: torch.zeros(len(row), dtype=torch.bool) for name, row in moved.items()}
    by_model = FedSelect(rate=0.3, limit=0.5, quota="global")
    after = by_model.promote(empty, moved, 0.3)
    assert after["a"].tolist() == [True, True, True, False]
    assert after["b"].sum() == 0
    after = by_model.promote(after, moved, 0.3)  # round(0.3 * 7) = 2
    assert (after["a"].sum(), after["b"].tolist()) == (4, [0, 0, 0, 0, 1, 0])
    after = by_model.promote(after, moved, 0.3)
    assert sum(int(held.sum()) for held in after.values()) == 5  # the limit
    by_tensor = FedSelect(rate=0.3, limit=0.5).promote(empty, moved, 0.3)
    assert (by_tensor["a"].sum(), by_tensor["b"].sum()) == (1, 2)


def test_a_global_limit_counts_what_may_never_be_personal() -> None:
    moved = {"weight": torch.arange(4.0), "bias": torch.arange(6.0)}
    empty = {name: torch.zeros(len(row), dtype=torch.bool) for name, row in moved.items()}
    method = FedSelect(limit=0.3, quota="global", biases=False)
    after = method.promote(empty, moved, 1.0)
    assert after["weight"].tolist() == [0, 1, 1, 1]
    assert not after["bias"].any()


# Running statistics.


def test_statistics_can_follow_the_mask_of_their_layer() -> None:
    model = net(nn.BatchNorm1d(6))
    federation = engine(
        FedSelect(rate=0.5, limit=0.5), model=model, data=clients(3, 9), buffers="personal"
    )
    run(federation, 4)
    root = federation.state().group("buffers")["between.running_mean"]
    states = [federation.state(path) for path in federation.tree.leaves()]
    scales = [state.group("mask")["between.weight"] for state in states]
    assert all(int(scale.sum()) == 3 for scale in scales)
    # An entry's common value is the mean over the clients whose scale is shared there.
    values = torch.stack([state.group("buffers")["between.running_mean"] for state in states])
    shared = ~torch.stack(scales)
    mean = (values * shared).sum(0) / shared.sum(0)
    some = shared.any(0)
    torch.testing.assert_close(root[some], mean[some])
    down = dict(
        federation.method.dispatch(
            federation.node(ROOT, 5),
            federation.state(),
            federation.children(ROOT, federation.tree.leaves()),
        )
    )
    for path, state in zip(federation.tree.leaves(), states, strict=True):
        node = federation.node(path, 5)
        after = federation.method.receive(node, state, down[path])
        scale = state.group("mask")["between.weight"]
        got = after.group("buffers")["between.running_mean"]
        own = state.group("buffers")["between.running_mean"]
        assert torch.equal(got, torch.where(scale, own, root))
        # The counter of batches has no weight to follow: it is shared whole.
        counter = "between.num_batches_tracked"
        assert after.group("buffers")[counter] == federation.state().group("buffers")[counter]


def test_statistics_follow_nothing_where_there_are_no_masks() -> None:
    with pytest.raises(InputError, match=r"model.buffers: found 'personal' with method 'fedavg'"):
        engine(FedAvg(), buffers="personal")


# Newcomers.


def test_newcomers_are_not_asked_before_their_round() -> None:
    rules = Participation(newcomers=2, join_round=3)
    federation = engine(FedSelect(), data=clients(5), participation=rules)
    asked = [{visit.path for visit in result.visits} for result in run(federation, 4)]
    assert asked[0] == asked[1] == {"root/c0", "root/c1", "root/c2"}
    assert asked[2] == asked[3] == set(federation.tree.leaves())


@pytest.mark.parametrize("newcomer", ["zero", "majority", "select"])
def test_both_ends_agree_on_a_newcomer_s_mask(newcomer: str) -> None:
    rules = Participation(newcomers=1, join_round=4)
    method = FedSelect(rate=0.3, limit=0.6, newcomer=newcomer)  # type: ignore[arg-type]
    federation = engine(method, data=clients(4), participation=rules)
    with federation as running:
        for number in (1, 2, 3):
            running.round(number)
        old = [running.state(path).group("next") for path in ("root/c0", "root/c1", "root/c2")]
        running.round(4)
        state, link = running.state("root/c3"), running.store.get(link_key(ROOT, "root/c3"))
        running.round(5)
    assert same(link.group("mask"), state.group("mask"))
    assert same(link.group("next"), state.group("next"))
    for name, held in state.group("mask").items():
        if newcomer == "zero":
            assert not held.any()
        elif newcomer == "majority":
            votes = torch.stack([masks[name] for masks in old]).sum(0)
            assert bool((votes[held] >= 2).all())
            most = grow(torch.zeros_like(held), votes.double(), 1.0, 0.6)
            assert torch.equal(held, most & (votes >= 2))
        else:  # as many as a client that was there for three updates
            quota = min(round((1 - 0.7**3) * held.numel()), int(0.6 * held.numel() + 1e-9))
            assert int(held.sum()) == quota


def test_a_newcomer_s_selection_is_rewound() -> None:
    method = FedSelect(rate=0.5, newcomer="select", select_epochs=2)
    federation = engine(method, data=clients(3))
    node = federation.node("root/c0", 3)
    down = next(iter(method.dispatch(node, federation.state(), [Child("root/c0", State())])))[1]
    state = method.receive(node, State(), down)
    work = method.begin(node, state)
    assert method.stages(node, work, 7) == (("select0", 2), ("train", 7))
    batch = clients()["c0"].batch("train")
    moved = method.step(federation.setup, work, batch, "select")["params"]
    assert all(not torch.equal(moved[n], work["params"][n]) for n in moved)
    after = method.after(node, {**work, "params": moved}, "select0")
    assert same(after["params"], state.group("model"))
    chosen = method.promote(
        state.group("expected"),
        {n: (moved[n] - work["params"][n]).abs() for n in moved},
        0.75,
    )
    assert same(after["mask"], chosen)
    # A client that was there from the first round on does not select.
    assert method.stages(node, method.begin(federation.node("root/c0", 1), state), 7) == (
        ("train", 7),
    )


def test_the_majority_is_held_under_the_limit() -> None:
    method, node = FedSelect(limit=0.25, newcomer="majority"), row_node(4)
    votes = {"w": torch.tensor([2, 3, 3, 0], dtype=torch.int32)}
    state = State({"votes": votes}, {"known": 3})
    assert same(method.newcomer_mask(node, state), mask(0, 1, 0, 0))
    unlimited = FedSelect(limit=1.0, newcomer="majority")
    assert same(unlimited.newcomer_mask(node, state), mask(1, 1, 1, 0))


def test_votes_count_the_masks_that_clients_hold_now() -> None:
    federation = engine(FedSelect(rate=0.3), data=clients(4))
    run(federation, 3)
    held = [federation.state(path).group("next") for path in federation.tree.leaves()]
    root = federation.state()
    assert root.scalars["known"] == 4
    for name, votes in root.group("votes").items():
        assert torch.equal(votes, torch.stack([masks[name] for masks in held]).sum(0).int())


def test_a_client_that_waits_is_described_by_the_mask_it_would_be_given() -> None:
    rules = Participation(newcomers=1, join_round=4)
    method = FedSelect(rate=0.4, limit=0.6, newcomer="majority")
    federation = engine(method, data=clients(4), participation=rules)
    result = run(federation, 3)[-1]
    given = method.newcomer_mask(federation.node(ROOT, 4), federation.state())
    assert any(held.any() for held in given.values())
    assert same(federation.masks_of("root/c3"), given)
    about = result.scores["root/c3"]["state"]
    assert about["personal:body.weight"] == (float(given["body.weight"].sum()), 24.0)


def test_a_selection_of_newcomers_takes_time() -> None:
    setup = row_node().setup
    passes = FedSelect(newcomer="select", select_epochs=7).passes(setup)
    assert passes == FedSelect().passes(setup) + 7
