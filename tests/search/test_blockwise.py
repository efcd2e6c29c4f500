"""Blocks: the teacher's inputs, the best weights, resumption, and models made of them."""

import json

import numpy as np
import pytest
import torch

from hansa.errors import InputError
from hansa.models.blox import Blox
from hansa.models.blox_space import cells_of, id_of_cells
from hansa.search.blocks import assemble, read_blocks
from hansa.search.blockwise import BlockFitting, train_blocks
from hansa.search.fitting import Fitting
from hansa.search.teacher import features, logits_after
from hansa.search.tuning import fine_tune, logits_of, scores_of, swap_accuracies
from search.blocks import OPTIONS, inputs, labels, teacher

WHICH = [(0, 0), (0, 5), (1, 20), (2, 44), (2, 2)]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    return train_blocks(teacher(), inputs(), inputs(6, 1), folder, OPTIONS, 3, which=WHICH)


def _bytes(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_features_are_the_teachers_in_evaluation_mode(tmp_path) -> None:
    network, x = teacher(), inputs()
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = features(network, x)
    mapped = features(network, x, tmp_path)
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    network.eval()
    with torch.no_grad():
        for own, other, expected in zip(found.maps, mapped.maps, network.features(x), strict=True):
            torch.testing.assert_close(own, expected)
            assert torch.equal(own, other)
        for k, maps in enumerate(found.maps):
            torch.testing.assert_close(logits_after(network, k - 1, maps), network(x))
    assert found.num_bytes == 12 * 7.5 * 4 * 8**2
    torch.testing.assert_close(found.variance[1], found.maps[1].var((0, 2, 3), correction=0))
    with pytest.raises(InputError, match="inputs"):
        features(network, x[:0])


def test_a_block_that_is_the_teachers_stage_has_no_error(tmp_path) -> None:
    network = teacher()
    cells = cells_of(network.number)
    options = BlockFitting(steps=1, batch_size=4, lr=1e-12, evaluations=1)
    which = [(stage, cells[stage]) for stage in range(3)]
    blocks = train_blocks(network, inputs(), inputs(6, 1), tmp_path, options, which=which)
    # The reduction began as the teacher's, the cell's weights were drawn.
    held = features(network, inputs(6, 1))
    for stage, cell in which:
        block = blocks.stage(stage, cell)
        with torch.no_grad():
            error = (block(held.maps[stage]) - held.maps[stage + 1]).square().mean()
            assert float(error) == pytest.approx(blocks.scores["mse"][stage, cell], rel=1e-4)
            assert float(error) > 1e-4
            for name, value in network.stages[stage].named_parameters():
                if name.startswith("reduction") or value.ndim > 1:  # norms all begin alike
                    same = torch.allclose(block.get_parameter(name), value)
                    assert same == name.startswith("reduction")
            block.load_state_dict(network.stages[stage].state_dict())
            torch.testing.assert_close(block(held.maps[stage]), held.maps[stage + 1])


def test_scores_are_of_validation_data_and_of_the_kept_weights(blocks) -> None:
    held = features(teacher(), inputs(6, 1))
    assert sorted({*blocks.missing, *WHICH}) == sorted((k, c) for k in range(3) for c in range(45))
    assert len(blocks.missing) == 135 - len(WHICH)
    for stage, cell in WHICH:
        with torch.no_grad():
            error = blocks.stage(stage, cell)(held.maps[stage]) - held.maps[stage + 1]
        by_channel = error.square().mean((0, 2, 3))
        assert float(by_channel.mean()) == pytest.approx(blocks.scores["mse"][stage, cell])
        variance = held.variance[stage + 1]
        ratio = (by_channel / variance.clamp(min=float(variance.mean()) / 100)).mean()
        assert float(ratio) == pytest.approx(blocks.scores["nsr"][stage, cell], rel=1e-4)


def test_training_lowers_the_error(tmp_path) -> None:
    found = []
    for steps in (1, 30):
        options = BlockFitting(steps=steps, batch_size=6, loss="mse", evaluations=1)
        made = train_blocks(
            teacher(), inputs(24), inputs(24), tmp_path / str(steps), options, which=[(2, 3)]
        )
        found.append(made.scores["mse"][2, 3])
    assert found[1] < 0.6 * found[0]


def test_the_best_weights_are_kept(tmp_path) -> None:
    # At this rate the last steps are not the best ones.
    options = BlockFitting(steps=12, batch_size=4, lr=3.0, evaluations=12)
    data = teacher(), inputs(), inputs(6, 1)
    made = [
        train_blocks(
            *data,
            tmp_path / str(num),
            options.model_copy(update={"evaluations": num}),
            which=[(0, 0), (1, 1)],
        ).scores["nsr"]
        for num in (1, 12)
    ]
    assert made[1][0, 0] < made[0][0, 0]
    assert made[1][1, 1] <= made[0][1, 1]


def test_an_interrupted_training_ends_with_the_same_bits(blocks, tmp_path) -> None:
    class KilledError(Exception):
        pass

    seen = []

    def watch(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            raise KilledError

    data = teacher(), inputs(), inputs(6, 1), tmp_path, OPTIONS, 3
    with pytest.raises(KilledError):
        train_blocks(*data, which=WHICH[::-1], watch=watch)
    assert len(read_blocks(tmp_path).missing) == 133
    again = train_blocks(*data, which=WHICH, watch=lambda *each: seen.append(each))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert _bytes(tmp_path) == _bytes(blocks.folder)
    for name in ("mse", "nsr"):
        np.testing.assert_array_equal(again.scores[name], blocks.scores[name])


def test_processes_and_mapped_features_change_nothing(blocks, tmp_path) -> None:
    data = teacher(), inputs(), inputs(6, 1), tmp_path, OPTIONS, 3
    train_blocks(*data, which=WHICH, workers=1, is_mapped=True)
    assert _bytes(tmp_path) == _bytes(blocks.folder)


def test_blocks_of_something_else_are_refused(blocks, tmp_path) -> None:
    folder = blocks.folder
    with pytest.raises(InputError, match="blocks of another seed"):
        train_blocks(teacher(), inputs(), inputs(6, 1), folder, OPTIONS, 4)
    with pytest.raises(InputError, match="blocks of another shape"):
        train_blocks(teacher("group"), inputs(), inputs(6, 1), folder, OPTIONS, 3)
    with pytest.raises(InputError, match="blocks of another validation"):
        train_blocks(teacher(), inputs(), inputs(6, 2), folder, OPTIONS, 3)
    with pytest.raises(InputError, match="no blocks"):
        read_blocks(tmp_path)
    (tmp_path / "blocks.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(InputError, match="format: found 9; allowed: 1"):
        read_blocks(tmp_path)
    (tmp_path / "blocks.json").write_text((folder / "blocks.json").read_text())
    (tmp_path / "stage-0-cell-07.safetensors").write_bytes(b"garbage")
    with pytest.raises(InputError, match="stage-0-cell-07"):
        read_blocks(tmp_path)


def test_an_assembled_model_equals_its_parts(blocks) -> None:
    network, x = teacher().eval(), inputs(6, 1)
    made = assemble(blocks, id_of_cells([5, 20, 44]))
    assert isinstance(made, Blox)
    assert cells_of(made.number) == (5, 20, 44)
    with torch.no_grad():
        maps = network.stem(x)
        for stage, cell in enumerate((5, 20, 44)):
            maps = blocks.stage(stage, cell)(maps)
        assert torch.equal(made(x), network.head(maps.mean((2, 3))))
        assert torch.equal(assemble(blocks, [5, 20, 44])(x), made(x))
    with pytest.raises(InputError, match="stage-1-cell-21"):
        assemble(blocks, [5, 21, 44])


def test_swapped_accuracy_is_that_of_the_teacher_with_one_other_stage(blocks) -> None:
    network, x, y = teacher(), inputs(6, 1), labels(6)
    found = swap_accuracies(blocks, network, features(network, x), y, WHICH)
    assert np.isfinite(found).sum() == len(WHICH)
    for stage, cell in WHICH:
        other = teacher().eval()
        other.stages[stage] = blocks.stage(stage, cell)
        assert found[stage, cell] == scores_of(other, (x, y))["accuracy"]


def test_fine_tuning_follows_the_teacher_and_keeps_the_best(blocks) -> None:
    network, x = teacher(), inputs(24)
    with torch.no_grad():
        network.head.weight.mul_(20)  # a teacher that is sure of something
    answers = logits_of(network, x).argmax(1)
    model = assemble(blocks, [5, 20, 44])
    # All weight on the teacher: wrong labels do not matter.
    options = Fitting(steps=40, batch_size=8, evaluations=4)
    found = fine_tune(model, network, (x, (answers + 1) % 5), (x, answers), options, share=1.0)
    assert scores_of(model, (x, answers)) == found.figures
    assert found.figures["accuracy"] >= 0.45  # by the wrong labels it would be near 0
    assert found.step in range(10, 41, 10)


def test_without_a_teacher_labels_alone_count(blocks) -> None:
    x, y = inputs(24), labels(24)
    model = assemble(blocks, [5, 20, 44])
    assert scores_of(model, (x, y))["accuracy"] < 0.5
    # Half as many steps are enough with some processors' roundings and not with others'.
    found = fine_tune(model, None, (x, y), (x, y), Fitting(steps=80, batch_size=8))
    assert found.figures["accuracy"] >= 0.9
