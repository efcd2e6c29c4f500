"""One mask for a federation, against the pooled data, and as the ledger counts it."""

import pytest
import torch
from torch import nn

import hansa
from hansa import Federation, Training
from hansa.bundle import read_bundle
from hansa.errors import InputError
from hansa.federation.engines.engine import RoundResult
from hansa.federation.engines.plan import EngineOptions
from hansa.federation.leaf import DivergedError
from hansa.federation.methods import METHODS
from hansa.federation.tree import Tree
from hansa.models.masks import attach
from hansa.pruning import Snip, find_masks, scores, select
from hansa.pruning.federated import pre_round
from hansa.pruning.options import PruningOptions
from hansa.pruning.select import count
from support import FEATURES, clients, config, made, net, same

TRAINING = Training(lr=0.1, batch_size=3, epochs=2)


def pooled(data: dict[str, hansa.Client]) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = zip(*(client.batch("train") for client in data.values()), strict=True)
    return torch.cat(inputs), torch.cat(labels)


@pytest.mark.parametrize("federations", [1, 2])
@pytest.mark.parametrize(
    ("method", "options", "exchanges"),
    [
        ("prospr", {}, 7),
        ("prospr", {"momentum": 0.9, "inner_lr": 0.5}, 7),
        ("prospr", {"momentum": 0.9, "first_step": "official"}, 7),
        ("prospr", {"inner_steps": 1}, 3),
        ("prospr", {"order": "first"}, 4),
        ("snip", {}, 1),
    ],
)
def test_combined_gradients_give_the_masks_of_the_pooled_data(
    method, options, exchanges, federations
) -> None:
    data, model = clients(4), net().double()
    double = {
        name: hansa.Client.of(*((x.double(), y) for x, y in map(client.batch, ("train", "test"))))
        for name, client in data.items()
    }
    wanted = PruningOptions(method=method, options=options, combine="gradients", density=0.3)
    tree = Tree.grouped(data, federations)
    masks, result = pre_round(model, double, wanted, TRAINING, tree=tree)
    batch = pooled(double)
    expected = find_masks(model, [batch] * 4, 0.3, wanted.scorer).masks
    assert same(masks, expected)
    asked = [visit for visit in result.visits if visit.path.endswith("/c0")]
    assert len(asked) == exchanges + 1  # and once for the masks
    assert asked[-1].up == 0
    assert result.number == 0


def test_clients_scores_are_averaged_by_their_samples() -> None:
    data, model = clients(3), net()
    wanted = PruningOptions(method="snip", density=0.3, batch_size=1000)
    masks, result = pre_round(model, data, wanted, TRAINING)
    each = [scores(model, [client.batch("train")], scorer=Snip()) for client in data.values()]
    sizes = [client.count("train") for client in data.values()]
    mean = {
        name: sum(n * own[name].double() for n, own in zip(sizes, each, strict=True)) / sum(sizes)
        for name in each[0]
    }
    assert same(masks, select({name: t.float() for name, t in mean.items()}, 0.3))
    assert len(result.visits) == 2 * 3


def test_iterations_are_nested_and_send_less_and_less() -> None:
    data, model = clients(3), nn.Sequential(nn.Linear(FEATURES, 300), nn.ReLU(), nn.Linear(300, 3))
    before = None
    for iterations in (1, 2, 3):  # the same schedule, looked at after each of its steps
        density = 0.1 ** (iterations / 3)
        options = PruningOptions(method="magnitude", density=density, iterations=iterations)
        masks, _ = pre_round(model, data, options, TRAINING)
        assert before is None or all((before[name] | ~masks[name]).all() for name in masks)
        before = masks
    options = PruningOptions(method="snip", density=0.1, iterations=3)
    masks, result = pre_round(model, data, options, TRAINING)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == count(0.1, total)
    down = [visit.down for visit in result.visits if visit.path == "root/c0"]
    assert len(down) == 4
    assert down == sorted(down, reverse=True)
    assert down[3] < 0.1 * down[0]  # bits


@pytest.mark.parametrize("combine", ["scores", "gradients"])
def test_a_client_whose_loss_is_no_number_stops_the_search_or_is_left_out(combine) -> None:
    data = clients(3)
    inputs, labels = data["c1"].batch("train")
    bad = {**data, "c1": hansa.Client.of((inputs * float("inf"), labels), data["c1"].batch("test"))}
    options = PruningOptions(method="snip", density=0.3, combine=combine, batch_size=100)
    with pytest.raises(DivergedError, match="c1"):
        pre_round(net(), bad, options, TRAINING)
    masks, result = pre_round(net(), bad, options, TRAINING, on_failure="drop")
    assert {visit.path for visit in result.visits if visit.fate == "failed"} == {"root/c1"}
    others = {name: client for name, client in data.items() if name != "c1"}
    assert same(masks, pre_round(net(), others, options, TRAINING)[0])


@pytest.mark.parametrize("method", ["random", "magnitude", "synflow"])
def test_what_sees_no_data_asks_nothing(method) -> None:
    data, model = clients(3), net()
    wanted = PruningOptions(method=method, density=0.2, iterations=2)
    masks, result = pre_round(model, data, wanted, TRAINING, seed=3)
    inputs = next(iter(data.values())).batch("train")[0][:1]
    batch = (inputs, torch.zeros(1, dtype=torch.int64))
    expected = find_masks(model, [batch], 0.2, wanted.scorer, iterations=2, seed=3).masks
    assert same(masks, expected)
    assert [visit.up for visit in result.visits] == [0, 0, 0]
    assert all(visit.down for visit in result.visits)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"method": "grasp", "combine": "gradients"}, "pruning.combine"),
        ({"method": "snip", "combine": "gradients", "iterations": 2}, "pruning.iterations"),
        ({"combine": "gradients", "options": {"order": "unrolled"}}, "pruning.options.order"),
        ({"method": "force"}, "pruning.method"),
        ({"exclude": ["nope"]}, "pruning.exclude"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, key) -> None:
    with pytest.raises(InputError) as caught:
        pre_round(net(), clients(2), PruningOptions(density=0.5, **options), TRAINING)
    assert caught.value.key == key


@pytest.mark.parametrize("kind", ["sequential", "stacked"])
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_trains_under_masks(name, kind) -> None:
    """Masked entries are zero at the root and at every client, and stacks agree with one by one."""
    model, data = net(), clients(3)
    masks = find_masks(model, [pooled(data)], 0.3, Snip()).masks
    attach(model, masks)
    stack = {"stack": 2} if kind == "stacked" else {}
    heavy = {} if name == "scaffold" else {"momentum": 0.9, "weight_decay": 0.01}
    training = Training(lr=0.1, batch_size=3, **heavy)  # type: ignore[arg-type]
    federation = Federation(
        model,
        data,
        made(name),
        training,
        engine=EngineOptions(kind=kind, workers=1, **stack),  # type: ignore[arg-type]
    )
    federation.run(2)
    names = list(data) + (["root"] if METHODS[name].common else [])
    for node in names:
        held = federation.model_of(node).state_dict()
        assert held.keys() == net().state_dict().keys()
        for key, mask in masks.items():
            assert not held[key][~mask].any(), (node, key)
            assert held[key][mask].any()


def test_a_run_prunes_once_counts_it_and_goes_on(tmp_path) -> None:
    values = config(tmp_path)
    values["pruning"] = {"method": "prospr", "density": 0.25, "combine": "gradients"}
    run = hansa.train(values)
    masks = run.masks
    assert masks is not None
    ledger = run.history.table("ledger").to_pylist()
    first = [row for row in ledger if row["round"] == 0]
    num_clients = int(run.checkpoint["clients"])
    assert len(first) == 8 * num_clients  # seven exchanges and the masks
    assert run.summary()["bytes"]["up"] == sum(row["up"] for row in ledger)
    bundle = read_bundle(run.path / "bundle")
    assert same(bundle.kept, masks)
    for name, mask in masks.items():
        assert not bundle.weights[name][~mask].any()
        assert mask.sum() == bundle.weights[name].count_nonzero()
    # What is zero is not sent: after the pre-round messages are small.
    dense = hansa.train({**config(tmp_path), "name": "dense"})
    up = [
        sum(row["up"] for row in each if row["round"])
        for each in (ledger, dense.history.table("ledger").to_pylist())
    ]
    assert up[0] < 0.8 * up[1]

    # In two parts it is the same run.
    parts = hansa.train({**values, "name": "parts", "rounds": 1})
    again = hansa.train(resume=parts.path, overrides=[f"rounds={values['rounds']}"])
    assert same(again.masks or {}, masks)
    assert again.history.table("ledger").equals(run.history.table("ledger"))
    assert same(read_bundle(again.path / "bundle").weights, bundle.weights)
    opened = hansa.Run(run.path)
    assert opened.history.table("ledger").equals(run.history.table("ledger"))
    assert opened.round == run.round

    # The bundle is where another run may begin, under the same masks.
    values = {**config(tmp_path), "name": "after"}
    values["model"] = {**values.get("model", {}), "bundle": str(run.path / "bundle")}
    after = hansa.train(values)
    assert same(read_bundle(after.path / "bundle").kept, masks)
    own = hansa.export(after, "client-0", tmp_path / "own")
    assert same(own.kept, masks)
    assert own.masks  # its personal entries


def test_wrong_options_leave_nothing_behind(tmp_path) -> None:
    for wrong in ({"exclude": ["nope"]}, {"method": "force"}, {"density": 1e-6}):
        with pytest.raises(InputError, match=r"pruning\."):
            hansa.train({**config(tmp_path), "pruning": {"density": 0.5, **wrong}})
    assert not list(tmp_path.iterdir())


def test_a_kill_before_the_masks_are_there_begins_again(tmp_path, monkeypatch) -> None:
    values = {**config(tmp_path), "pruning": {"method": "snip", "density": 0.25}}
    whole = hansa.train(values)

    def killed(run: hansa.Run, masks: object, result: RoundResult) -> None:
        run.record(result, None)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(hansa.Run, "keep_masks", killed)
        with pytest.raises(KeyboardInterrupt):
            hansa.train({**values, "name": "cut"})
    again = hansa.train(resume=tmp_path / "cut-seed0")
    assert same(again.masks or {}, whole.masks or {})
    assert again.history.table("ledger").equals(whole.history.table("ledger"))


def test_batches_are_drawn_from_the_seed() -> None:
    data = clients(3)
    found = [
        pre_round(net(), data, PruningOptions(density=0.3), TRAINING, seed=seed)[0]
        for seed in (0, 0, 1)
    ]
    assert same(found[0], found[1])
    assert not same(found[0], found[2])
