import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from hansa.data.sources import Source, SourceOptions, load
from hansa.errors import InputError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(
    value: Any = 0, size: tuple[int, int] = (4, 4), mode: str = "L", kind: str = "PNG"
) -> bytes:
    """An image file of one colour, its size as width and height."""
    buffer = io.BytesIO()
    Image.new(mode, size, value).save(buffer, kind)
    return buffer.getvalue()


def table(labels: Any, images: list[bytes | None] | None = None, **columns: Any) -> pa.Table:
    """Rows as the Hugging Face libraries keep them; the image of row k is all k."""
    files = [encoded(k) for k in range(len(labels))] if images is None else images
    structs = pa.array([{"bytes": file, "path": None} for file in files], IMAGE)
    return pa.table({"image": structs, "label": labels, **columns})


def named(rows: pa.Table, *names: str) -> pa.Table:
    """The rows with the metadata in which the Hugging Face libraries name classes."""
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return rows.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """A function that writes rows to a Parquet file and opens it as a source."""

    def write_and_load(rows: pa.Table, **options: Any) -> Source:
        pq.write_table(rows, tmp_path / "rows.parquet")
        return load(SourceOptions(source=f"parquet:{tmp_path / 'rows.parquet'}", **options))

    return write_and_load


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three images of cats, valued 0 to 2, and two of dogs, valued 10 and 11."""
    for name, first, count in (("dog", 10, 2), ("cat", 0, 3)):
        (tmp_path / name).mkdir()
        for k in range(count):
            (tmp_path / name / f"{k}.png").write_bytes(encoded(first + k))
    return tmp_path


def read(source: Source, *positions: int) -> torch.Tensor:
    return source.read(np.array(positions, np.int64))


def corners(source: Source, *positions: int) -> Any:
    """Return the first pixel of each image, as its channels."""
    return read(source, *positions)[:, :, 0, 0].tolist()


@pytest.mark.parametrize("name", ["", "mnist", "digits:8", "parquet", "parquet:", "zip:x", ":x"])
def test_an_unknown_source_is_told_what_there_is(name: str) -> None:
    with pytest.raises(InputError) as caught:
        load(SourceOptions(source=name))
    assert str(caught.value) == (
        f"data.source: found {name!r}; "
        "allowed: 'digits', 'parquet:PATH', 'folder:PATH' or 'hub:NAME'"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"size": (0, 4)},
        {"size": (4, -1)},
        {"size": (4,)},
        {"channels": 0},
        {"channels": 2},
        {"channels": 4},
        {"classes": ("only",)},
        {"colour": True},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SourceOptions(**options)


def test_digits_are_real_images() -> None:
    source = load(SourceOptions())
    images = read(source, *range(1797))
    assert source.labels.shape == (1797,)
    assert source.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert np.bincount(source.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min().item(), images.max().item()) == (-1, 1)
    assert source.labels[:3].tolist() == [0, 1, 2]
    assert images[0, 0, 0].tolist() == [-1, -1, -0.375, 0.625, 0.125, -0.875, -1, -1]


def test_digits_have_the_size_and_the_channels_asked_for() -> None:
    index = np.arange(3)
    small = load(SourceOptions()).read(index)
    large = load(SourceOptions(size=(16, 24), channels=3)).read(index)
    assert large.shape == (3, 3, 16, 24)
    assert torch.equal(large[:, 0], large[:, 2])
    # Twice the size keeps the mean of each row of pixels, but for the borders.
    assert torch.allclose(large.mean(), small.mean(), atol=0.02)


def test_rows_come_as_bytes_in_the_order_asked_for(opened: Any) -> None:
    source = opened(table([0, 1, 1, 0]))
    images = read(source, 3, 0, 3)
    assert images.dtype == torch.uint8
    assert images.shape == (3, 1, 4, 4)
    assert [set(image.flatten().tolist()) for image in images] == [{3}, {0}, {3}]
    assert source.labels.tolist() == [0, 1, 1, 0]
    assert source.labels.dtype == np.int64
    assert source.groups is None


def test_rows_in_many_row_groups_are_one_source(tmp_path: Path) -> None:
    pq.write_table(table([0, 1, 1, 0, 1]), tmp_path / "rows.parquet", row_group_size=2)
    source = load(SourceOptions(source=f"parquet:{tmp_path / 'rows.parquet'}"))
    assert corners(source, 4, 1, 2) == [[4], [1], [2]]
    assert source.labels.tolist() == [0, 1, 1, 0, 1]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()], ids=str)
def test_images_may_be_a_column_of_bytes(opened: Any, kind: pa.DataType) -> None:
    rows = pa.table({"label": [0, 1], "scan": pa.array([encoded(5), encoded(6)], kind)})
    assert corners(opened(rows), 1, 0) == [[6], [5]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF"])
def test_images_may_be_of_any_common_kind(opened: Any, kind: str) -> None:
    files: list[bytes | None] = [encoded(200, kind=kind), encoded(200, kind=kind)]
    assert corners(opened(table([0, 1], files), channels=1), 0) == [[200]]


def test_classes_are_numbered_without_names(opened: Any) -> None:
    assert opened(table([2, 0, 2])).classes == ("0", "1", "2")


def test_classes_are_named_by_the_files_metadata(opened: Any) -> None:
    source = opened(named(table([1, 0, 1]), "cat", "dog", "owl"))
    assert source.classes == ("cat", "dog", "owl")
    assert source.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("metadata", ["{}", "no json", "[]", '{"info": {"features": null}}'])
def test_metadata_that_names_no_classes_is_passed_over(opened: Any, metadata: str) -> None:
    rows = table([1, 0]).replace_schema_metadata({"huggingface": metadata})
    assert opened(rows).classes == ("0", "1")


def test_classes_are_named_by_the_configuration_first(opened: Any) -> None:
    rows = named(table([1, 0, 1]), "cat", "dog")
    assert opened(rows, classes=("left", "right")).classes == ("left", "right")


NAMES = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", NAMES, ids=["string", "large string", "category"])
def test_labels_may_be_names(opened: Any, kind: pa.DataType) -> None:
    source = opened(table(pa.array(["owl", "cat", "owl"], kind)))
    assert source.classes == ("cat", "owl")
    assert source.labels.tolist() == [1, 0, 1]


def test_names_are_numbered_in_the_order_of_the_configuration(opened: Any) -> None:
    source = opened(table(["owl", "cat", "owl"]), classes=("owl", "dog", "cat"))
    assert source.classes == ("owl", "dog", "cat")
    assert source.labels.tolist() == [0, 2, 0]


@pytest.mark.parametrize(
    ("labels", "classes", "found", "allowed"),
    [
        ([0, 1, 5], ("cat", "dog"), "the label 5", "a class: 0 to 1"),
        ([0, 1, -1], None, "the label -1", "a class: 0 to 1"),
        (["cat", "dog", "owl"], ("cat", "dog"), "the label 'owl'", "a class: cat, dog"),
    ],
)
def test_a_label_outside_the_classes_is_named_with_its_row(
    opened: Any, tmp_path: Path, labels: Any, classes: Any, found: str, allowed: str
) -> None:
    with pytest.raises(InputError) as caught:
        opened(table(labels), classes=classes)
    place = f"parquet:{tmp_path / 'rows.parquet'} row 2"
    assert (caught.value.key, caught.value.found, caught.value.allowed) == (place, found, allowed)


def test_a_label_outside_the_files_own_classes_is_refused(opened: Any) -> None:
    with pytest.raises(InputError, match="row 1: found the label 2; allowed: a class: 0 to 1"):
        opened(named(table([0, 2]), "cat", "dog"))


@pytest.mark.parametrize("labels", [[0, 1, None], ["a", "b", None]], ids=str)
def test_a_missing_label_is_named_with_its_row(opened: Any, labels: Any) -> None:
    with pytest.raises(InputError, match="row 2: found the label None"):
        opened(table(labels))


@pytest.mark.parametrize("labels", [[], [0, 0]], ids=str)
def test_fewer_than_two_classes_are_refused(opened: Any, labels: list[int]) -> None:
    with pytest.raises(InputError, match=f"found {len(set(labels))} classes; allowed: two or more"):
        opened(table(pa.array(labels, pa.int64())))


def test_columns_may_be_chosen(opened: Any) -> None:
    second = pa.array([{"bytes": encoded(k), "path": None} for k in (70, 71)], IMAGE)
    rows = table([0, 1], second=second, side=[1, 0])
    source = opened(rows, image_column="second", label_column="side")
    assert corners(source, 0, 1) == [[70], [71]]
    assert source.labels.tolist() == [1, 0]


@pytest.mark.parametrize("name", ["label", "labels", "fine_label"])
def test_the_usual_names_of_labels_are_known(opened: Any, name: str) -> None:
    rows = table([0, 1]).rename_columns(["image", name])
    assert opened(rows).labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("column", "error"),
    [
        ("image", "data.image_column: found no such column; allowed: one of the columns label"),
        ("label", "data.label_column: found no such column; allowed: one of the columns image"),
    ],
)
def test_a_missing_column_is_told_with_those_there_are(
    opened: Any, column: str, error: str
) -> None:
    with pytest.raises(InputError) as caught:
        opened(table([0, 1]).drop_columns([column]))
    assert str(caught.value) == error


@pytest.mark.parametrize("key", ["image_column", "label_column", "group_column"])
def test_a_chosen_column_that_is_missing_is_named(opened: Any, key: str) -> None:
    with pytest.raises(InputError) as caught:
        opened(table([0, 1]), **{key: "nothing"})
    assert str(caught.value) == (
        f"data.{key}: found the column 'nothing'; allowed: one of the columns image, label"
    )


@pytest.mark.parametrize(
    "options", [{"image_column": "label"}, {"image_column": "site"}, {"label_column": "image"}]
)
def test_a_chosen_column_of_another_kind_is_refused(opened: Any, options: dict[str, str]) -> None:
    with pytest.raises(InputError):
        read(opened(table([0, 1], site=["a", "b"]), **options), 0)


def test_groups_may_be_numbers(opened: Any) -> None:
    assert opened(table([0, 1, 0], site=[7, 8, 7]), group_column="site").groups == ["7", "8", "7"]


@pytest.mark.parametrize("kind", NAMES, ids=["string", "large string", "category"])
def test_groups_may_be_names(opened: Any, kind: pa.DataType) -> None:
    sites = pa.array(["a", "b", "a"], kind)
    assert opened(table([0, 1, 0], site=sites), group_column="site").groups == ["a", "b", "a"]


@pytest.mark.parametrize("place", ["", "/part-*.parquet", "/part-[01].parquet"])
def test_files_of_a_folder_or_pattern_are_read_in_the_order_of_their_names(
    tmp_path: Path, place: str
) -> None:
    pq.write_table(table([1, 0], [encoded(20), encoded(21)]), tmp_path / "part-1.parquet")
    pq.write_table(table([0, 1, 1]), tmp_path / "part-0.parquet")
    source = load(SourceOptions(source=f"parquet:{tmp_path}{place}"))
    assert source.labels.tolist() == [0, 1, 1, 1, 0]
    assert corners(source, 0, 2, 3, 4) == [[0], [2], [20], [21]]


def test_a_pattern_leaves_other_files_out(tmp_path: Path) -> None:
    for name in ("train-0", "test-0"):
        pq.write_table(table([0, 1]), tmp_path / f"{name}.parquet")
    assert len(load(SourceOptions(source=f"parquet:{tmp_path}/train-*.parquet")).labels) == 2


def test_a_folder_is_searched_below(tmp_path: Path) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    pq.write_table(table([0, 1]), tmp_path / "data" / "train" / "0.parquet")
    assert len(load(SourceOptions(source=f"parquet:{tmp_path}")).labels) == 2


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path: Path) -> None:
    pq.write_table(table([0, 1]), tmp_path / "rows[1].parquet")
    assert len(load(SourceOptions(source=f"parquet:{tmp_path}/rows[1].parquet")).labels) == 2


def test_files_of_different_columns_are_refused_by_name(tmp_path: Path) -> None:
    pq.write_table(table([0, 1]), tmp_path / "0.parquet")
    pq.write_table(table([0, 1], site=[1, 2]), tmp_path / "1.parquet")
    with pytest.raises(InputError, match=r"1\.parquet: found other columns than before it"):
        load(SourceOptions(source=f"parquet:{tmp_path}"))


@pytest.mark.parametrize("place", ["", "/none.parquet", "/*.parquet"])
def test_no_parquet_file_is_told(tmp_path: Path, place: str) -> None:
    with pytest.raises(InputError) as caught:
        load(SourceOptions(source=f"parquet:{tmp_path}{place}"))
    assert caught.value.key == "data.source"
    assert caught.value.found == f"no Parquet file at {tmp_path}{place}"


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_text("image,label\n")
    with pytest.raises(InputError, match=r"rows\.parquet: found no Parquet"):
        load(SourceOptions(source=f"parquet:{tmp_path}"))


def noise() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def enormous() -> bytes:
    """A small PNG file that claims 40000 x 40000 pixels."""
    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 0, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(9))), (b"IEND", b"")):
        checksum = zlib.crc32(name + content)
        file += struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
    return file


@pytest.mark.parametrize(
    "content",
    [b"no image", b"", None, noise()[:150], enormous()],
    ids=["text", "empty", "null", "cut", "enormous"],
)
def test_a_row_that_holds_no_image_is_named_when_it_is_read(
    opened: Any, tmp_path: Path, content: bytes | None
) -> None:
    source = opened(table([0, 1], [encoded(9), content]))
    assert corners(source, 0) == [[9]]
    with pytest.raises(InputError) as caught:
        read(source, 0, 1)
    assert caught.value.key == f"parquet:{tmp_path / 'rows.parquet'} row 1"


def test_rows_of_different_sizes_are_refused(opened: Any, tmp_path: Path) -> None:
    source = opened(table([0, 1], [encoded(size=(4, 3)), encoded(size=(6, 5))]))
    with pytest.raises(InputError) as caught:
        read(source, 0, 1)
    assert str(caught.value) == (
        f"parquet:{tmp_path / 'rows.parquet'} row 1: found an image of 5x6 pixels with 1 channels; "
        "allowed: 3x4 pixels with 1 channels like those before it, "
        "or set data.size and data.channels"
    )


def test_size_is_height_and_width(opened: Any) -> None:
    source = opened(table([0, 1], [encoded(8, (4, 3)), encoded(9, (6, 5))]), size=(2, 7))
    images = read(source, 0, 1)
    assert images.shape == (2, 1, 2, 7)
    assert [set(image.flatten().tolist()) for image in images] == [{8}, {9}]


def test_grey_and_colour_do_not_mix_unless_channels_says_so(opened: Any) -> None:
    rows = table([0, 1], [encoded(7), encoded((255, 0, 0), mode="RGB")])
    with pytest.raises(InputError, match="row 1: found an image of 4x4 pixels with 3 channels"):
        read(opened(rows), 0, 1)
    assert corners(opened(rows, channels=3), 0, 1) == [[7, 7, 7], [255, 0, 0]]
    # Red counts 0.299 of the brightness.
    assert corners(opened(rows, channels=1), 0, 1) == [[7], [76]]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, [255]),
        ("L", 50, [50]),
        ("LA", (50, 9), [50]),
        ("RGB", (1, 2, 3), [1, 2, 3]),
        ("RGBA", (1, 2, 3, 9), [1, 2, 3]),
    ],
)
def test_images_are_grey_or_colour_as_their_file_says(
    opened: Any, mode: str, value: Any, expected: list[int]
) -> None:
    assert corners(opened(table([0, 1], [encoded(value, mode=mode)] * 2)), 0) == [expected]


def test_a_palette_is_looked_up(opened: Any) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert corners(opened(table([0, 1], [buffer.getvalue()] * 2)), 1) == [[10, 20, 30]]


def test_grey_of_16_bits_keeps_its_range(opened: Any) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 40000, 65535]], np.uint16)).save(buffer, "PNG")
    source = opened(table([0, 1], [buffer.getvalue()] * 2))
    assert read(source, 0)[0, 0].tolist() == [[0, 156, 255]]


def test_class_folders_are_classes_by_name(folders: Path) -> None:
    source = load(SourceOptions(source=f"folder:{folders}"))
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    assert corners(source, 0, 2, 3, 4) == [[0], [2], [10], [11]]
    assert source.groups is None


def test_class_folders_may_be_numbered_by_the_configuration(folders: Path) -> None:
    source = load(SourceOptions(source=f"folder:{folders}", classes=("owl", "dog", "cat")))
    assert source.classes == ("owl", "dog", "cat")
    assert source.labels.tolist() == [2, 2, 2, 1, 1]


def test_a_class_folder_outside_the_classes_is_refused(folders: Path) -> None:
    with pytest.raises(InputError, match="the label 'dog'; allowed: a class: cat, owl"):
        load(SourceOptions(source=f"folder:{folders}", classes=("cat", "owl")))


def test_class_folders_hold_images_at_any_depth_and_other_files_are_passed_over(
    folders: Path,
) -> None:
    (folders / "cat" / "more").mkdir()
    (folders / "cat" / "more" / "9.PNG").write_bytes(encoded(99))
    (folders / "cat" / "notes.txt").write_text("a cat")
    (folders / ".cache").mkdir()
    (folders / ".cache" / "0.png").write_bytes(encoded())
    (folders / "readme.png").write_bytes(encoded())
    source = load(SourceOptions(source=f"folder:{folders}"))
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert corners(source, 3) == [[99]]


def test_a_file_that_is_no_image_is_named_when_it_is_read(folders: Path) -> None:
    (folders / "dog" / "1.png").write_text("a dog")
    source = load(SourceOptions(source=f"folder:{folders}"))
    assert corners(source, 3) == [[10]]
    with pytest.raises(InputError, match="found something that is no image") as caught:
        read(source, 3, 4)
    assert caught.value.key == str(folders / "dog" / "1.png")


def test_a_file_of_another_size_is_named(folders: Path) -> None:
    (folders / "dog" / "1.png").write_bytes(encoded(size=(9, 9)))
    with pytest.raises(InputError, match="found an image of 9x9 pixels") as caught:
        read(load(SourceOptions(source=f"folder:{folders}")), 0, 4)
    assert caught.value.key == str(folders / "dog" / "1.png")
    resized = load(SourceOptions(source=f"folder:{folders}", size=(5, 5), channels=3))
    assert read(resized, 0, 4).shape == (2, 3, 5, 5)


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"data.source: found no folder at {tmp_path}/none"):
        load(SourceOptions(source=f"folder:{tmp_path}/none"))


@pytest.mark.parametrize(
    ("names", "found"),
    [([], "0 class folders with 0"), (["a"], "1 class folders with 1"), (["a", "b"], "2 class")],
)
def test_missing_class_folders_are_told(tmp_path: Path, names: list[str], found: str) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        if len(names) == 1:
            (tmp_path / name / "0.png").write_bytes(encoded())
    with pytest.raises(InputError, match=f"found {found}"):
        load(SourceOptions(source=f"folder:{tmp_path}"))


HUB_PROGRAM = """
import json, sys
import numpy as np
from hansa.data.sources import SourceOptions, load
from hansa.errors import InputError

answers = {}
for key, options in json.load(sys.stdin).items():
    try:
        source = load(SourceOptions(**options))
        images = source.read(np.arange(len(source.labels)))
        answers[key] = [source.name, source.classes, source.labels.tolist(), source.groups,
                        images[:, :, 0, 0].tolist()]
    except InputError as error:
        answers[key] = str(error)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What the hub source answers, in a process of its own that reaches no network."""
    root = tmp_path_factory.mktemp("hub")
    for name in ("named", "plain"):
        (root / name).mkdir()
    rows = table([0, 1, 0], site=["x", "y", "x"])
    pq.write_table(named(rows, "cat", "dog"), root / "named" / "train.parquet")
    pq.write_table(rows, root / "plain" / "train.parquet")
    pq.write_table(rows.slice(1), root / "plain" / "test.parquet")
    for name, value in (("cat", 30), ("dog", 31)):
        (root / "images" / name).mkdir(parents=True)
        (root / "images" / name / "0.png").write_bytes(encoded(value))
    questions: dict[str, dict[str, Any]] = {
        "named": {"source": f"hub:{root}/named", "group_column": "site"},
        "test": {"source": f"hub:{root}/plain", "hub_split": "test"},
        "images": {"source": f"hub:{root}/images"},
        "split": {"source": f"hub:{root}/named", "hub_split": "nothing"},
        "unreached": {"source": "hub:nobody/nothing"},
        "missing": {"source": f"hub:{root}/nothing"},
    }
    done = subprocess.run(
        [sys.executable, "-c", HUB_PROGRAM],
        input=json.dumps(questions),
        env={
            **os.environ,
            "HF_HOME": str(root / "home"),
            "HF_DATASETS_CACHE": str(root / "home" / "datasets"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return root, json.loads(done.stdout)


def test_a_hub_data_set_is_read_with_the_names_of_its_classes(hub: Any) -> None:
    root, answers = hub
    assert answers["named"] == [
        f"hub:{root}/named",
        ["cat", "dog"],
        [0, 1, 0],
        ["x", "y", "x"],
        [[0], [1], [2]],
    ]


def test_a_split_of_a_hub_data_set_may_be_chosen(hub: Any) -> None:
    root, answers = hub
    assert answers["test"] == [f"hub:{root}/plain", ["0", "1"], [1, 0], None, [[1], [2]]]


def test_a_hub_data_set_of_image_files_is_read(hub: Any) -> None:
    root, answers = hub
    assert answers["images"] == [f"hub:{root}/images", ["cat", "dog"], [0, 1], None, [[30], [31]]]


@pytest.mark.parametrize(
    ("key", "name", "reason"),
    [
        ("split", "/named", "nothing"),
        ("missing", "/nothing", "nothing"),
        ("unreached", "nobody/nothing", "Offline"),
    ],
)
def test_a_hub_data_set_that_cannot_be_loaded_is_one_line(
    hub: Any, key: str, name: str, reason: str
) -> None:
    message = hub[1][key]
    head, _, tail = message.partition(" that could not be loaded (")
    assert head.startswith("data.source: found 'hub:")
    assert head.endswith(f"{name}'")
    assert reason in tail
    assert tail.endswith(
        "allowed: a data set that the hub has and this machine reaches, or parquet:PATH"
    )
    assert "\n" not in message


def test_an_image_of_real_numbers_is_refused(opened: Any) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.ones((2, 2), np.float32)).save(buffer, "TIFF")
    with pytest.raises(InputError, match="found an image of real numbers"):
        read(opened(table([0, 1], [buffer.getvalue()] * 2)), 0)


def test_labels_that_are_ids_are_refused_without_classes(opened: Any) -> None:
    with pytest.raises(InputError, match="labels up to 10000001 in 2 rows"):
        opened(table([10_000_000, 10_000_001]))
