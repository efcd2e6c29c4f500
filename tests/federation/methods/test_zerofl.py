"""The acceptance tests of the method, numbered as in its brief; and what depends on the network."""

import pytest
import torch

from hansa.errors import InputError
from hansa.federation.engines.plan import Plan
from hansa.federation.message import Message, MessageError, State
from hansa.federation.methods import Swat, ZeroFL
from hansa.federation.methods.base import begin_work
from hansa.federation.node import Child, Node, Reply, Setup
from hansa.federation.optimizer import Training
from hansa.federation.server import ServerOptimizer
from hansa.federation.tree import ROOT, Tree
from hansa.federation.wire import csr_size, decode, encode, encoded_size
from hansa.models.images import ResNet18
from hansa.models.task import Task
from hansa.sparse.thresholds import count_kept
from support import clients, doubled, engine, net, run, same

UPLINKS = ("topk_weights", "diff_topk_weights", "topk_diff")
ALL = {"sparse": ("*",), "path": "reference"}
WHOLE = Training(lr=0.1, batch_size=7, epochs=2)
"""Batches of all that a client holds: orders of samples depend on its place in a tree."""


# 2. and 4. Which entries are sent, and what they cost.

TABLE = {0.9: (10.1, 18.7, 27.3), 0.95: (5.9, 14.4, 23.0)}
UNIT = 1.024e6


@pytest.fixture(scope="module")
def resnet() -> Task:
    torch.manual_seed(0)
    return Task(ResNet18((3, 32, 32), 10, norm="batch"))


@pytest.mark.parametrize("sparsity", TABLE)
def test_bytes_of_resnet18_are_those_of_the_paper(resnet: Task, sparsity: float) -> None:
    training = Training()
    for mask_ratio, paper in zip((0.0, 0.1, 0.2), TABLE[sparsity], strict=True):
        method = ZeroFL(sparsity=sparsity, mask_ratio=mask_ratio)
        setup = Setup(method.adapted(resnet, training), training)
        node = Node("root/c", 1, 10, setup)
        work = begin_work(setup, setup.task.params, setup.task.buffers)
        rng = torch.Generator().manual_seed(0)  # biases of norms start at zero, and do not stay
        for tensor in work["params"].values():
            tensor += 0.01 * torch.randn(tensor.shape, generator=rng)
        _, reply = method.end(node, State({"model": setup.task.params}), work)
        assert csr_size(reply) / UNIT == pytest.approx(paper, rel=0.025)
        assert encoded_size(reply) < csr_size(reply)
        sent = reply.group("sparse")
        assert len(sent) == 16
        for name, tensor in sent.items():
            assert tensor.shape[2:] == (3, 3)
            kept = count_kept(sparsity - mask_ratio, tensor.numel())
            # Of some million numbers a few are equal to the smallest that is kept.
            assert kept <= int(tensor.count_nonzero()) <= kept + 5
            assert "stem" not in name
    full = Swat(sparsity=sparsity).end(node, State({"model": setup.task.params}), work)[1]
    assert csr_size(full) / UNIT == pytest.approx(43.7, rel=0.025)
    assert full.groups.keys() == {"model", "buffers"}


# 3. Limits, and the server by hand.


@pytest.mark.parametrize("uplink", UPLINKS)
def test_with_everything_sent_it_is_swat(uplink: str) -> None:
    ours = engine(ZeroFL(uplink=uplink, mask_ratio=0.9, **ALL))
    full = engine(Swat(**ALL))
    # A weight of zero is sent like any other.
    zeroed = net()
    with torch.no_grad():
        zeroed.body.weight[0] = 0.0
    for each in (ours, full):
        each.setup.task.params["body.weight"].copy_(zeroed.body.weight)
    run(ours), run(full)
    if uplink == "topk_weights":
        assert same(ours.state().group("model"), full.state().group("model"))
    for name, tensor in full.state().group("model").items():
        torch.testing.assert_close(ours.state().group("model")[name], tensor, rtol=0, atol=1e-6)


def hand(method: ZeroFL, start: list[float], ends: list[list[float]], weights: list[int]) -> State:
    """One round of a layer of four weights, from what clients end their local work with."""
    training = Training()
    setup = Setup(
        method.adapted(Task(torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False))), training),
        training,
    )
    root = Node(ROOT, 1, 0, setup)
    state = State({"model": {"0.weight": torch.tensor([start])}, "buffers": {}})
    replies = []
    for k, (end, samples) in enumerate(zip(ends, weights, strict=True)):
        node = Node(f"root/c{k}", 1, samples, setup)
        ((_, down),) = method.dispatch(root, state, [Child(node.path, State())])
        held = method.receive(node, State(), down)
        work = method.begin(node, held)
        work["params"] = {"0.weight": torch.tensor([end])}
        _, reply = method.end(node, held, work)
        replies.append(Reply(node.path, State(), decode(encode(reply))))
    return method.aggregate(root, state, replies)


START = [1.0, -2.0, 4.0, -0.0]
ENDS = [[1.5, -6.0, 4.25, 0.125], [2.0, -2.5, 8.0, 0.25]]


@pytest.mark.parametrize(
    ("uplink", "aggregation", "expected"),
    [
        # The largest two of each: -6, 4.25 and -2.5, 8; weights 1/4 and 3/4.
        ("topk_weights", "mean", [0.0, -6 / 4 - 7.5 / 4, 4.25 / 4 + 24 / 4, 0.0]),
        ("topk_weights", "counts", [1.0, -6 / 4 - 7.5 / 4, 4.25 / 4 + 24 / 4, -0.0]),
        # The same places, as differences -4, 0.25 and -0.5, 4.
        ("diff_topk_weights", "mean", [1.0, -2 - 4 / 4 - 1.5 / 4, 4 + 0.25 / 4 + 12 / 4, -0.0]),
        # The largest two differences: 0.5, -4 and 1, 4.
        ("topk_diff", "mean", [1 + 0.5 / 4 + 3 / 4, -2 - 4 / 4, 4 + 12 / 4, -0.0]),
        ("topk_diff", "counts", [1 + 0.5 / 4 + 3 / 4, -6.0, 8.0, -0.0]),
    ],
)
def test_the_server_merges_two_clients_as_by_hand(uplink, aggregation, expected) -> None:
    method = ZeroFL(sparsity=0.5, mask_ratio=0.0, uplink=uplink, aggregation=aggregation, **ALL)
    after = hand(method, START, ENDS, [1, 3])
    found = after.group("model")["0.weight"]
    assert same({"w": found}, {"w": torch.tensor([expected])})  # -0.0 is not 0.0
    if uplink == "topk_weights" and aggregation == "mean":
        about = method.describe(setup_of(method), after)
        assert about == {"nonzero": (2.0, 4.0)}


def setup_of(method: ZeroFL) -> Setup:
    training = Training()
    task = Task(torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False)))
    return Setup(method.adapted(task, training), training)


def test_a_difference_is_chosen_by_its_own_size_and_weights_by_theirs() -> None:
    # Largest weight: the third, which did not move; largest change: the first.
    start, ends = [0.0, 0.0, 9.0, 1.0], [[3.0, 0.0, 9.0, 1.0]]
    options = {"sparsity": 0.75, "mask_ratio": 0.0, **ALL}
    by_weight = hand(ZeroFL(uplink="diff_topk_weights", **options), start, ends, [1])
    by_change = hand(ZeroFL(uplink="topk_diff", **options), start, ends, [1])
    assert by_weight.group("model")["0.weight"].tolist() == [start]
    assert by_change.group("model")["0.weight"].tolist() == [[3.0, 0.0, 9.0, 1.0]]


@pytest.mark.parametrize("uplink", UPLINKS[1:])
def test_what_nobody_moved_keeps_its_bits(uplink: str) -> None:
    federation = engine(ZeroFL(uplink=uplink, mask_ratio=0.0, **ALL))
    before = federation.state().group("model")
    seen: dict[str, torch.Tensor] = {}

    def replies(running):
        for job in running.jobs(1):
            ((_, reply, _),) = running.stack.train([job])
            for name, tensor in reply.group("sparse").items():
                seen[name] = seen.get(name, torch.zeros_like(tensor, dtype=torch.bool)) | (
                    tensor != 0
                )
            yield Reply(job.path, State(), reply)

    with federation as running:
        node = running.node(ROOT, 1)
        after = running.method.aggregate(node, running.state(), replies(running))
    for name, moved in seen.items():
        assert 0 < int(moved.sum()) < moved.numel()
        found = after.group("model")[name]
        assert same({"t": found[~moved]}, {"t": before[name][~moved]})
        assert (found != before[name])[moved].any()


# Trees, stacks, the server's optimizer.


@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("server", [ServerOptimizer(), ServerOptimizer(kind="fedadam")])
def test_a_deeper_tree_gives_the_flat_one_s_numbers(uplink: str, server: ServerOptimizer) -> None:
    data, model = doubled(5), net().double()
    method = ZeroFL(uplink=uplink, sparsity=0.7, mask_ratio=0.2, server=server, **ALL)
    flat, deep = (
        engine(method, data=data, model=model, tree=tree, training=WHOLE)
        for tree in (Tree.flat(data), Tree.grouped(data, 2))
    )
    results = run(flat), run(deep)
    for group, tensors in flat.state().groups.items():
        for name, tensor in tensors.items():
            found = deep.state().group(group)[name]
            torch.testing.assert_close(found, tensor, rtol=0, atol=1e-12)
    for name in ("body.weight", "head.weight"):
        assert not torch.equal(flat.state().group("model")[name], flat.setup.task.params[name])
    assert results[0][-1].scores[ROOT]["state"] == results[1][-1].scores[ROOT]["state"]
    assert "change" not in flat.state().groups
    assert "change" not in deep.state().groups


def test_an_inner_node_that_nobody_answered_adds_nothing() -> None:
    for uplink in UPLINKS:
        data = clients(4)
        federation = engine(ZeroFL(uplink=uplink, **ALL), data=data, tree=Tree.grouped(data, 2))
        method = federation.method
        root, state = federation.node(ROOT, 1), federation.state()
        paths = federation.tree.children(ROOT)
        sent = dict(method.dispatch(root, state, federation.children(ROOT, paths)))
        replies = []
        for path in paths:
            inner = federation.node(path, 1)
            held = method.aggregate(inner, method.receive(inner, State(), sent[path]), [])
            replies.append(Reply(path, State(), method.reply(inner, held)))
        after = method.aggregate(root, state, replies)
        assert same(after.group("model"), state.group("model"))


def test_counts_are_for_flat_federations() -> None:
    with pytest.raises(InputError, match=r"method\.aggregation: found 'counts' on a tree of"):
        engine(ZeroFL(aggregation="counts", **ALL), tree=Tree.grouped(clients(), 2))


# Half precision.


@pytest.mark.parametrize("uplink", UPLINKS)
def test_half_precision_halves_the_bytes_and_is_cast_back(uplink: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.Linear(64, 3)
    )
    options = {"uplink": uplink, "sparsity": 0.5, "mask_ratio": 0.4, "path": "reference"}
    half, full = (
        engine(ZeroFL(values=values, **options), model=model) for values in ("float16", "float32")
    )
    first, second = run(half, 1), run(full, 1)
    assert half.state().group("model")["2.weight"].dtype is torch.float32
    torch.testing.assert_close(
        half.state().group("model")["2.weight"],
        full.state().group("model")["2.weight"],
        rtol=1e-3,
        atol=1e-4,
    )
    for group, rest in (("model", ("0.weight", "3.weight")),):
        for name in rest:  # what is not sparse travels whole
            assert same(
                {"t": half.state().group(group)[name]}, {"t": full.state().group(group)[name]}
            )
    values = 64 * 64 * 0.9
    saved = second[0].visits[0].up - first[0].visits[0].up
    assert saved == pytest.approx(2 * values, rel=0.1)


def test_half_precision_beyond_its_range_is_an_error_at_every_node() -> None:
    method = ZeroFL(values="float16", mask_ratio=0.9, **ALL)
    with pytest.raises(InputError, match=r"method\.values: found 'float16' for 70000 in 0.weight"):
        hand(method, START, [[70000.0, 0, 0, 0]], [1])
    setup = setup_of(method)
    state = State({"model": {"0.weight": torch.tensor([[0.0, -7e4, 0, 0]])}}, {"weight": 2})
    with pytest.raises(InputError, match=r"for 70000 in 0\.weight"):
        method.reply(Node("root/west", 1, 0, setup), state)


# What is refused.


def test_more_than_everything_cannot_be_sent() -> None:
    with pytest.raises(ValueError, match=r"mask_ratio must not exceed sparsity, 0\.5"):
        ZeroFL(sparsity=0.5, mask_ratio=0.6)
    assert ZeroFL(sparsity=0.5, mask_ratio=0.5).mask_ratio == 0.5


def test_replies_that_do_not_fit_are_refused() -> None:
    method = ZeroFL(**ALL)
    node = Node(ROOT, 1, 0, setup_of(method))
    state = method.start_root(node)
    for group in ({}, {"0.weight": torch.zeros(1, 3)}, {"0.weight": torch.zeros(1, 4).half()}):
        reply = Reply("root/c", State(), Message({"sparse": group}, {"weight": 1}))
        with pytest.raises(MessageError):
            method.aggregate(node, state, [reply])


def test_clients_whose_uploads_are_stacked_send_the_same() -> None:
    data, model = doubled(4), net().double()
    one, other = (
        engine(ZeroFL(uplink="topk_diff", **ALL), data=data, model=model, plan=plan)
        for plan in (Plan(), Plan("stacked", 2))
    )
    first, second = run(one), run(other)
    assert other.stack.failure == ""
    for a, b in zip(first, second, strict=True):
        assert [visit.csr for visit in a.visits] == [visit.csr for visit in b.visits]
    for name, tensor in one.state().group("model").items():
        torch.testing.assert_close(other.state().group("model")[name], tensor, rtol=0, atol=1e-9)
