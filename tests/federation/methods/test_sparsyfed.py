"""SparsyFed: the re-parameterisation, the pruning over all layers, and what is scored."""

import torch
import torch.nn.functional as F
from torch import nn

from hansa.federation.message import Message, State
from hansa.federation.methods import FedAvg, SparsyFed
from hansa.federation.methods.base import begin_work
from hansa.federation.node import Node, Setup
from hansa.federation.optimizer import Training
from hansa.federation.server import ServerOptimizer
from hansa.federation.tree import ROOT, Tree
from hansa.models.task import Task
from hansa.sparse.thresholds import count_kept
from support import clients, doubled, engine, net, run, same

WEIGHTS = ("body.weight", "head.weight")


def power(v: torch.Tensor, beta: float) -> torch.Tensor:
    return v.sign() * v.abs() ** beta


def test_first_and_last_layer_are_sparse_as_well() -> None:
    federation = engine(SparsyFed())
    assert federation.method.weights(federation.setup) == WEIGHTS


def test_the_root_starts_from_v_and_its_model_is_the_initial_one() -> None:
    federation = engine(SparsyFed(beta=1.5))
    start, initial = federation.state().group("model"), dict(net().named_parameters())
    for name, v in start.items():
        if name in WEIGHTS:
            torch.testing.assert_close(power(v, 1.5), initial[name].detach())
            assert not torch.equal(v, initial[name])
        else:
            assert torch.equal(v, initial[name])
    for name, p in federation.common().named_parameters():
        torch.testing.assert_close(p, initial[name])


def test_a_step_is_the_gradient_of_v_by_autograd() -> None:
    # Inputs are left out by the number of zeros; there is none, so the gradient is exact.
    method = SparsyFed(beta=1.5)
    training = Training(lr=0.3, batch_size=7, weight_decay=0.01)
    setup = Setup(method.adapted(Task(net().double()), training), training)
    inputs, labels = doubled()["c0"].batch("train")
    v = dict(method.start_root(Node(ROOT, 0, 0, setup)).group("model"))
    work = begin_work(setup, v, setup.task.buffers)
    found = method.step(setup, work, (inputs, labels), "train")["params"]

    leaves = {name: t.clone().requires_grad_() for name, t in v.items()}
    w = {n: power(t, 1.5) if n in WEIGHTS else t for n, t in leaves.items()}
    hidden = torch.relu(F.linear(inputs, w["body.weight"], w["body.bias"]))
    F.cross_entropy(F.linear(hidden, w["head.weight"], w["head.bias"]), labels).backward()
    for name, t in leaves.items():
        # By hand: ReLU's zeros are no part of the gradient anyway.
        expected = t - 0.3 * (t.grad + 0.01 * t)
        torch.testing.assert_close(found[name], expected.detach(), rtol=0, atol=1e-12)


def test_a_client_prunes_over_all_layers_and_nothing_grows_back_within_it() -> None:
    method = SparsyFed(sparsity=0.75)
    federation = engine(method)
    setup = federation.setup
    node = Node("root/c0", 1, 7, setup)
    with federation as running:
        start = running.state()
    v = dict(start.group("model"))
    v["body.weight"] = v["body.weight"].clone()
    v["body.weight"][0] = 0.0
    work = begin_work(setup, v, setup.task.buffers)
    batch = clients()["c0"].batch("train")
    for _ in range(5):
        work = method.step(setup, work, batch, "train")
    assert not work["params"]["body.weight"][0].any()
    assert work["params"]["body.weight"][1].any()
    _, reply = method.end(node, State({"model": v}), work)
    sent = torch.cat([reply.group("model")[name].flatten() for name in WEIGHTS])
    whole = torch.cat([work["params"][name].flatten() for name in WEIGHTS])
    k = count_kept(0.75, len(whole))
    assert int(sent.count_nonzero()) == k
    assert torch.equal(sent, torch.where(whole.abs() >= whole.abs().sort().values[-k], whole, 0.0))
    assert torch.equal(reply.group("model")["head.bias"], work["params"]["head.bias"])


def test_the_server_takes_the_mean_zeros_included() -> None:
    method = SparsyFed(sparsity=0.5)
    federation = engine(method)
    run(federation, 1)
    node = federation.node(ROOT, 2)
    state = federation.state()
    rng = torch.Generator().manual_seed(0)
    replies = []
    for weight in (1, 3):
        model = {
            name: torch.randn(t.shape, generator=rng) * (torch.rand(t.shape, generator=rng) < 0.5)
            for name, t in state.group("model").items()
        }
        replies.append((weight, model))
    from hansa.federation.node import Reply

    after = method.aggregate(
        node,
        state,
        [Reply(f"c{w}", State(), Message({"model": m}, {"weight": w})) for w, m in replies],
    )
    for name, tensor in after.group("model").items():
        mean = 0.25 * replies[0][1][name] + 0.75 * replies[1][1][name]
        torch.testing.assert_close(tensor, mean)


def test_what_is_scored_is_w_of_the_largest_and_of_everything_before_the_first_round() -> None:
    method = SparsyFed(sparsity=0.6, beta=1.25)
    federation = engine(method)
    before, _ = method.model(federation.setup, federation.state())
    assert all(before[name].count_nonzero() == before[name].numel() for name in WEIGHTS)
    run(federation, 2)
    v = federation.state().group("model")
    whole = torch.cat([v[name].flatten() for name in WEIGHTS])
    k = count_kept(0.6, len(whole))
    least = whole.abs().sort().values[-k]
    assert int(whole.count_nonzero()) > k  # the mean of clients is denser than any of them
    for node in ("root", "root/c1"):
        held = dict(federation.model_of(node).named_parameters())
        for name in WEIGHTS:
            expected = torch.where(v[name].abs() >= least, power(v[name], 1.25), 0.0)
            assert torch.equal(held[name].detach(), expected)
        assert torch.equal(held["head.bias"].detach(), v["head.bias"])
    about = method.describe(federation.setup, federation.state())
    assert about == {"nonzero": (float(whole.count_nonzero()), float(len(whole)))}


def test_beta_one_and_sparsity_zero_is_fedavg() -> None:
    data, model = doubled(), net().double()
    ours = engine(SparsyFed(beta=1.0, sparsity=0.0, refresh=1), data=data, model=model)
    plain = engine(FedAvg(), data=data, model=model)
    run(ours), run(plain)
    for name, tensor in plain.state().group("model").items():
        torch.testing.assert_close(ours.state().group("model")[name], tensor, rtol=0, atol=1e-12)


def test_a_deeper_tree_gives_the_flat_one_s_numbers() -> None:
    data, model = doubled(5), net().double()
    server = ServerOptimizer(kind="fedadam")
    # Orders of samples depend on a client's place in the tree: whole batches have none.
    training = Training(lr=0.1, batch_size=7, epochs=2)
    method = SparsyFed(sparsity=0.5, server=server)
    flat, deep = (
        engine(method, data=data, model=model, tree=tree, training=training)
        for tree in (Tree.flat(data), Tree.grouped(data, 2))
    )
    run(flat), run(deep)
    for name, tensor in flat.state().group("model").items():
        torch.testing.assert_close(deep.state().group("model")[name], tensor, rtol=0, atol=1e-12)


def test_the_upload_is_about_as_sparse_as_asked_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    federation = engine(SparsyFed(), model=model)
    visit = run(federation, 2)[1].visits[0]
    full = 4 * sum(p.numel() for p in model.parameters())
    assert visit.csr == 8 * (count_kept(0.95, 4 * 64 + 64 * 64 + 64 * 3) + 64 + 64 + 3)
    assert visit.up < full / 4
    assert same(federation.setup.task.masks, {})
