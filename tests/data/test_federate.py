import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from hansa.data.clients import SPLITS
from hansa.data.federate import DataOptions, FederatedData, federate
from hansa.errors import InputError

SHIFT: dict[str, Any] = {"kind": "shift"}


def digits(seed: int = 0, **options: Any) -> FederatedData:
    return federate(DataOptions(**{"clients": 4, **options}), seed)


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def flat(value: int, height: int = 4, width: int = 4) -> bytes:
    return png(np.full((height, width), value))


def rows(labels: list[int], images: list[bytes], **columns: Any) -> pa.Table:
    return pa.table({"image": pa.array(images, pa.binary()), "label": labels, **columns})


def of_rows(folder: Path, *tables: pa.Table, seed: int = 0, **options: Any) -> FederatedData:
    folder.mkdir(parents=True, exist_ok=True)
    for k, table in enumerate(tables):
        pq.write_table(table, folder / f"{k}.parquet")
    return federate(DataOptions(source=f"parquet:{folder}", **options), seed)


def pool(data: FederatedData) -> torch.Tensor:
    return next(iter(data.clients.values())).inputs


def held(data: FederatedData) -> dict[str, dict[str, list[int]]]:
    return {
        name: {split: client.splits[split].tolist() for split in SPLITS}
        for name, client in data.clients.items()
    }


def test_federated_digits_know_their_shape_and_classes() -> None:
    data = digits()
    assert list(data.clients) == ["client-0", "client-1", "client-2", "client-3"]
    assert data.shape == (1, 8, 8)
    assert data.classes == tuple("0123456789")


def test_every_sample_is_in_one_split_of_one_client() -> None:
    data = digits()
    found = [k for mine in held(data).values() for part in mine.values() for k in part]
    assert sorted(found) == list(range(1797))


def test_a_split_holds_the_images_of_its_labels() -> None:
    data = digits(partition={"kind": "shards", "classes": 2})
    whole = digits(clients=1)
    images = {
        tuple(image.flatten().tolist()): int(label)
        for image, label in zip(pool(whole), whole.clients["client-0"].labels, strict=True)
    }
    inputs, labels = data.clients["client-2"].batch("test")
    assert len(set(labels.tolist())) == 2
    assert [images[tuple(image.flatten().tolist())] for image in inputs] == labels.tolist()


def test_clients_share_one_pool() -> None:
    data = digits()
    assert all(client.inputs is pool(data) for client in data.clients.values())


def test_the_pool_holds_what_clients_use_and_no_more() -> None:
    data = digits(train_per_class=2, test_per_class=1, validation=0)
    assert held(data)["client-0"]["validation"] == []
    for client in data.clients.values():
        assert torch.bincount(client.batch("train")[1]).tolist() == [2] * 10
        assert torch.bincount(client.batch("test")[1]).tolist() == [1] * 10
    assert len(pool(data)) == 4 * 10 * (2 + 1)


def test_shares_of_zero_hold_nothing() -> None:
    data = digits(validation=0, test=0)
    assert {(c.count("validation"), c.count("test")) for c in data.clients.values()} == {(0, 0)}
    assert sum(client.count("train") for client in data.clients.values()) == 1797


def test_images_that_no_client_uses_are_not_read(tmp_path: Path) -> None:
    images = [flat(k) for k in range(4)] + [b"no image"]
    table = rows([0, 0, 1, 1, 0], images, site=["a", "a", "a", "a", "b"])
    partition = {"kind": "group", "min_samples": 2}
    data = of_rows(tmp_path, table, partition=partition, group_column="site")
    assert list(data.clients) == ["0-a"]
    assert sorted(pool(data)[:, 0, 0, 0].tolist()) == [0, 1, 2, 3]


def test_groups_become_clients(tmp_path: Path) -> None:
    table = rows([0, 0, 1, 1], [flat(k) for k in range(4)], site=["b", "b", "a", "a"])
    partition = {"kind": "group", "min_samples": 2}
    data = of_rows(tmp_path, table, partition=partition, group_column="site")
    assert {n: sorted(c.labels[c.splits["train"]].tolist()) for n, c in data.clients.items()} == {
        "0-a": [1],
        "1-b": [0],
    }


def test_the_partition_by_group_needs_a_column_of_groups() -> None:
    with pytest.raises(InputError, match=r"data\.group_column: found nothing"):
        digits(partition={"kind": "group"})


def test_more_clients_than_samples_are_refused() -> None:
    with pytest.raises(InputError, match="found 1798; allowed: at most the 1797 samples"):
        digits(clients=1798)


def test_a_client_with_nothing_to_be_scored_on_is_named(tmp_path: Path) -> None:
    table = rows([0, 1], [flat(0), flat(1)])
    with pytest.raises(
        InputError, match="data of client-0: found 2 samples, none of them left for"
    ):
        of_rows(tmp_path, table, clients=1)
    assert of_rows(tmp_path, table, clients=1, test=0).clients["client-0"].count("train") == 2


@pytest.mark.parametrize(
    "options",
    [
        {"validation": 0.5, "test": 0.5},
        {"validation": -0.1},
        {"test": 1},
        {"clients": 0},
        {"train_per_class": 0},
        {"partition": {"kind": "random"}},
        {"cliens": 3},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataOptions(**options)


@pytest.mark.parametrize("kind", ["iid", "shards", "dirichlet", "shift"])
def test_a_seed_gives_one_federation_and_another_seed_another(kind: str) -> None:
    first, again, other = (digits(seed, partition={"kind": kind}) for seed in (1, 1, 2))
    assert held(first) == held(again)
    assert torch.equal(pool(first), pool(again))
    assert first.fingerprint == again.fingerprint
    assert held(first) != held(other)
    assert first.fingerprint != other.fingerprint


def test_the_split_of_one_client_does_not_depend_on_the_others(tmp_path: Path) -> None:
    images, sites = [flat(k) for k in range(40)], ["a"] * 20 + ["b"] * 20
    table = rows([0, 1] * 20, images, site=sites)
    options: dict[str, Any] = {"group_column": "site", "partition": {"kind": "group"}}
    both = of_rows(tmp_path, table, **options)
    one = of_rows(tmp_path, table, clients=1, **options)
    assert held(both)["0-a"] == held(one)["0-a"]


def test_clients_that_stay_out_change_nothing_for_the_others() -> None:
    everybody = digits(partition={"kind": "shift"})
    names = list(everybody.clients)
    some = digits(partition={"kind": "shift"}, only=[names[3], names[1]])
    assert list(some.clients) == [names[1], names[3]]
    for name, client in some.clients.items():
        assert torch.equal(client.batch("train")[0], everybody.clients[name].batch("train")[0])
    assert some.fingerprint != everybody.fingerprint
    with pytest.raises(InputError, match=r"data\.only: found nobody"):
        digits(only=["nobody"])


def test_the_fingerprint_sees_a_pixel_a_label_and_a_split(tmp_path: Path) -> None:
    pixels = np.arange(16).reshape(4, 4)
    labels, images = [0, 0, 0, 1, 1, 1], [png(pixels + k) for k in range(6)]
    brighter = pixels + 5
    brighter[3, 3] += 1

    def fingerprint(labels: list[int], images: list[bytes], **options: Any) -> str:
        return of_rows(tmp_path, rows(labels, images), clients=1, **options).fingerprint

    plain = fingerprint(labels, images)
    assert len(plain) == 64
    assert fingerprint(labels, images) == plain
    others = {
        fingerprint(labels, [*images[:5], png(brighter)]),
        fingerprint([0, 0, 0, 2, 1, 1], images, test=0, validation=0),
        fingerprint(labels, images, test=0, validation=0),
        fingerprint(labels, images, validation=0),
        fingerprint(labels, images, channels=3),
        plain,
    }
    assert len(others) == 6


def test_the_fingerprint_sees_which_samples_a_split_holds(tmp_path: Path) -> None:
    table = rows([0, 1] * 10, [flat(k) for k in range(20)], site=["a"] * 20)
    options: dict[str, Any] = {"group_column": "site", "partition": {"kind": "group"}}
    first, other = (of_rows(tmp_path, table, seed=seed, **options) for seed in (0, 1))
    assert torch.equal(pool(first), pool(other))
    assert held(first)["0-a"] != held(other)["0-a"]
    assert [len(part) for part in held(first)["0-a"].values()] == [
        len(part) for part in held(other)["0-a"].values()
    ]
    assert first.fingerprint != other.fingerprint


def test_the_fingerprint_is_of_samples_and_not_of_files(tmp_path: Path) -> None:
    whole = rows([0, 1] * 6, [flat(k) for k in range(12)])
    one = of_rows(tmp_path / "one", whole, clients=2)
    two = of_rows(tmp_path / "two", whole.slice(0, 5), whole.slice(5), clients=2)
    assert one.fingerprint == two.fingerprint


def test_each_client_sees_its_samples_through_its_shift() -> None:
    plain, shifted = digits(), digits(partition=SHIFT)
    assert held(plain) == held(shifted)
    for split in SPLITS:
        (none, _), (turned, _), (inverse, _), (noisy, _) = (
            client.batch(split) for client in shifted.clients.values()
        )
        before = [client.batch(split)[0] for client in plain.clients.values()]
        assert torch.equal(none, before[0])
        assert torch.equal(turned, before[1].rot90(1, (2, 3)))
        assert torch.equal(inverse, -before[2])
        assert not torch.equal(noisy, before[3])
    assert torch.equal(
        shifted.clients["client-3"].batch("train")[1], plain.clients["client-3"].batch("train")[1]
    )


def test_shifts_are_counted_round_and_each_round_turns_further() -> None:
    plain = digits(clients=7)
    shifted = digits(clients=7, partition={**SHIFT, "shifts": ["none", "rotation"]})
    turns = []
    for before, after in zip(plain.clients.values(), shifted.clients.values(), strict=True):
        images, turned = before.batch("test")[0], after.batch("test")[0]
        turns += [k for k in range(4) if torch.equal(images.rot90(k, (2, 3)), turned)]
    assert turns == [0, 1, 0, 2, 0, 3, 0]


def test_rotation_counts_to_three_and_begins_again() -> None:
    plain = digits(clients=4)
    shifted = digits(clients=4, partition={**SHIFT, "shifts": ["rotation"]})
    turns = []
    for before, after in zip(plain.clients.values(), shifted.clients.values(), strict=True):
        images, turned = before.batch("test")[0], after.batch("test")[0]
        turns += [k for k in range(4) if torch.equal(images.rot90(k, (2, 3)), turned)]
    assert turns == [1, 2, 3, 1]


def test_noise_has_the_strength_asked_for_and_stays_in_range() -> None:
    options = {**SHIFT, "shifts": ["noise"], "noise": 0.3}
    plain, shifted = pool(digits()), pool(digits(partition=options))
    assert (shifted.min().item(), shifted.max().item()) == (-1, 1)
    inside = plain.abs() < 0.1
    spread = (shifted - plain)[inside]
    assert len(spread) > 1000
    assert spread.std() == pytest.approx(0.3, rel=0.05)
    assert spread.mean() == pytest.approx(0, abs=0.02)


def test_noise_of_strength_zero_is_no_shift() -> None:
    shifted = digits(partition={**SHIFT, "shifts": ["noise"], "noise": 0})
    assert torch.equal(pool(shifted), pool(digits()))


def byte_images(folder: Path, value: int, shifts: list[str], **options: Any) -> FederatedData:
    images = [flat(value, 16, 16) for _ in range(40)]
    partition = {**SHIFT, "shifts": shifts, **options}
    return of_rows(folder, rows([0, 1] * 20, images), clients=2, partition=partition)


def test_inversion_turns_light_to_dark_in_images_of_bytes(tmp_path: Path) -> None:
    data = byte_images(tmp_path, 200, ["none", "inversion"])
    first, second = data.clients.values()
    assert set(first.inputs[first.splits["train"]].flatten().tolist()) == {200}
    assert set(second.inputs[second.splits["train"]].flatten().tolist()) == {55}
    images, _ = second.batch("test")
    torch.testing.assert_close(images, torch.full_like(images, 55 / 127.5 - 1))


def test_noise_in_images_of_bytes_has_the_strength_of_the_scaled_image(tmp_path: Path) -> None:
    data = byte_images(tmp_path, 128, ["noise"], noise=0.2)
    first, second = (client.batch("train")[0] for client in data.clients.values())
    assert first.std() == pytest.approx(0.2, rel=0.05)
    assert first.mean() == pytest.approx(0, abs=0.02)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])


def test_noise_in_images_of_bytes_does_not_wrap_round(tmp_path: Path) -> None:
    data = byte_images(tmp_path, 255, ["noise"], noise=0.1)
    assert pool(data).min() > 150
    assert (pool(data) == 255).float().mean() == pytest.approx(0.5, abs=0.05)


def test_rotation_needs_square_images(tmp_path: Path) -> None:
    table = rows([0, 1] * 6, [flat(k, 4, 6) for k in range(12)])
    partition = {**SHIFT, "shifts": ["rotation"]}
    with pytest.raises(InputError, match="rotation of images of 4x6; allowed: square images"):
        of_rows(tmp_path, table, clients=2, partition=partition)
    resized = of_rows(tmp_path, table, clients=2, partition=partition, size=(4, 4))
    assert resized.shape == (1, 4, 4)
