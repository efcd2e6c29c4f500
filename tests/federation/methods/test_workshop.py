"""FedSelect's workshop form: acceptance test 7, and what its own algorithm adds."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from hansa.federation.leaf import DivergedError, Job, Leaf
from hansa.federation.message import Message, State
from hansa.federation.methods import FedAvg, FedSelect
from hansa.federation.methods.masks import keep
from hansa.federation.optimizer import Training
from hansa.federation.store import link_key
from hansa.federation.tree import ROOT
from hansa.seeding import generator
from support import Net, alternating_sgd, clients, engine, everything, net, run, same


def wide() -> Net:
    """A model whose tensors are large enough for shares to be met within rounding."""
    torch.manual_seed(0)
    model = Net()
    model.body, model.head = torch.nn.Linear(4, 64), torch.nn.Linear(64, 3)
    return model


def workshop(**options: object) -> FedSelect:
    return FedSelect(mode="workshop", **{"iterations": 3, "select_epochs": 1, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("quota", ["tensor", "global"])
@pytest.mark.parametrize(("rate", "iterations"), [(0.25, 5), (0.5, 5), (0.75, 5), (0.5, 2)])
def test_the_personal_share_is_the_rate_to_the_number_of_iterations(
    rate: float, iterations: int, quota: str
) -> None:
    federation = engine(
        workshop(rate=rate, iterations=iterations, quota=quota), model=wide(), data=clients(2)
    )
    run(federation, 2)
    for path in federation.tree.leaves():
        masks = federation.state(path).group("mask")
        rows = [torch.cat([m.flatten() for m in masks.values()])] if quota == "global" else masks
        for mask in masks.values() if quota == "tensor" else rows:
            left = mask.numel()
            for _ in range(iterations):
                left = round(rate * left)
            assert int(mask.sum()) == left
            # Each rounding is off by half an entry at most, and later ones shrink it.
            assert abs(left - rate**iterations * mask.numel()) <= 0.5 / (1 - rate)


def test_keep_takes_the_largest_part_and_the_first_of_equals() -> None:
    mask = torch.tensor([1, 1, 0, 1, 1], dtype=torch.bool)
    assert keep(mask, torch.tensor([1.0, 3, 9, 2, 3]), 0.5).tolist() == [0, 1, 0, 0, 1]
    assert keep(mask, torch.zeros(5), 0.5).tolist() == [1, 1, 0, 0, 0]
    assert keep(mask, torch.zeros(5), 0.0).sum() == 0
    assert torch.equal(keep(mask, torch.zeros(5), 1.0), mask)


def _select(model: Net, start: dict[str, torch.Tensor], data, path: str, number: int):
    """GradLTN in plain PyTorch: masked training, dropping half, rewinding, three times."""
    inputs, labels = data.batch("train")
    mask = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in start.items()}
    for k in range(3):
        model.load_state_dict(start)
        order = torch.randperm(len(labels), generator=generator(5, path, number, f"select{k}", 0))
        for chosen in order.split(3):
            model.zero_grad()
            F.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter -= 0.1 * parameter.grad * mask[name]
        for name, parameter in model.named_parameters():
            moved = (parameter.detach() - start[name]).abs().flatten()
            alive = mask[name].flatten().nonzero().flatten()
            ranked = sorted(alive.tolist(), key=lambda j, m=moved: (-float(m[j]), j))
            mask[name] = torch.zeros_like(mask[name])
            mask[name].view(-1)[ranked[: round(0.5 * len(alive))]] = True
    model.load_state_dict(start)
    return mask


def test_a_round_is_that_of_plain_pytorch() -> None:
    federation = engine(workshop(rate=0.5), training=Training(lr=0.1, batch_size=3, epochs=2))
    with federation as running:
        running.round(1)
        running.round(2)
    before = {name: p.detach().clone() for name, p in net().state_dict().items()}
    starts = dict.fromkeys(federation.tree.leaves(), before)
    for number in (1, 2):
        trained, masks = {}, {}
        for name, data in clients().items():
            path = f"root/{name}"
            model = net()
            masks[path] = _select(model, starts[path], data, path, number)
            alternating_sgd(model, data, path, number, masks[path])
            trained[path] = {n: p.detach().clone() for n, p in model.named_parameters()}
        common = {}
        for n, last in before.items():
            shared = torch.stack([~masks[path][n] for path in trained])
            values = torch.stack([trained[path][n] for path in trained])
            mean = (values * shared).sum(0) / shared.sum(0)
            common[n] = torch.where(shared.any(0), mean, last)
        before = common
        starts = {
            path: {n: torch.where(masks[path][n], trained[path][n], common[n]) for n in common}
            for path in trained
        }
    for path in trained:
        state = federation.state(path)
        for n in common:
            assert torch.equal(state.group("mask")[n], masks[path][n])
            torch.testing.assert_close(state.group("model")[n], trained[path][n])
            torch.testing.assert_close(federation.state().group("model")[n], common[n])


def test_training_starts_from_the_round_s_values_and_not_from_the_selection_s() -> None:
    federation = engine(workshop(rate=0.5, iterations=1))
    method, setup = federation.method, federation.setup
    leaf = Leaf(method, setup, 5)
    client = clients()["c0"]
    node = leaf.node(Job("root/c0", 1, client, State(), Message()))
    ((_, down),) = method.dispatch(node, federation.state(), federation.children(ROOT, ["root/c0"]))
    state = method.receive(node, State(), down)
    work = method.begin(node, state)
    for _ in range(3):
        work = method.step(setup, work, client.batch("train"), "select")
    assert not same(work["params"], state.group("model"))
    work = method.after(node, work, "select0")
    assert same(work["params"], state.group("model"))
    assert float(work["metrics"]["count"]) == 0


def test_clients_with_disjoint_classes_find_different_masks() -> None:
    data = {}
    for k, client in enumerate(clients(2, 12).values()):
        inputs, _ = client.batch("train")
        data[f"c{k}"] = type(client).of(
            (inputs, torch.full((12,), k)), test=(inputs, torch.full((12,), k))
        )
    federation = engine(workshop(rate=0.5, iterations=2), model=wide(), data=data)
    with federation as running:
        running.round(1)
        result = running.round(2, pairs=True)
    (overlap,) = (total / count for _, _, name, total, count in result.pairs if name == "iou")
    assert 0 < overlap < 1
    first, second = (federation.state(path).group("mask") for path in federation.tree.leaves())
    both = sum(int((first[n] & second[n]).sum()) for n in first)
    either = sum(int((first[n] | second[n]).sum()) for n in first)
    assert overlap == both / either


def test_a_mask_is_made_anew_in_every_round_and_the_parent_knows_it() -> None:
    federation = engine(workshop(rate=0.5, iterations=1))
    masks = []
    with federation as running:
        for number in range(1, 5):
            running.round(number)
            state = running.state("root/c0")
            masks.append(state.group("mask"))
            link = running.store.get(link_key(ROOT, "root/c0"))
            assert same(link.group("next"), state.group("mask"))
    gone = [
        bool((before[n] & ~after[n]).any()) for before, after in pairwise(masks) for n in before
    ]
    assert any(gone)  # entries are given back, which the conference form never does


def test_nothing_personal_is_fedavg_bit_for_bit() -> None:
    ours, plain = engine(workshop(rate=0.0)), engine(FedAvg(weighting="uniform"))
    run(ours), run(plain)
    assert same(ours.state().group("model"), plain.state().group("model"))


def test_biases_can_be_left_out() -> None:
    federation = engine(workshop(rate=0.75, biases=False))
    run(federation, 1)
    masks = federation.state("root/c0").group("mask")
    assert not masks["body.bias"].any()
    assert masks["body.weight"].any()


def test_two_runs_are_equal_bit_for_bit() -> None:
    first, second = engine(workshop()), engine(workshop())
    assert everything(first, run(first)) == everything(second, run(second))


def test_adam_starts_afresh_after_every_rewind() -> None:
    federation = engine(workshop(), training=Training(optimizer="adam", lr=0.01, batch_size=3))
    method, setup = federation.method, federation.setup
    node = federation.leaf.node(Job("root/c0", 1, clients()["c0"], State(), Message()))
    ((_, down),) = method.dispatch(node, federation.state(), federation.children(ROOT, ["root/c0"]))
    state = method.receive(node, State(), down)
    batch = clients()["c0"].batch("train")
    begun = method.begin(node, state)
    once = method.step(setup, begun, batch, "select")
    # Everything stays a candidate, so the first step of the second iteration is the same one.
    free = FedSelect(mode="workshop", rate=1.0, iterations=3, select_epochs=1)
    again = method.step(setup, free.after(node, once, "select0"), batch, "select")
    assert same(again["params"], once["params"])


def test_a_loss_that_is_no_number_in_a_selection_is_not_rewound_away() -> None:
    training = Training(lr=1e30, batch_size=3)
    with pytest.raises(DivergedError):
        run(engine(workshop(select_epochs=3), training=training), 1)
