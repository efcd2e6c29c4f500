import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hansa import bundle
from hansa.bundle import ARCHITECTURE, CARD, MASKS, WEIGHTS, Bundle
from hansa.errors import InputError
from hansa.files import new_folder, sync_folder, write_atomic

WHOLE: dict[str, Any] = {
    "stage": "train",
    "weights": {"w": torch.tensor([1.0, -2.5]), "steps": torch.tensor(3)},
    "architecture": {"name": "mlp", "shape": [1, 8, 8]},
    "config": {"rounds": 2, "method": {"name": "fedavg"}},
    "seed": 7,
    "data": "ab12",
    "metrics": {"accuracy": 0.5},
    "masks": {"w": torch.tensor([True, False])},
}


def write(path: Path, **changes: Any) -> Bundle:
    return bundle.write(path, **{**WHOLE, **changes})


def digest_of(path: Path) -> str | None:
    """Return the digest that a reader sees, None if it refuses the bundle."""
    try:
        return bundle.read_bundle(path).digest
    except InputError:
        return None


def test_a_bundle_comes_back_as_it_was_written(tmp_path: Path) -> None:
    weights = {
        "half": torch.tensor([0.5, 3.0], dtype=torch.bfloat16),
        "double": torch.tensor([[1e-300]], dtype=torch.float64),
        "none": torch.zeros(0, 4),
        "count": torch.tensor(5),
    }
    write(tmp_path / "b", weights=weights)
    back = bundle.read_bundle(tmp_path / "b")
    assert back.weights.keys() == weights.keys()
    for name, tensor in weights.items():
        assert back.weights[name].dtype == tensor.dtype
        assert torch.equal(back.weights[name], tensor)
    assert back.masks["w"].tolist() == [True, False]
    assert back.masks["w"].dtype == torch.bool
    assert back.architecture == {"name": "mlp", "shape": [1, 8, 8]}


def test_the_card_tells_where_the_model_comes_from(tmp_path: Path) -> None:
    card = dict(write(tmp_path / "b").card)
    assert set(card.pop("files")) == {ARCHITECTURE, WEIGHTS, MASKS}
    assert card == {
        "format": 1,
        "stage": "train",
        "config": {"rounds": 2, "method": {"name": "fedavg"}},
        "seed": 7,
        "data": "ab12",
        "metrics": {"accuracy": 0.5},
        "lineage": [],
    }


def test_writing_returns_what_reading_returns(tmp_path: Path) -> None:
    written, back = write(tmp_path / "b"), bundle.read_bundle(tmp_path / "b")
    assert (written.digest, written.card) == (back.digest, back.card)


@pytest.mark.parametrize("masks", [None, {}])
def test_a_bundle_without_masks_has_no_file_for_them(tmp_path: Path, masks: Any) -> None:
    assert write(tmp_path / "b", masks=masks).masks == {}
    assert {p.name for p in (tmp_path / "b").iterdir()} == {CARD, ARCHITECTURE, WEIGHTS}


def test_the_digest_depends_on_the_content_alone(tmp_path: Path) -> None:
    first = write(tmp_path / "a")
    second = write(
        tmp_path / "deep" / "b",
        weights=dict(reversed(WHOLE["weights"].items())),
        config=dict(reversed(WHOLE["config"].items())),
    )
    assert first.digest == second.digest


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "prune"},
        {"weights": {"w": torch.tensor([1.0, -2.0]), "steps": torch.tensor(3)}},
        {"architecture": {"name": "cnn", "shape": [1, 8, 8]}},
        {"config": {"rounds": 3}},
        {"seed": 8},
        {"data": "ab13"},
        {"metrics": {"accuracy": 0.25}},
        {"masks": {"w": torch.tensor([True, True])}},
        {"masks": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_depends_on_every_part(tmp_path: Path, change: dict[str, Any]) -> None:
    assert write(tmp_path / "a").digest != write(tmp_path / "b", **change).digest


def test_the_digest_depends_on_the_parent(tmp_path: Path) -> None:
    parent = write(tmp_path / "parent")
    assert write(tmp_path / "a").digest != write(tmp_path / "b", parent=parent).digest


def test_lineage_names_every_stage_oldest_first(tmp_path: Path) -> None:
    search = write(tmp_path / "1", stage="search")
    train = write(tmp_path / "2", stage="train", parent=search)
    prune = write(tmp_path / "3", stage="prune", parent=bundle.read_bundle(tmp_path / "2"))
    assert bundle.read_bundle(tmp_path / "3").lineage == [
        {"stage": "search", "digest": search.digest},
        {"stage": "train", "digest": train.digest},
        {"stage": "prune", "digest": prune.digest},
    ]


def test_what_privacy_was_spent_and_how_classes_are_called_pass_on(tmp_path: Path) -> None:
    north = {"north": {"epsilon": 2.0}}
    first = write(tmp_path / "1", privacy=north, labels=("cat", "dog"))
    second = write(tmp_path / "2", stage="prune", parent=first)
    assert second.labels == ["cat", "dog"]
    assert second.privacy == [{"stage": "train", "nodes": north}]
    third = write(
        tmp_path / "3", parent=second, privacy={"south": {"epsilon": 3.0}}, labels=["a", "b"]
    )
    assert [entry["stage"] for entry in third.privacy] == ["train", "train"]
    assert third.privacy[1]["nodes"] == {"south": {"epsilon": 3.0}}
    assert third.labels == ["a", "b"]
    assert not {"privacy", "labels"} & set(write(tmp_path / "4").card)


@pytest.mark.parametrize("bit", [1, 128])
@pytest.mark.parametrize("name", [CARD, ARCHITECTURE, WEIGHTS, MASKS])
def test_a_change_of_any_byte_is_seen(tmp_path: Path, name: str, bit: int) -> None:
    path = tmp_path / "b"
    digest = write(path).digest
    whole = (path / name).read_bytes()
    unseen = []
    for k in range(len(whole)):
        (path / name).write_bytes(whole[:k] + bytes([whole[k] ^ bit]) + whole[k + 1 :])
        seen = digest_of(path)
        if seen == digest or (name != CARD and seen is not None):
            unseen.append(k)
    assert unseen == []


@pytest.mark.parametrize("name", [CARD, ARCHITECTURE, WEIGHTS, MASKS])
def test_a_cut_and_a_longer_file_are_seen(tmp_path: Path, name: str) -> None:
    path = tmp_path / "b"
    digest = write(path).digest
    whole = (path / name).read_bytes()
    for other in (whole[:-1], whole + b"\n", b""):
        (path / name).write_bytes(other)
        assert digest_of(path) != digest


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "b")
    (tmp_path / "b" / WEIGHTS).write_bytes(b"other")
    with pytest.raises(InputError, match=r"weights\.safetensors: found content that differs"):
        bundle.read_bundle(tmp_path / "b")


def test_a_file_exchanged_together_with_its_digest_changes_the_bundles_digest(
    tmp_path: Path,
) -> None:
    digest = write(tmp_path / "b").digest
    other = write(tmp_path / "other", weights={"w": torch.zeros(2), "steps": torch.tensor(3)})
    shutil.copy(tmp_path / "other" / WEIGHTS, tmp_path / "b" / WEIGHTS)
    card = json.loads((tmp_path / "b" / CARD).read_text())
    card["files"][WEIGHTS] = other.card["files"][WEIGHTS]
    (tmp_path / "b" / CARD).write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")
    assert digest_of(tmp_path / "b") not in (digest, None)


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "model.py", WEIGHTS + ".bak"])
def test_a_file_that_the_card_does_not_name_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "b")
    (tmp_path / "b" / name).write_text("")
    with pytest.raises(InputError, match="a file that the card does not name") as caught:
        bundle.read_bundle(tmp_path / "b")
    assert caught.value.key == str(tmp_path / "b" / name)


def test_masks_that_the_card_does_not_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", masks=None)
    shutil.copy(tmp_path / "a" / MASKS, tmp_path / "b" / MASKS)
    with pytest.raises(InputError, match="a file that the card does not name"):
        bundle.read_bundle(tmp_path / "b")


def test_a_folder_inside_a_bundle_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "b")
    (tmp_path / "b" / "inner").mkdir()
    with pytest.raises(InputError, match="a file that the card does not name"):
        bundle.read_bundle(tmp_path / "b")


@pytest.mark.parametrize("name", [CARD, ARCHITECTURE, WEIGHTS, MASKS])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "b")
    (tmp_path / "b" / name).unlink()
    with pytest.raises(InputError, match="no such file") as caught:
        bundle.read_bundle(tmp_path / "b")
    assert caught.value.key == str(tmp_path / "b" / name)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(InputError, match="no such file"):
            bundle.read_bundle(path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"files": {}},
        {"files": {WEIGHTS: "0"}},
        {"files": {WEIGHTS: "0", ARCHITECTURE: "0", "../escape": "0"}},
        {"files": [WEIGHTS, ARCHITECTURE]},
        {"files": None},
        {"lineage": {}},
    ],
    ids=str,
)
def test_a_card_of_another_form_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    card = {**write(tmp_path / "b").card, **change}
    (tmp_path / "b" / CARD).write_text(json.dumps(card))
    with pytest.raises(InputError) as caught:
        bundle.read_bundle(tmp_path / "b")
    assert caught.value.key == str(tmp_path / "b" / CARD)


@pytest.mark.parametrize("key", ["format", "files", "lineage", "stage"])
def test_a_card_that_lacks_a_key_is_refused(tmp_path: Path, key: str) -> None:
    card = dict(write(tmp_path / "b").card)
    del card[key]
    (tmp_path / "b" / CARD).write_text(json.dumps(card))
    with pytest.raises(InputError) as caught:
        bundle.read_bundle(tmp_path / "b")
    assert caught.value.key == str(tmp_path / "b" / CARD)


@pytest.mark.parametrize("text", ["", "no json", "[]", "3", "\xff"])
def test_a_card_that_is_no_card_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path / "b")
    (tmp_path / "b" / CARD).write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="no card of a bundle"):
        bundle.read_bundle(tmp_path / "b")


def test_weights_are_written_whatever_their_order_in_memory(tmp_path: Path) -> None:
    turned = torch.arange(6.0).reshape(2, 3).t()
    image = torch.arange(16.0).reshape(1, 4, 2, 2).to(memory_format=torch.channels_last)
    back = write(tmp_path / "b", weights={"turned": turned, "image": image}).weights
    assert torch.equal(back["turned"], turned)
    assert torch.equal(back["image"], image)


def test_weights_that_share_memory_are_written(tmp_path: Path) -> None:
    whole = torch.arange(4.0)
    back = write(tmp_path / "b", weights={"all": whole, "part": whole[:2], "same": whole}).weights
    assert back["part"].tolist() == [0, 1]
    assert back["same"].tolist() == [0, 1, 2, 3]


def test_a_bundle_replaces_an_older_one_whole(tmp_path: Path) -> None:
    old = write(tmp_path / "b")
    new = write(tmp_path / "b", seed=8, masks=None)
    assert bundle.read_bundle(tmp_path / "b").digest == new.digest != old.digest
    assert new.masks == {}
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_write_that_fails_leaves_the_older_bundle(tmp_path: Path) -> None:
    old = write(tmp_path / "b")
    with pytest.raises(TypeError):
        write(tmp_path / "b", metrics={"accuracy": object()})
    assert bundle.read_bundle(tmp_path / "b").digest == old.digest
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("inside", [["thesis.tex"], []])
def test_a_folder_that_is_no_bundle_is_not_replaced(tmp_path: Path, inside: list[str]) -> None:
    (tmp_path / "b").mkdir()
    for name in inside:
        (tmp_path / "b" / name).write_text("mine")
    with pytest.raises(InputError, match="no bundle"):
        write(tmp_path / "b")
    assert [p.name for p in (tmp_path / "b").iterdir()] == inside


def test_a_file_is_not_replaced_by_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("mine")
    with pytest.raises(InputError, match="no bundle"):
        write(tmp_path / "b")
    assert (tmp_path / "b").read_text() == "mine"


def test_writing_leaves_the_tensors_alone(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    back = write(tmp_path / "b", weights={"w": weight}).weights["w"]
    assert weight.requires_grad
    back.fill_(5)
    assert weight.tolist() == [1, 1]


def test_an_atomic_write_holds_the_content_and_leaves_no_other_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "text", "größer\n")
    write_atomic(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == b"gr\xc3\xb6\xc3\x9fer\n"
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert {p.name for p in tmp_path.iterdir()} == {"text", "bytes"}


def test_an_atomic_write_replaces_the_name_and_not_the_content_under_it(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", "old")
    with (tmp_path / "file").open() as reader:
        write_atomic(tmp_path / "file", "the new content")
        assert reader.read() == "old"
    assert (tmp_path / "file").read_text() == "the new content"


def test_an_atomic_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_atomic(tmp_path / "folder", "content")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_an_atomic_write_makes_no_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "none" / "file", "content")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_opened_is_not_synced(tmp_path: Path) -> None:
    sync_folder(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "a").mkdir()
        (folder / "a" / "file").write_text("held")
        assert not list((tmp_path / "empty").iterdir())
    assert (tmp_path / "empty" / "a" / "file").read_text() == "held"

    def interrupted() -> None:
        with new_folder(tmp_path / "deep" / "o") as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "deep").iterdir()) == []
    (tmp_path / "deep" / ".o.tmp" / "left").mkdir(parents=True)  # by a kill
    with new_folder(tmp_path / "deep" / "o") as folder:
        assert list(folder.iterdir()) == []
    assert [each.name for each in (tmp_path / "deep").iterdir()] == ["o"]
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    for taken in ("empty", "link"):
        with (
            pytest.raises(InputError, match="nothing is overwritten"),
            new_folder(tmp_path / taken),
        ):
            pass
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "deep", "link"}
