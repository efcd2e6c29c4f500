"""TracIn and DataInf: by brute force, by their signs, and against another implementation."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from tiny import BLANK, samples, task

from hansa.curation.gradients import Sketch, gradients, mean_gradient, stored
from hansa.curation.influence import datainf, products
from hansa.curation.scores import INFLUENCE, VALIDATION, Point, Sample, measure

MANY = [(f"what is {k}?", f"it is {word}{k}") for k in range(6) for word in ("red", "a stone")]


def rows(made, pair, sketch=None, entries=1 << 24):  # type: ignore[no-untyped-def]
    pieces = gradients(made, made.params, made.buffers, pair, sketch, entries)
    found = list(pieces)
    return {name: torch.cat([piece[name] for piece in found]) for name in found[0]}


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_of_samples_are_those_of_batches_of_one(lora: bool) -> None:
    made, (inputs, labels) = task(lora), samples()
    found = rows(made, (inputs, labels))
    for k in range(len(labels)):
        batch = inputs[k : k + 1], labels[k : k + 1]
        expected, _, _ = made.gradients(made.params, made.buffers, batch, training=False)
        for name, gradient in expected.items():
            assert gradient is not None
            assert torch.allclose(found[name][k], gradient.flatten(), atol=1e-6), name


def test_pieces_and_the_disk_change_nothing() -> None:
    made, pair = task(), samples(MANY)
    whole = rows(made, pair)
    size = sum(part.shape[1] for part in whole.values())
    pieces = list(gradients(made, made.params, made.buffers, pair, entries=5 * size))
    assert [len(next(iter(piece.values()))) for piece in pieces] == [5, 5, 2]
    with stored(iter(pieces)) as store:
        again = list(store.pieces(entries=7 * size))
        assert [len(next(iter(piece.values()))) for piece in again] == [7, 5]
        for name, part in whole.items():
            read = torch.cat([piece[name] for piece in again])
            assert torch.allclose(read, part, atol=1e-6)
    expected = {name: part.double().mean(0) for name, part in whole.items()}
    for name, mean in mean_gradient(iter(pieces)).items():
        assert torch.allclose(mean, expected[name], atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(num=st.integers(1, 12), width=st.integers(1, 8), seed=st.integers(0, 99))
def test_datainf_is_the_mean_of_inverses(num: int, width: int, seed: int) -> None:
    """The closed form against the inverse of each matrix g g^T + lambda I, made in full."""
    rng = torch.Generator().manual_seed(seed)
    parts = {n: torch.randn(num, width, generator=rng, dtype=torch.float64) for n in "ab"}
    v = {n: torch.randn(width, generator=rng, dtype=torch.float64) for n in "ab"}
    found = datainf(v, lambda: [parts])
    for name, part in parts.items():
        damping = 0.1 * part.square().mean()
        eye = damping * torch.eye(width, dtype=torch.float64)
        inverses = torch.stack([torch.linalg.inv(torch.outer(g, g) + eye) for g in part])
        expected = inverses.mean(0) @ v[name]
        assert torch.allclose(found[name], expected, rtol=1e-8, atol=1e-8)


def test_with_much_damping_datainf_ranks_as_the_inner_product() -> None:
    made, pair = task(), samples(MANY)
    part = rows(made, pair)
    v = {name: each[:3].double().mean(0) for name, each in part.items()}
    influence = datainf(v, lambda: [part], damping=1e6)
    found, _ = products({"plain": v, "damped": influence}, [part])
    assert spearmanr(found["plain"], found["damped"]).statistic > 0.999


def scored(made, pair, validation, *names):  # type: ignore[no-untyped-def]
    part = rows(made, validation)
    v = {name: each.double().mean(0) for name, each in part.items()}
    reference = rows(made, (torch.cat([pair[0]]), torch.cat([pair[1]])))
    directions = {VALIDATION: v, INFLUENCE: datainf(v, lambda: [reference])}
    point = Point(made.params, 0.5, directions)
    return measure(names, Sample(made, made.buffers, point, [point], pair, BLANK))


def test_a_copy_of_a_validation_sample_helps_and_its_opposite_does_not() -> None:
    """Of forty others a copy is in the top 5 %, its twin with another answer below the median."""
    others = [(f"what of {k}?", f"{'abcdefgh'[k % 8] * 4}{k}") for k in range(40)]
    good, bad = ("is it so?", "yes yes yes"), ("is it so?", "qqq qqq qqq")
    made = task(lora=False)
    pair = samples([*others, good, bad])
    found = scored(made, pair, samples([good]), "tracin", "datainf", "gradient_cosine")
    for name, values in found.items():
        ranks = values.argsort().argsort()
        assert int(ranks[40]) >= 40, name
        assert int(ranks[41]) < 41, name
    assert float(found["gradient_cosine"][40]) == pytest.approx(1, abs=1e-5)


def test_checkpoints_are_weighted_by_their_rates() -> None:
    made, pair = task(), samples(MANY[:4])
    part = rows(made, pair)
    v = {name: each[0].double() for name, each in part.items()}
    dots = products({"v": v}, [part])[0]["v"]
    first, second = (Point(made.params, rate, {VALIDATION: v}) for rate in (0.5, 0.25))
    sample = Sample(made, made.buffers, first, [first, second], pair, BLANK)
    found = measure(["tracin", "gradient_cosine"], sample)
    assert torch.allclose(found["tracin"], 0.75 * dots)
    joined = torch.cat([each.double() for each in part.values()], 1)
    expected = torch.cosine_similarity(joined, joined[:1])
    assert torch.allclose(found["gradient_cosine"], expected)


def test_a_sketch_keeps_inner_products_in_expectation() -> None:
    rng = torch.Generator().manual_seed(0)
    pair = torch.randn(2, 400, generator=rng)
    exact = float(pair[0] @ pair[1])
    found = []
    for seed in range(200):
        first, second = Sketch(64, seed)("block", pair)
        found.append(float(first @ second))
    spread = float(torch.tensor(found).std()) / 200**0.5
    assert abs(sum(found) / 200 - exact) < 4 * spread
    assert Sketch(400)("block", pair) is pair


@pytest.mark.filterwarnings("ignore")
def test_ranks_agree_with_another_implementation() -> None:
    """TracIn and DataInf by the library dattri, on the same model, loss and samples."""
    from dattri.algorithm.influence_function import IFAttributorDataInf
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    made = task(lora=False)
    train, validation = samples(MANY), samples(MANY[3:6])

    def loss(params, sample):  # type: ignore[no-untyped-def]
        inputs, labels = (part.reshape(-1, part.shape[-1]) for part in sample)
        return made.loss(params, made.buffers, (inputs, labels), training=False)[0]

    model = copy.deepcopy(made.module).eval()
    state = {name: value for name, value in model.state_dict().items() if name in made.params}
    theirs = AttributionTask(loss_func=loss, model=model, checkpoints=[state])
    loaders = [
        DataLoader(TensorDataset(*pair), batch_size=len(pair[0])) for pair in (train, validation)
    ]
    attributor = TracInAttributor(
        task=theirs, weight_list=torch.ones(1), normalized_grad=False, device="cpu"
    )
    attributor.projector_kwargs = None  # by default it projects at random
    tracin = attributor.attribute(*loaders)
    inverse = IFAttributorDataInf(task=theirs, device="cpu", regularization=0.1)
    inverse.cache(loaders[0])
    influence = inverse.attribute(*loaders)

    part, direction = rows(made, train), rows(made, validation)
    v = {name: each.double().mean(0) for name, each in direction.items()}
    h = datainf(v, lambda: [part], damping=0.1)
    found, _ = products({"tracin": v, "datainf": h}, [part])
    assert spearmanr(found["tracin"], tracin.detach().mean(1)).statistic > 0.99
    assert spearmanr(found["datainf"], influence.detach().mean(1)).statistic > 0.99
