"""Where samples come from: bundled digits, Parquet files, class folders, a hub.

A source knows the label and the group of every sample at once and decodes images only when they
are asked for, so that a federation that uses a small part of a large file pays for that part.
"""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from hansa.errors import InputError
from hansa.parquet import read_table
from hansa.untrusted import json_of, read_bytes

Index = np.ndarray[tuple[int], np.dtype[np.int64]]
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What images may be, as Pillow calls it. Of its other readers one starts a program for what it
reads (EPS: Ghostscript), and few are needed."""
MOST_PIXELS = 1 << 26
"""Most pixels of an image; a file of a few kilobytes may declare any number."""


class SourceOptions(BaseModel):
    """Which samples to read, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = "digits"
    """``digits``, ``parquet:PATH`` (a file, a folder or a pattern), ``folder:PATH`` (one folder
    per class) or ``hub:NAME``."""
    image_column: str | None = None
    """Column of the images; by default the first one that holds encoded images."""
    label_column: str | None = None
    """Column of the labels; by default ``label``, ``labels`` or ``fine_label``."""
    group_column: str | None = None
    """Column that says to whom a sample belongs (writer, site), for the partition by group."""
    classes: tuple[str, ...] | None = Field(None, min_length=2)
    """Names of the classes in the order of their numbers; by default as the source says."""
    size: tuple[PositiveInt, PositiveInt] | None = None
    """Height and width that images are resized to; by default all must have one size."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour; by default as the first image."""
    hub_split: str = "train"
    """Split of a hub data set."""


@dataclass(frozen=True)
class Source:
    """Labelled samples.

    Attributes:
        name: as configured.
        labels: class numbers [n], int64.
        classes: names of the classes.
        groups: the group of every sample, or None.
        read: positions -> inputs, uint8 [n, channels, height, width] or float32.
    """

    name: str
    labels: Index
    classes: tuple[str, ...]
    groups: Sequence[str] | None
    read: Callable[[Index], torch.Tensor]


def load(options: SourceOptions) -> Source:
    """Open a source.

    Raises:
        InputError: unknown kind, missing file, no image or label column, a label outside the
            classes; on reading, a file or row that is no image or has another size.
    """
    kind, _, rest = options.source.partition(":")
    if kind == "digits" and not rest:
        return _digits(options)
    if kind in _KINDS and rest:
        return _KINDS[kind](rest, options)
    raise InputError(
        "data.source",
        repr(options.source),
        "'digits', 'parquet:PATH', 'folder:PATH' or 'hub:NAME'",
    )


def _digits(options: SourceOptions) -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # Values 0..16, scaled to [-1, 1] as other images are.
    images = torch.from_numpy(bunch.images.astype(np.float32)).unsqueeze(1).div_(8).sub_(1)
    if options.size is not None:
        images = F.interpolate(images, size=options.size, mode="bilinear")
    if options.channels is not None:
        images = images.expand(-1, options.channels, -1, -1).contiguous()
    labels = bunch.target.astype(np.int64)
    names = tuple(str(name) for name in bunch.target_names)
    return Source("digits", labels, names, None, lambda index: images[torch.from_numpy(index)])


def parquet_files(path: str, key: str) -> list[Path]:
    """Return the Parquet files that a path stands for, in the order of their names.

    Args:
        path: a file, a folder or a pattern.
        key: configuration key of the path, for errors.

    Raises:
        InputError: there is none.
    """
    place = Path(path)
    if place.is_dir():
        files = sorted(place.rglob("*.parquet"))
    else:
        try:
            files = [place] if place.is_file() else sorted(place.parent.glob(place.name))
        except ValueError:  # no pattern
            files = []
    if not files:
        raise InputError(key, f"no Parquet file at {path}", "a file, folder or pattern")
    return files


def _parquet(path: str, options: SourceOptions) -> Source:
    tables: list[pa.Table] = []
    for file in parquet_files(path, "data.source"):
        tables.append(read_table(file, f"data.source {file}"))
        if tables[-1].schema != tables[0].schema:
            raise InputError(
                f"data.source {file}", "other columns than before it", "files of one layout"
            )
    return _table(f"parquet:{path}", pa.concat_tables(tables), options)


def _hub(name: str, options: SourceOptions) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "data.source", "a hub data set without the library 'datasets'", "pip install hansa[hub]"
        ) from error
    try:
        # Of which state is for whoever names the data set to say; it is data and never code.
        loaded = datasets.load_dataset(name, split=options.hub_split)  # nosec B615 # data, never code
    except Exception as error:  # the library raises a dozen kinds, of three other libraries
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            "data.source",
            f"'hub:{name}' that could not be loaded ({reason})",
            "a data set that the hub has and this machine reaches, or parquet:PATH",
        ) from error
    return _table(f"hub:{name}", loaded.with_format("arrow")[:], options, open_paths=True)


def _table(name: str, table: pa.Table, options: SourceOptions, open_paths: bool = False) -> Source:
    """Read the columns of the Hugging Face layout: an image struct with bytes, and a label.

    A struct may name a file instead of holding its bytes. That is followed only where the hub's
    library put the path there, never where a file from elsewhere did.
    """
    images = _column(table, options.image_column, "image_column", _holds_images)
    labels = _column(
        table, options.label_column, "label_column", _is_label, lambda f: f.name in _LABELS
    )
    held = table.column(images).combine_chunks()
    is_struct = pa.types.is_struct(held.type)
    paths = held.field("path") if is_struct and held.type.get_field_index("path") >= 0 else None
    bytes_ = held.field("bytes") if is_struct else held
    declared = options.classes or _declared_classes(table.schema, labels)
    numbers, classes = _numbers(name, table.column(labels).to_pylist(), declared)
    groups = None
    if options.group_column is not None:
        column = _column(table, options.group_column, "group_column", lambda f: True)
        groups = [str(value) for value in table.column(column).to_pylist()]

    def read(index: Index) -> torch.Tensor:
        images = []
        for row in index.tolist():
            data = bytes_[row].as_py()
            place = f"{name} row {row}"
            if data is None and open_paths and paths is not None and paths[row].is_valid:
                data = _bytes(place, Path(paths[row].as_py()))
            images.append((place, _decode(place, data, options.channels)))
        return _stack(images, options)

    return Source(name, numbers, classes, groups, read)


def _folder(path: str, options: SourceOptions) -> Source:
    root = Path(path)
    if not root.is_dir():
        raise InputError("data.source", f"no folder at {path}", "a folder with one folder a class")
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [
        (file, name)
        for name in names
        for file in sorted((root / name).rglob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
    ]
    if len(names) < 2 or not files:
        raise InputError(
            f"data.source {path}",
            f"{len(names)} class folders with {len(files)} images",
            "two class folders or more, with images in them",
        )
    declared = options.classes or tuple(names)
    labels, classes = _numbers(f"folder:{path}", [name for _, name in files], declared)

    def read(index: Index) -> torch.Tensor:
        chosen = [files[k][0] for k in index.tolist()]
        return _stack(
            [(str(f), _decode(str(f), _bytes(str(f), f), options.channels)) for f in chosen],
            options,
        )

    return Source(f"folder:{path}", labels, classes, None, read)


_KINDS: dict[str, Callable[[str, SourceOptions], Source]] = {
    "parquet": _parquet,
    "folder": _folder,
    "hub": _hub,
}
_LABELS = ("label", "labels", "fine_label")


def _column(
    table: pa.Table,
    wanted: str | None,
    key: str,
    fits: Callable[[pa.Field], bool],
    is_usual: Callable[[pa.Field], bool] = lambda field: True,
) -> str:
    """Return the wanted column, or the first usual one, that is of a fitting type."""
    for field in table.schema:
        if fits(field) and (is_usual(field) if wanted is None else field.name == wanted):
            return str(field.name)
    what = f"the column {wanted!r}" if wanted is not None else "no such column"
    names = ", ".join(table.schema.names)
    raise InputError(f"data.{key}", what, f"one of the columns {names}")


def _holds_images(field: pa.Field) -> bool:
    held = field.type
    if pa.types.is_struct(held):
        index = held.get_field_index("bytes")
        if index < 0:
            return False
        held = held.field(index).type
    return bool(pa.types.is_binary(held) or pa.types.is_large_binary(held))


def _is_label(field: pa.Field) -> bool:
    kinds = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
    held = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    return any(kind(held) for kind in kinds)


def _declared_classes(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Return the class names that the Hugging Face libraries leave in a file's metadata."""
    try:
        info = json_of((schema.metadata or {})[b"huggingface"])
        return tuple(str(name) for name in info["info"]["features"][column]["names"])
    except (KeyError, ValueError, TypeError):
        return None


def _numbers(
    name: str, values: list[Any], declared: tuple[str, ...] | None
) -> tuple[Index, tuple[str, ...]]:
    """Return class numbers and class names, every label checked against the classes."""
    known = [value for value in values if value is not None]
    if all(isinstance(value, int) for value in known):
        num = max(known, default=-1) + 1
        if declared is None and num > max(2, len(values)):
            raise InputError(
                name,
                f"labels up to {num - 1} in {len(values)} rows",
                "class numbers from 0 on, or data.classes with the names",
            )
        classes = declared or tuple(str(k) for k in range(num))
        allowed = f"0 to {len(classes) - 1}"
        table: dict[Any, int] = {k: k for k in range(len(classes))}
    else:
        classes = declared or tuple(sorted({str(value) for value in known}))
        allowed = ", ".join(classes)
        table = {label: k for k, label in enumerate(classes)}
    for row, value in enumerate(values):
        if value not in table:
            raise InputError(f"{name} row {row}", f"the label {value!r}", f"a class: {allowed}")
    if len(classes) < 2:
        raise InputError(name, f"{len(classes)} classes", "two or more")
    return np.array([table[value] for value in values], np.int64), classes


def _bytes(place: str, path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise InputError(place, f"{path} ({error.strerror})", "an image file") from error


def _decode(place: str, data: Any, channels: int | None) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # The limit here is less.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data or b""), formats=FORMATS)
        if math.prod(image.size) <= MOST_PIXELS:  # as declared, before there is memory for them
            image.load()
    except Image.DecompressionBombError as error:
        raise InputError(place, f"too large an image ({error})", "a smaller image") from error
    except Exception as error:  # a reader of images raises whatever damaged bytes lead it to
        raise InputError(
            place, "something that is no image", "an image file such as PNG or JPEG"
        ) from error
    if math.prod(image.size) > MOST_PIXELS:
        found = f"too large an image ({image.width}x{image.height} pixels)"
        raise InputError(place, found, f"up to {MOST_PIXELS} pixels")
    if image.mode == "F":
        raise InputError(place, "an image of real numbers", "8 or 16 bits per channel")
    if image.mode.startswith("I"):  # 16 bits, which `convert` would cut off instead of scale
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if channels is None:
        channels = 1 if image.mode in ("1", "L", "LA") else 3
    return image.convert("L" if channels == 1 else "RGB")


def _stack(images: list[tuple[str, Image.Image]], options: SourceOptions) -> torch.Tensor:
    arrays: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    for place, image in images:
        if options.size is not None:
            image = image.resize(options.size[::-1], Image.Resampling.BILINEAR)
        array = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
        if arrays and array.shape != arrays[0].shape:
            raise InputError(
                place,
                f"an image of {_shape(array.shape)}",
                f"{_shape(arrays[0].shape)} like those before it, or set data.size and "
                "data.channels",
            )
        arrays.append(array)
    return torch.from_numpy(np.stack(arrays))


def _shape(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[2]} pixels with {shape[0]} channels"
