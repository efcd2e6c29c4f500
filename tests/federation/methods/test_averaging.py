import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hansa.errors import InputError
from hansa.federation.methods import FedAvg, FedAvgTuned, FedPer, FedProx, LocalOnly
from hansa.federation.optimizer import Training
from hansa.federation.tree import ROOT, Tree
from hansa.seeding import generator
from support import clients, engine, net, run, same


def _plain_fedavg(rounds: int, weights: list[float], mu: float = 0.0) -> nn.Module:
    """The paper's Algorithm 1 in plain PyTorch, on the batches that the engine draws."""
    common = net()
    for number in range(1, rounds + 1):
        trained = []
        for name, data in clients().items():
            model = net()
            model.load_state_dict(common.state_dict())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            inputs, labels = data.batch("train")
            for epoch in range(2):
                stream = generator(5, f"root/{name}", number, epoch)
                for chosen in torch.randperm(len(labels), generator=stream).split(3):
                    loss = F.cross_entropy(model(inputs[chosen]), labels[chosen])
                    pairs = zip(model.parameters(), common.parameters(), strict=True)
                    loss = loss + mu / 2 * sum(((p - q.detach()) ** 2).sum() for p, q in pairs)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            trained.append(list(model.parameters()))
        for parts in zip(common.parameters(), *trained, strict=True):
            mean = sum(w * p.detach() for w, p in zip(weights, parts[1:], strict=True))
            parts[0].data.copy_(mean / sum(weights))
    return common


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_fedavg_is_the_papers_algorithm(weighting: str) -> None:
    federation = engine(FedAvg(weighting=weighting))  # type: ignore[arg-type]
    run(federation)
    for name, parameter in _plain_fedavg(3, [7, 7, 7]).named_parameters():
        torch.testing.assert_close(federation.state().group("model")[name], parameter.detach())


def test_fedavg_weights_by_samples() -> None:
    data = clients()
    small = clients(1, per_client=2)["c0"]
    federation = engine(FedAvg(), data={**data, "c0": small}, training=Training(epochs=1))
    run(federation, 1)
    replies = {}
    for name, held in {**data, "c0": small}.items():
        alone = engine(LocalOnly(), data={name: held}, training=Training(epochs=1))
        run(alone, 1)
        replies[name] = alone.state(f"root/{name}").group("model")["head.bias"]
    mean = (2 * replies["c0"] + 7 * replies["c1"] + 7 * replies["c2"]) / 16
    torch.testing.assert_close(federation.state().group("model")["head.bias"], mean)


def test_fedprox_adds_the_proximal_gradient() -> None:
    federation = engine(FedProx(mu=0.5))
    run(federation)
    for name, parameter in _plain_fedavg(3, [1, 1, 1], mu=0.5).named_parameters():
        torch.testing.assert_close(federation.state().group("model")[name], parameter.detach())


def test_fedprox_without_pull_is_fedavg_bit_for_bit() -> None:
    prox, plain = engine(FedProx(mu=0)), engine(FedAvg())
    run(prox), run(plain)
    assert same(prox.state().group("model"), plain.state().group("model"))


def test_local_only_sends_nothing_and_trains_each_client_alone() -> None:
    federation = engine(LocalOnly())
    results = run(federation)
    assert all(visit.up == visit.down == 0 for r in results for visit in r.visits)
    alone = engine(FedAvg(), data={"c1": clients()["c1"]})
    run(alone)
    assert same(federation.state("root/c1").group("model"), alone.state().group("model"))


def test_fedavg_tuned_trains_as_fedavg_and_scores_a_tuned_copy() -> None:
    tuned, plain = engine(FedAvgTuned()), engine(FedAvg())
    scored, common = run(tuned), run(plain)
    assert same(tuned.state().group("model"), plain.state().group("model"))
    assert all(not tuned.state(path) for path in tuned.tree.leaves())
    # After one more round of training, each client of FedAvg holds what was scored.
    last = dict(plain.state().group("model"))
    model, data = net(), clients()["c2"]
    model.load_state_dict(last)
    inputs, labels = data.batch("train")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(2):
        order = torch.randperm(len(labels), generator=generator(5, "root/c2", 3, epoch))
        for chosen in order.split(3):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
            optimizer.step()
    inputs, labels = data.batch("test")
    loss = F.cross_entropy(model(inputs), labels, reduction="sum").item()
    assert scored[-1].scores["root/c2"]["test"]["loss"][0] == pytest.approx(loss, rel=1e-5)
    assert common[-1].scores["root/c2"]["test"]["loss"][0] != pytest.approx(loss, rel=1e-3)


def test_fedavg_tuned_takes_its_own_number_of_epochs() -> None:
    one, two = run(engine(FedAvgTuned(epochs=1)), 1), run(engine(FedAvgTuned()), 1)
    assert one[0].scores != two[0].scores


def test_fedper_keeps_the_head_and_averages_the_body() -> None:
    federation = engine(FedPer())
    results = run(federation)
    assert federation.state().group("model").keys() == {"body.weight", "body.bias"}
    heads = [federation.state(p).group("model")["head.weight"] for p in federation.tree.leaves()]
    assert not torch.equal(heads[0], heads[1])
    everything = engine(FedAvg())
    assert results[0].visits[0].up < run(everything)[0].visits[0].up


def test_fedper_takes_patterns_and_refuses_those_that_fit_nothing() -> None:
    federation = engine(FedPer(personal=("body.*",)))
    run(federation, 1)
    assert federation.state().group("model").keys() == {"head.weight", "head.bias"}
    with pytest.raises(InputError, match=r"method.personal: found 'tail.\*'"):
        engine(FedPer(personal=("tail.*",)))


@pytest.mark.parametrize("method", [FedAvg(), FedProx(mu=0.1), FedPer(), LocalOnly()])
def test_a_tree_of_depth_two_gives_the_flat_mean(method: FedAvg) -> None:
    data = clients(5)
    # Whole batches, since the order of samples is drawn by path, which differs between the trees.
    training = Training(batch_size=7, epochs=2)
    flat = engine(method, data=data, training=training)
    deep = engine(method, data=data, training=training, tree=Tree.grouped(data, 2))
    run(flat), run(deep)
    for name, tensor in flat.state().group("model").items():
        torch.testing.assert_close(deep.state().group("model")[name], tensor)


def test_averaged_buffers_travel_and_local_ones_stay() -> None:
    data = clients(per_client=8)
    averaged = engine(FedAvg(), model=net(nn.BatchNorm1d(6)), data=data)
    local = engine(FedAvg(), model=net(nn.BatchNorm1d(6)), data=data, buffers="local")
    first, second = run(averaged), run(local)
    assert averaged.state().group("buffers").keys() == {
        "between.running_mean",
        "between.running_var",
        "between.num_batches_tracked",
    }
    assert averaged.state().group("buffers")["between.num_batches_tracked"].item() == 3 * 2 * 3
    assert not local.state().group("buffers")
    means = [local.state(p).group("buffers")["between.running_mean"] for p in local.tree.leaves()]
    assert not torch.equal(means[0], means[1])
    assert second[0].visits[0].up < first[0].visits[0].up


def test_the_common_model_survives_a_round_in_which_nobody_answers() -> None:
    from hansa.federation.participation import Participation

    nobody = Participation(deadline=0.001, step_seconds=1)
    federation = engine(FedAvg(), participation=nobody)
    before = federation.state().group("model")
    results = run(federation, 2)
    assert same(federation.state(ROOT).group("model"), before)
    assert {visit.fate for visit in results[0].visits} == {"late"}
