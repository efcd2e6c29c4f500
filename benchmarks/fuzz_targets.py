"""What ``fuzz.py`` hands bytes to: everything of Hansa's that reads what comes from elsewhere.

Each target knows valid inputs, made on the spot, and the errors that may come of others. Where a
format has checksums, they are made to fit, so that damage gets past them.
"""

import hashlib
import io
import json
import shutil
import sqlite3
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from hansa import auditing, bundle, config, parquet, safeguard_config, searching
from hansa.audit.coding import decode as decode_body
from hansa.audit.coding import encode as encode_body
from hansa.audit.domains import domain, recorded
from hansa.audit.inplace import edited
from hansa.audit.plan import read_plan
from hansa.audit.tamper import decoded, encoded
from hansa.curation.masks import read_kept
from hansa.data.clients import Client
from hansa.data.examples import read_examples
from hansa.data.sources import SourceOptions, load
from hansa.data.text_sources import Query, read
from hansa.data.tokenizer import ByteTokenizer, tokenizer_from_json, train_bpe
from hansa.deploy.charter import Charter
from hansa.deploy.options import read_deployment
from hansa.deploy.party import Party
from hansa.errors import InputError
from hansa.federation.engines.flower.exchange import (
    Answer,
    LetterError,
    Request,
    about,
    from_bytes,
    to_bytes,
)
from hansa.federation.engines.flower.site import Site
from hansa.federation.message import Message, MessageError
from hansa.federation.store import DiskStore
from hansa.federation.wire import PREFIX, decode, encode
from hansa.models import Architecture, build, restore
from hansa.pipeline import options as pipelines
from hansa.pipeline import run as pipeline_run
from hansa.search.foreign_blox import write_blox
from hansa.search.recipes import RECIPES
from hansa.search.store import Store
from hansa.search.table import Row, Table
from hansa.search.tables import open_table, write
from hansa.search.training import Curves
from hansa.tensor_files import tensors_of

parquet.LEAST_HELD = 1 << 26  # so that what a fuzzer can make is too much
ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def same(data: bytes) -> bytes:
    """Return an input that needs no checksum."""
    return data


@dataclass(frozen=True)
class Target:
    """Something that reads bytes.

    Attributes:
        seeds: folder -> valid inputs; what they need beside them is made in the folder.
        run: reads an input in that folder.
        named: what may come of it.
        fixed: an input -> with checksums that fit.
    """

    seeds: Callable[[Path], list[bytes]]
    run: Callable[[bytes, Path], object]
    named: tuple[type[Exception], ...] = (InputError,)
    fixed: Callable[[bytes], bytes] = same


def of_file(
    name: str, use: Callable[[Path], object], *seeds: Callable[[Path], list[bytes]]
) -> Target:
    """Return the target that reads a file of this name."""

    def run(data: bytes, folder: Path) -> object:
        (folder / name).write_bytes(data)
        return use(folder / name)

    return Target(lambda folder: [each for made in seeds for each in made(folder)], run)


def of_files(
    names: tuple[str, ...], make: Callable[[Path], object], use: Callable[[Path], object]
) -> Target:
    """Return the target that reads a folder; an input's first byte says which file it is.

    Args:
        names: of the files.
        make: fills the folder.
        use: reads it.
    """

    def seeds(folder: Path) -> list[bytes]:
        make(folder / "whole")
        files = [(folder / "whole" / name).read_bytes() for name in names]
        return [bytes([k]) + held for k, held in enumerate(files)]

    def run(data: bytes, folder: Path) -> object:
        which = names[data[0] % len(names)] if data else names[0]
        place = folder / "whole"
        before = (place / which).read_bytes()
        (place / which).write_bytes(data[1:])
        try:
            return use(place)
        finally:
            (place / which).write_bytes(before)

    return Target(seeds, run)


def texts(*names: str) -> Callable[[Path], list[bytes]]:
    """Return seeds: examples that come with Hansa."""
    return lambda folder: [(EXAMPLES / name).read_bytes() for name in names]


def lines(*held: bytes) -> Callable[[Path], list[bytes]]:
    """Return seeds as they stand here."""
    return lambda folder: list(held)


# Messages, requests and states.


def messages(folder: Path) -> list[bytes]:
    """Return messages in all forms."""
    sparse = torch.zeros(40, 8)
    sparse[::7, 3] = 1.5
    groups = {
        "model": {"a.weight": torch.randn(4, 3), "b": sparse, "c": torch.arange(5)},
        "mask": {"a.weight": torch.eye(12, dtype=torch.bool), "n": torch.zeros(99) > 1},
        "buffers": {"half": torch.ones(3).half(), "d": torch.zeros(0, 2), "s": torch.tensor(2.0)},
    }
    whole = Message(groups, {"weight": 3.5, "kind": "x", "n": 2}, {"loss": (1.5, 3)})
    return [
        encode(whole),
        encode(Message(scalars={"a": 1})),
        encode(Message({"m": groups["mask"]})),
    ]


def sealed(data: bytes) -> bytes:
    """Return a message whose prefix fits what follows."""
    body = data[PREFIX.size :]
    return PREFIX.pack(b"HANSAMSG", 1, zlib.crc32(body), len(body)) + body


def letters(folder: Path) -> list[bytes]:
    """Return requests and answers."""
    body = messages(folder)[1]
    return [
        *(to_bytes(Request(kind, "run-1", "root/a", 3, 2, body)) for kind in ("train", "score")),
        *(to_bytes(Request(kind, "run-1", "root/a")) for kind in ("hello", "end")),
        to_bytes(Answer("root/a", 3, "ok", "", {"loss": (1.5, 3.0)}, {"samples": 4}, body)),
    ]


class Idle:
    """A worker that gives back what it is told."""

    samples = 3

    def train(self, number: int, store: Any, down: Message) -> tuple[Message, dict[str, Any]]:
        """Keep the message as the node's state."""
        store.put("root/a", down)
        return down, {"loss": (1.0, 1.0)}

    def score(self, number: int, store: Any, down: Message) -> dict[str, Any]:
        """Return no scores."""
        store.get("root/a")
        return {"test": {"loss": (1.0, 1.0)}}

    def end(self) -> None:
        """Do nothing."""


def answered(data: bytes, folder: Path) -> object:
    """Read a letter as both kinds; a site answers whatever request it is."""
    for kind in (Answer, Request):
        try:
            made = from_bytes(kind, data)  # type: ignore[type-var]
        except LetterError:
            continue
        if isinstance(made, Request):
            assert len(made.digest) == 64  # noqa: S101
            place = folder / "site"
            shutil.rmtree(place, ignore_errors=True)
            back = Site("root/a", place, Idle()).answer(made)
            assert from_bytes(Answer, to_bytes(back)).status == back.status  # noqa: S101
            odd = [p for p in folder.iterdir() if p.name not in ("site", "corpus")]
            assert not odd, odd  # noqa: S101
        else:
            to_bytes(made)  # type: ignore[arg-type]
    return None


def recorded_letter(data: bytes, folder: Path) -> object:
    """Read Flower's records with the text of an input, and as Flower sends them."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    from hansa.federation.engines.flower.records import from_records

    text, _, body = data.partition(b"\n")
    held: Any = {"about": text.decode(errors="replace") if data[:1] != b"\0" else text}
    content = RecordDict({"hansa": ConfigRecord(held)})
    if body:
        array = Array("uint8", (len(body),), "hansa.message", body)
        content["message"] = ArrayRecord({"body" if body[:1] != b"\0" else "odd": array})
    for kind in (Request, Answer):
        try:
            from_records(kind, content)  # type: ignore[type-var]
        except LetterError:
            continue
    return None


def stored(path: Path) -> object:
    """Read a state as the store does."""
    place = path.parent / "states" / "root"
    place.mkdir(parents=True, exist_ok=True)
    path.replace(place / "00000001.msg")
    return DiskStore(place.parent, 1).get("root")


# Bundles and runs.


def whole_bundle(folder: Path) -> None:
    """Write a bundle with all files that one may have."""
    architecture = Architecture(name="mlp", options={"hidden": [3]}, shape=(1, 4, 4), classes=3)
    weights = build(architecture).state_dict()
    masks = {name: torch.ones_like(t, dtype=torch.bool) for name, t in weights.items()}
    bundle.write(
        folder,
        stage="train",
        weights=weights,
        architecture=architecture.model_dump(mode="json"),
        config={"name": "x"},
        seed=1,
        data="0" * 64,
        metrics={"accuracy": 0.5},
        masks=masks,
        kept=masks,
        tokenizer=ByteTokenizer().as_json(),
    )


def opened_bundle(folder: Path) -> object:
    """Read a bundle whose card has the digests of what is there, and build its model."""
    card = (folder / "card.json").read_bytes()
    try:
        told = json.loads(card)
        for name in told["files"]:
            told["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / "card.json").write_text(json.dumps(told))
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        pass
    try:
        found = bundle.read_bundle(folder)
        _ = found.lineage
        if found.tokenizer:
            tokenizer_from_json(found.tokenizer)
        return restore(found)
    finally:
        (folder / "card.json").write_bytes(card)


RUN: list[Path] = []


def whole_run(folder: Path) -> None:
    """Train a little run, once."""
    from hansa.training import train

    values = {
        "output": str(folder.parent / "runs"),
        "rounds": 1,
        "data": {"clients": 2, "partition": {"kind": "iid"}},
        "model": {"options": {"hidden": [2]}},
        "engine": {"workers": 1},
    }
    train(values)
    shutil.move(str(next((folder.parent / "runs").iterdir())), folder)
    mask = {"x": torch.ones(2, dtype=torch.bool)}
    (folder / "pruning.safetensors").write_bytes(tensors(mask))
    place = folder / "curation"
    place.mkdir()
    (place / "00000001.safetensors").write_bytes(tensors({"a/keep": mask["x"]}))
    (place / "00000001.json").write_text(json.dumps({"round": 1, "counts": {}}))


def tensors(held: Mapping[str, torch.Tensor]) -> bytes:
    """Return tensors as bytes."""
    import safetensors.torch

    data: bytes = safetensors.torch.save(dict(held))
    return data


def opened_run(folder: Path) -> object:
    """Open a run and read all that it holds."""
    from hansa.runs import Run

    run = Run(folder)
    _ = run.masks, run.curated(5), run.plan, run.data_fingerprint
    return run.summary()


def checked_tensors(data: bytes, folder: Path) -> object:
    """Read tensors, as such and as a client's."""
    (folder / "client.safetensors").write_bytes(data)
    for read_ in (lambda: tensors_of(data), lambda: Client.load(folder / "client.safetensors")):
        try:
            read_()
        except (ValueError, KeyError):
            continue
    return None


def tensor_seeds(folder: Path) -> list[bytes]:
    """Return files of tensors."""
    held = torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    client = Client.of(held, held)
    client.save(folder / "c")
    return [
        (folder / "c").read_bytes(),
        tensors({"a": torch.zeros(3, 0), "b": torch.ones(2).half()}),
    ]


# Tables.


def small_table() -> Table:
    """Return a table of two models and two seeds."""
    recipe = RECIPES["digits16-w8"]
    n = recipe.epochs
    curves = Curves([5] * n, [9] * n, [8] * n, [0.5] * n, [0.4] * n, [0.3] * n, 1.5, False)
    return Table.of_rows(recipe, [Row(m, s, curves) for m in (0, 7) for s in (0, 1)])


def table_seeds(folder: Path) -> list[bytes]:
    """Return a table as Parquet."""
    write(small_table(), folder / "t.parquet")
    return [(folder / "t.parquet").read_bytes()]


def store_seeds(folder: Path) -> list[bytes]:
    """Return a table as SQLite, and one whose tables are views without an end."""
    recipe, table = RECIPES["digits16-w8"], small_table()
    store = Store(folder / "s.sqlite")
    store.add(recipe, [(row.model, row.seed) for row in table.rows])
    for row in table.rows:
        store.finish(recipe.name, (row.model, row.seed), row.curves)
    held = sqlite3.connect(folder / "s.sqlite")
    held.execute("PRAGMA journal_mode=DELETE")
    held.close()
    return [(folder / "s.sqlite").read_bytes()]


def blox_folder(folder: Path) -> None:
    """Write a table as csv files."""
    table = small_table()
    from hansa.search.columns import Columns
    from hansa.search.spaces import BLOX

    shape = len(table.models), 2
    columns = Columns(
        space=BLOX,
        recipe="blox-x",
        models=table.models,
        seeds=(0, 1),
        validation=np.full(shape, 0.5),
        test=np.full(shape, 0.5),
        train_seconds=np.ones(shape),
        parameters=np.ones(shape[0]),
        multiply_adds=np.ones(shape[0]),
        latency={"cpu": np.ones(shape[0])},
        curves={"validation": np.full((*shape, 3), 0.5)},
    )
    write_blox(columns, folder)


def macro_seeds(folder: Path) -> list[bytes]:
    """Return NAS-Bench-Macro's JSON with two models."""
    row = {"test_acc": [91.2, 90.1, 92.0], "params": 1.5, "flops": 20}
    return [json.dumps({"00000000": row, "01201201": row}).encode()]


def parquet_seeds(folder: Path) -> list[bytes]:
    """Return tables of images, questions, texts, and of what is small here and large in memory."""
    png = images(folder)[0]
    image = pa.array([{"bytes": png, "path": "a.png"}] * 4)
    made = [
        pa.table({"image": image, "label": [0, 1, 0, 1]}),
        pa.table({"question": ["a", "b"], "answer": ["c", "d"], "n": [[1, 2], []], "id": [1, 2]}),
        pa.table(
            {"text": ["abc", None, "d\u00e9f"], "when": pa.array([0, 2**60, 1], pa.timestamp("us"))}
        ),
        pa.table(
            {"text": pa.array(["x" * 100] * 50).dictionary_encode(), "label": list(range(50))}
        ),
        pa.table({"image": [b"no image", b""], "label": ["a", "b"]}),
        pa.table({"label": pa.array([b"\xff", b"a"]).view(pa.string()), "image": [png, png]}),
        pa.table({"question": pa.array([1, 2]), "answer": pa.array([None, None])}),
        pa.table({"text": pa.array(["y" * 4000] * 4000).dictionary_encode()}),
    ]
    found = []
    for table in made:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        found.append(sink.getvalue())
    return found


def read_parquet(path: Path) -> object:
    """Read a Parquet file in every way that there is."""
    for use in (
        lambda: read_examples(f"parquet:{path}", "data"),
        lambda: read(f"parquet:{path}", Query("text", 1 << 20)),
        lambda: (found := load(SourceOptions(source=f"parquet:{path}"))).read(
            np.arange(min(len(found.labels), 4))
        ),
        lambda: read_kept_of(path),
    ):
        try:
            use()
        except InputError:
            continue
    return None


def read_kept_of(path: Path) -> object:
    """Read a file as a curation's masks."""
    place = path.parent / "curated"
    (place / "clients" / "a").mkdir(parents=True, exist_ok=True)
    (place / "manifest.json").write_text('{"counts": {"a": {}}}')
    shutil.copy(path, place / "clients" / "a" / "samples.parquet")
    return read_kept(place)


def images(folder: Path) -> list[bytes]:
    """Return images of all kinds that are read, and some that are not."""
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    found = []
    for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "EPS", "ICO"):
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, kind)
        found.append(sink.getvalue())
    sink = io.BytesIO()
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 200).save(sink, "PNG")
    header = struct.pack(">II", 30_000, 30_000) + b"\x08\x02\0\0\0"
    chunk = b"IHDR" + header
    bomb = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )
    return [*found, sink.getvalue(), bomb + found[0][33:]]


def read_image(data: bytes, folder: Path) -> object:
    """Read an image as one of a folder of classes."""
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
    (folder / "images" / "a" / "x.png").write_bytes(data)
    (folder / "images" / "b" / "x.png").write_bytes(images(folder)[0])
    return load(SourceOptions(source=f"folder:{folder / 'images'}")).read(np.arange(1))


# Audits.

PLAN = b"""seed = 1
[[tamper]]
route = "/v1/*"
action = "shift"
path = "current.temp_c"
by = 7
unit = "c"
follow = {"current.temp_f" = "f"}
[[tamper]]
action = "swap"
path = "location.name"
old = "Here"
value = "There"
"""


def planned(data: bytes, folder: Path) -> object:
    """Read a plan as TOML and as JSON, and apply it."""
    for suffix in (".toml", ".json"):
        path = folder / f"plan{suffix}"
        path.write_bytes(data)
        try:
            read_plan(path).apply(DOCUMENT)
        except InputError:
            continue
    return None


DOCUMENT = domain("weather").cases[0].document
_BODY = encoded(DOCUMENT)


def tampered_body(data: bytes, folder: Path) -> object:
    """Do with a body what the proxy does; its first byte says how it is encoded."""
    names = ([], ["gzip"], ["deflate"], ["gzip", "deflate"])[data[0] % 4] if data else []
    body = decode_body(data[1:], names, 1 << 20)
    plan = read_plan(
        {"tamper": [{"action": "shift", "path": "current.temp_c", "by": 7, "unit": "c"}]}
    )
    made = plan.apply(decoded(body), "/v1/x", "key")
    return encode_body(edited(body, made.edits), names, data[1:])


def bodies(folder: Path) -> list[bytes]:
    """Return responses in the encodings of the way, and a small one that stands for a large."""
    return [
        b"\0" + _BODY,
        b"\1" + encode_body(_BODY, ["gzip"], b""),
        b"\2" + encode_body(_BODY, ["deflate"], b"\x78\x9c"),
        b"\0" + '\ufeff{"current": {"temp_c": 1.5}, "current": {"temp_c": 2}}'.encode("utf-16"),
        b"\0" + b'{"current": {"temp_c": 12345678901234567890, "x": "\\ud83d\\ude00"}}',
    ]


def cases(folder: Path) -> list[bytes]:
    """Return recorded cases."""
    held = [case.as_json() for name in ("weather", "news") for case in domain(name).cases[:3]]
    return [json.dumps(each).encode() + b"\n" for each in held]


# Pipelines.


def outcome_folder(folder: Path) -> None:
    """Make the folder of a pipeline whose first stage is done."""
    stages = pipeline_run.plan(_stages(folder))
    place = folder / "pipeline-seed0" / stages[0].folder
    place.mkdir(parents=True)
    whole_bundle(place / "bundle")
    told = {
        "bundle": f"{place.name}/bundle",
        "digest": bundle.read_bundle(place / "bundle").digest,
        "report": f"{place.name}/report.html",
        "seconds": 1.5,
        "figures": {"accuracy": "0.5"},
    }
    (place / "outcome.json").write_text(json.dumps(told))
    (folder / "outcome.json").write_text(json.dumps(told))
    (folder / "odd").touch()


def _stages(folder: Path) -> dict[str, Any]:
    stages = [{"kind": "train", "config": {"rounds": 1}}]
    return {"output": str(folder), "stages": stages}


def outcome_read(folder: Path) -> object:
    """Ask which stages of a pipeline are done."""
    place = next((folder / "pipeline-seed0").iterdir())
    shutil.copy(folder / "outcome.json", place / "outcome.json")
    (stage,) = pipeline_run.plan(_stages(folder))
    for held in (stage.bundle, stage.report):
        inside = (folder / "pipeline-seed0" / (held or "")).resolve()
        assert inside.is_relative_to(folder.resolve()), held  # noqa: S101
    return stage


def parties(folder: Path) -> list[bytes]:
    """Return a party's settings."""
    return [
        b'path = "root/a"\ntext = "file:x"\n[upward]\nsuperlink = "host:8000"\npatience = 9.5\n'
        b'[rules]\nsteps = 3\n[data]\nsource = "digits"\n',
        b'path = "root"\n[server]\nhost = "h"\nport = 8000\ninner_port = 8001\ndeadline = 9.0\n'
        b"wait = 3.0\n",
    ]


def charters(folder: Path) -> list[bytes]:
    """Return a federation's settings."""
    charter = Charter(
        config.load({"data": {"clients": 2}}),
        "root",
        ("root/a",),
        ("root/a",),
        (1, 8, 8),
        ("a", "b"),
        1,
    )
    charter.write(folder / "c.toml")
    return [(folder / "c.toml").read_bytes()]


def tokenizers(folder: Path) -> list[bytes]:
    """Return tokenisers of both kinds."""
    text = "the quick brown fox jumps over the lazy dog " * 20
    return [ByteTokenizer().as_json().encode(), train_bpe(text, 270).as_json().encode()]


def tokenized(data: bytes, folder: Path) -> object:
    """Open a tokeniser and use it."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    made = tokenizer_from_json(text)
    ids = made.encode("a text, d\u00e9j\u00e0 vu")
    return made.decode(ids)


_JSONL = lines(
    b'{"question": "a?", "answer": "b", "domain": "d", "id": 3, "n": {"x": [1, 2.5, null]}}\n'
    b'{"question": "c?", "answer": "d", "kind": "clean", "fact": "d", "extra": "\\u00e9"}\n'
)

TARGETS: dict[str, Target] = {
    "message": Target(
        messages, lambda data, folder: decode(data, 1 << 24), (MessageError,), sealed
    ),
    "letter": Target(letters, answered, ()),
    "records": Target(
        lambda folder: [
            about(Request("train", "r", "root", 1)).encode() + b"\nbody",
            about(Answer("root", 1)).encode(),
        ],
        recorded_letter,
        (),
    ),
    "state": Target(messages, of_file("s.msg", stored).run, fixed=sealed),
    "bundle": of_files(
        (
            bundle.CARD,
            bundle.ARCHITECTURE,
            bundle.WEIGHTS,
            bundle.MASKS,
            bundle.KEPT,
            bundle.TOKENIZER,
        ),
        whole_bundle,
        opened_bundle,
    ),
    "run": of_files(
        (
            "checkpoint.json",
            "config.toml",
            "scores.parquet",
            "rounds.parquet",
            "pruning.safetensors",
            "curation/00000001.safetensors",
            "curation/00000001.json",
        ),
        whole_run,
        opened_run,
    ),
    "tensors": Target(tensor_seeds, checked_tensors, ()),
    "config": of_file(
        "c.toml",
        config.load,
        texts(
            "digits-fedselect.toml",
            "digits-pruned.toml",
            "worldlm.toml",
            "curation.toml",
            "digits-zerofl.toml",
        ),
    ),
    "pipeline": of_file(
        "p.toml",
        pipelines.load,
        lambda folder: [path.read_bytes() for path in pipelines.SHIPPED.values()],
    ),
    "outcome": of_files(("outcome.json",), outcome_folder, outcome_read),
    "search": of_file("s.toml", searching.load, texts("search.toml")),
    "safeguard": of_file("s.toml", safeguard_config.load, texts("safeguard.toml")),
    "audit": of_file("a.toml", auditing.load, texts("audit.toml")),
    "plan": Target(
        lambda folder: [
            PLAN,
            json.dumps({"tamper": [{"action": "delete", "path": "a[0].b"}]}).encode(),
        ],
        planned,
        (),
    ),
    "body": Target(bodies, tampered_body, (InputError, ValueError)),
    "cases": of_file("c.jsonl", recorded, cases),
    "deployment": of_file("f.toml", read_deployment, texts("deployment/federation.toml")),
    "party": of_file("party.toml", lambda path: Party.read(path.parent), parties),
    "charter": of_file("federation.toml", Charter.read, charters),
    "jsonl": of_file("e.jsonl", lambda path: read_examples(f"jsonl:{path}", "data"), _JSONL),
    "parquet": Target(parquet_seeds, of_file("t.parquet", read_parquet).run, ()),
    "image": Target(images, read_image),
    "table": of_file("t.parquet", open_table, table_seeds),
    "store": of_file("t.sqlite", open_table, store_seeds),
    "macro": of_file("m.json", open_table, macro_seeds),
    "blox": of_files(
        ("blox-base-0.csv", "blox-info.csv", "blox-bench-cpu.csv"), blox_folder, open_table
    ),
    "tokenizer": Target(tokenizers, tokenized),
}
