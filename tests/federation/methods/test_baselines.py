"""Every baseline against its algorithm in plain PyTorch, on the batches that the engine draws."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hansa.errors import InputError
from hansa.federation.leaf import Job
from hansa.federation.message import Message, State
from hansa.federation.methods import (
    Ditto,
    FedAvg,
    FedBABU,
    FedRep,
    LGFedAvg,
    LocalOnly,
    LotteryFL,
    PFedMe,
    Scaffold,
)
from hansa.federation.node import Node, Reply, Setup
from hansa.federation.optimizer import Training
from hansa.federation.participation import Participation
from hansa.federation.tree import ROOT, Tree
from hansa.models.task import Task
from hansa.seeding import generator
from support import Net, Row, clients, engine, net, run, same

LR, EPOCHS, SIZE = 0.1, 2, 3
Batch = tuple[torch.Tensor, torch.Tensor]


def batches(name: str, number: int, epochs: int = EPOCHS, stage: str = "") -> Iterator[Batch]:
    inputs, labels = clients()[name].batch("train")
    for epoch in range(epochs):
        key = (f"root/{name}", number, *([stage] if stage else []), epoch)
        order = torch.randperm(len(labels), generator=generator(5, *key))
        for chosen in order.split(SIZE):
            yield inputs[chosen], labels[chosen]


def gradient(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def move(model: nn.Module, step: dict[str, torch.Tensor], chosen: Callable[[str], bool]) -> None:
    for name, parameter in model.named_parameters():
        if chosen(name):
            parameter -= LR * step[name]


def always(name: str) -> bool:
    return True


def is_head(name: str) -> bool:
    return name.startswith("head")


def is_body(name: str) -> bool:
    return not is_head(name)


@torch.no_grad()
def average(models: list[Net], chosen: Callable[[str], bool], into: Net) -> None:
    parts = [dict(model.named_parameters()) for model in models]
    for name, parameter in into.named_parameters():
        if chosen(name):
            parameter.copy_(torch.stack([part[name] for part in parts]).mean(0))


def check(found, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach())


def test_fedrep_fits_the_head_and_then_moves_the_body() -> None:
    federation = engine(FedRep(head_epochs=3, body_epochs=1))
    run(federation)
    models, common = {name: net() for name in clients()}, net()
    for number in (1, 2, 3):
        for name, model in models.items():
            for parameter, value in zip(
                model.body.parameters(), common.body.parameters(), strict=True
            ):
                parameter.data.copy_(value.data)
            for batch in batches(name, number, 3, "head"):
                move(model, gradient(model, batch), is_head)
            for batch in batches(name, number, 1):
                move(model, gradient(model, batch), is_body)
        average(list(models.values()), is_body, common)
    for name, model in models.items():
        check(federation.state(f"root/{name}").group("model"), model)
    assert federation.state().group("model").keys() == {"body.weight", "body.bias"}


def test_lg_fedavg_shares_the_head_alone() -> None:
    federation = engine(LGFedAvg())
    run(federation)
    models, common = {name: net() for name in clients()}, net()
    for number in (1, 2, 3):
        for name, model in models.items():
            model.head.load_state_dict(common.head.state_dict())
            for batch in batches(name, number):
                move(model, gradient(model, batch), always)
        average(list(models.values()), is_head, common)
    for name, model in models.items():
        check(federation.state(f"root/{name}").group("model"), model)
    assert federation.state().group("model").keys() == {"head.weight", "head.bias"}
    with pytest.raises(InputError, match=r"method.shared_layers: found 'tail'"):
        engine(LGFedAvg(shared_layers=("tail",)))


def test_lg_fedavg_keeps_the_statistics_of_its_bodies_whatever_the_run_says() -> None:
    federation = engine(
        LGFedAvg(), model=net(nn.BatchNorm1d(6)), data=clients(3, 9), buffers="averaged"
    )
    run(federation, 2)
    assert not federation.state().group("buffers")
    means = [
        federation.state(path).group("buffers")["between.running_mean"]
        for path in federation.tree.leaves()
    ]
    assert not torch.equal(means[0], means[1])


def test_fedbabu_trains_the_body_and_tunes_everything() -> None:
    federation = engine(FedBABU(epochs=4))
    results = run(federation)
    common = net()
    models = {}
    for number in (1, 2, 3):
        models = {name: copy.deepcopy(common) for name in clients()}
        for name, model in models.items():
            for batch in batches(name, number):
                move(model, gradient(model, batch), is_body)
        average(list(models.values()), is_body, common)
    root = federation.state().group("model")
    assert root.keys() == {"body.weight", "body.bias"}
    check({**root, **dict(net().head.named_parameters(prefix="head"))}, common)
    for name, client in clients().items():
        tuned = copy.deepcopy(common)
        for batch in batches(name, 3, 4):
            move(tuned, gradient(tuned, batch), always)
        inputs, labels = client.batch("test")
        correct = int((tuned(inputs).argmax(1) == labels).sum())
        assert results[-1].scores[f"root/{name}"]["test"]["accuracy"] == (correct, 10)


def test_fedbabu_can_tune_a_part() -> None:
    federation = engine(FedBABU(tuned=("head.*",)))
    node = federation.node("root/c0", 1)
    root, method = federation.state(), federation.method
    ((_, down),) = method.dispatch(
        federation.node(ROOT, 1), root, federation.children(ROOT, ["root/c0"])
    )
    work = method.tune(node, method.receive(node, State(), down))
    after = method.step(federation.setup, work, clients()["c0"].batch("train"), "train")
    moved = {n for n, p in after["params"].items() if not torch.equal(p, work["params"][n])}
    assert moved == {"head.weight", "head.bias"}


def test_ditto_pulls_personal_models_to_the_received_one() -> None:
    federation = engine(Ditto(mu=0.3))
    run(federation)
    plain = engine(FedAvg())
    run(plain)
    assert same(federation.state().group("model"), plain.state().group("model"))
    personal, common = {name: net() for name in clients()}, net()
    for number in (1, 2, 3):
        trained = {name: copy.deepcopy(common) for name in clients()}
        for name in clients():
            start = {n: p.detach().clone() for n, p in common.named_parameters()}
            for batch in batches(name, number):
                move(trained[name], gradient(trained[name], batch), always)
            for batch in batches(name, number):
                step = gradient(personal[name], batch)
                for n, p in personal[name].named_parameters():
                    step[n] += 0.3 * (p.detach() - start[n])
                move(personal[name], step, always)
        average(list(trained.values()), always, common)
    for name, model in personal.items():
        check(dict(federation.model_of(f"root/{name}").named_parameters()), model)


def test_ditto_without_pull_is_local_training_bit_for_bit() -> None:
    ours, local = engine(Ditto(mu=0.0)), engine(LocalOnly())
    run(ours), run(local)
    for path in ours.tree.leaves():
        assert same(ours.state(path).group("personal"), local.state(path).group("model"))


def test_pfedme_takes_several_steps_on_every_batch() -> None:
    method = PFedMe(lam=2.0, steps=3, local_lr=0.2, beta=0.7)
    federation = engine(method)
    run(federation)
    common = net()
    thetas: dict[str, Net] = {}
    for number in (1, 2, 3):
        locals_ = {name: copy.deepcopy(common) for name in clients()}
        for name, w in locals_.items():
            thetas[name] = theta = copy.deepcopy(common)
            for batch in batches(name, number):
                for _ in range(3):
                    step = gradient(theta, batch)
                    for (n, p), q in zip(theta.named_parameters(), w.parameters(), strict=True):
                        step[n] += 2.0 * (p.detach() - q.detach())
                    move(theta, step, always)
                for p, q in zip(w.parameters(), theta.parameters(), strict=True):
                    p.data -= 0.2 * 2.0 * (p.data - q.data)
        mean = copy.deepcopy(common)
        average(list(locals_.values()), always, mean)
        for p, q in zip(common.parameters(), mean.parameters(), strict=True):
            p.data.lerp_(q.data, 0.7)
    check(federation.state().group("model"), common)
    for name, theta in thetas.items():
        check(dict(federation.model_of(f"root/{name}").named_parameters()), theta)


def test_pfedme_steps_towards_the_mean_once_on_a_deep_tree() -> None:
    flat = engine(PFedMe(beta=0.5), data=clients(4))
    deep = engine(PFedMe(beta=0.5), data=clients(4), tree=Tree.grouped(clients(4), 2))
    run(flat, 1), run(deep, 1)
    moved = [e.state().group("model")["head.bias"] for e in (flat, deep)]
    start = flat.setup.task.params["head.bias"]
    # Batches differ with the paths, so the models are only near each other.
    assert (moved[0] - start).norm() == pytest.approx((moved[1] - start).norm(), rel=0.5)


def test_pfedme_refuses_rates_that_overshoot() -> None:
    with pytest.raises(InputError, match=r"training.lr: found 0.1 with method.lam = 15.0"):
        engine(PFedMe(lam=15.0))
    with pytest.raises(InputError, match=r"method.local_lr: found 2.0"):
        engine(PFedMe(local_lr=2.0))


def test_scaffold_corrects_every_step_by_the_control_variates() -> None:
    federation = engine(Scaffold(server_lr=0.8))
    run(federation)
    common = net()
    zeros = {n: torch.zeros_like(p) for n, p in common.named_parameters()}
    c, own = dict(zeros), {name: dict(zeros) for name in clients()}
    for number in (1, 2, 3):
        deltas, changes = [], []
        for name in clients():
            model, steps = copy.deepcopy(common), 0
            for batch in batches(name, number):
                step = gradient(model, batch)
                move(model, {n: step[n] - own[name][n] + c[n] for n in step}, always)
                steps += 1
            start = dict(common.named_parameters())
            new = {
                n: own[name][n] - c[n] + (start[n] - p).detach() / (steps * LR)
                for n, p in model.named_parameters()
            }
            deltas.append({n: (p - start[n]).detach() for n, p in model.named_parameters()})
            changes.append({n: new[n] - own[name][n] for n in new})
            own[name] = new
        for n, p in common.named_parameters():
            p.data += 0.8 * torch.stack([delta[n] for delta in deltas]).mean(0)
            c[n] = c[n] + torch.stack([change[n] for change in changes]).mean(0)
    check(federation.state().group("model"), common)
    for n, value in federation.state().group("control").items():
        torch.testing.assert_close(value, c[n])
    # With everybody asked the common variate is the mean of the clients' own.
    held = [
        federation.state(path).group("control")["head.bias"] for path in federation.tree.leaves()
    ]
    torch.testing.assert_close(torch.stack(held).mean(0), c["head.bias"])


def test_scaffold_spreads_the_change_over_all_children() -> None:
    setup = Setup(Task(Row(2)), Training())
    node = Node(ROOT, 1, 0, setup, num_children=4)
    method = Scaffold()
    replies = [
        Reply(
            f"c{k}",
            State(),
            Message(
                {
                    "model": {"w": torch.full((2,), float(k))},
                    "buffers": {},
                    "control": {"w": torch.full((2,), 4.0 * k)},
                },
                {"weight": 1},
            ),
        )
        for k in (1, 3)
    ]
    after = method.aggregate(node, method.start_root(node), replies)
    assert after.group("model")["w"].tolist() == [2, 2]  # the mean of those who replied
    assert after.group("control")["w"].tolist() == [4, 4]  # (4 + 12) / 4


def test_scaffold_s_first_round_and_one_client_are_fedavg_bit_for_bit() -> None:
    ours, plain = engine(Scaffold()), engine(FedAvg(weighting="uniform"))
    run(ours, 1), run(plain, 1)
    assert same(ours.state().group("model"), plain.state().group("model"))


@pytest.mark.parametrize(
    "training",
    [Training(momentum=0.9), Training(optimizer="adam"), Training(clip_norm=1.0)],
)
def test_scaffold_refuses_steps_that_are_no_mean_gradient(training: Training) -> None:
    with pytest.raises(InputError, match=r"training.optimizer"):
        engine(Scaffold(), training=training)


def test_lotteryfl_prunes_the_smallest_weights_where_it_is_good_enough_and_rewinds() -> None:
    method = LotteryFL(rate=0.25, target=0.5, accuracy=0.0)
    federation = engine(method)
    shares = []
    with federation as running:
        for number in range(1, 7):
            before = {path: running.state(path) for path in running.tree.leaves()}
            running.round(number)
            state = running.state("root/c0")
            mask = state.group("mask")
            shares.append(int(mask["body.weight"].sum()))
            assert not mask["body.bias"].any()
            for name, held in mask.items():
                assert bool((state.group("model")[name][held] == 0).all())
                old = before["root/c0"].group("mask").get(name, torch.zeros_like(held))
                assert torch.equal(held | old, held)
    # Of 24 entries: none in the first round, then a quarter of what is left, half at most.
    assert shares == [0, 6, 10, 12, 12, 12]


def test_lotteryfl_waits_for_its_accuracy() -> None:
    federation = engine(LotteryFL(accuracy=1.0))
    run(federation, 3)
    assert not any(mask.any() for mask in federation.state("root/c0").group("mask").values())


def test_lotteryfl_starts_again_from_initial_values_after_pruning() -> None:
    federation = engine(LotteryFL(rate=0.5, target=0.9, accuracy=0.0))
    run(federation, 1)
    method, path = federation.method, "root/c0"
    node = federation.leaf.node(Job(path, 2, clients()["c0"], State(), Message()))
    ((_, down),) = method.dispatch(
        federation.node(ROOT, 2), federation.state(), federation.children(ROOT, [path])
    )
    state = method.receive(node, federation.state(path), down)
    initial = federation.setup.task.params
    common = federation.state().group("model")["body.weight"]
    pruned = state.group("mask")["body.weight"]
    assert int(pruned.sum()) == 12
    assert common[pruned].abs().max() <= common[~pruned].abs().min()
    assert torch.equal(state.group("model")["body.weight"], initial["body.weight"] * ~pruned)


def test_lotteryfl_without_pruning_is_fedavg_bit_for_bit() -> None:
    ours, plain = engine(LotteryFL(rate=0.0)), engine(FedAvg(weighting="uniform"))
    run(ours), run(plain)
    assert same(ours.state().group("model"), plain.state().group("model"))


@pytest.mark.parametrize("method", [FedRep(), LGFedAvg(), FedBABU(), Ditto(), PFedMe()])
def test_absent_clients_keep_what_is_theirs(method: FedAvg) -> None:
    federation = engine(method, data=clients(6), participation=Participation(fraction=0.5))
    with federation as running:
        running.round(1)
        before = {path: running.state(path) for path in running.tree.leaves()}
        asked = {visit.path for visit in running.round(2).visits}
        for path, state in before.items():
            if path not in asked:
                assert running.state(path) == state
