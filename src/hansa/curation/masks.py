"""Which samples of which client are used: as files, and as a change to what clients hold.

Nothing is deleted: without its masks a data set is what it was.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hansa.curation.thresholds import Threshold
from hansa.data.answers import Answers
from hansa.data.examples import Example
from hansa.errors import InputError
from hansa.federation.message import Tensors
from hansa.files import write_atomic
from hansa.parquet import read_table
from hansa.untrusted import json_of, read_text

MANIFEST, SAMPLES = "manifest.json", "samples.parquet"


@dataclass(frozen=True)
class Kept:
    """What a curation came to.

    Attributes:
        clients: client -> ``keep`` [n], bool, and maybe ``weights`` [n], of its training samples.
        manifest: what was done, as JSON values; see ``manifest``.
    """

    clients: Mapping[str, Tensors]
    manifest: Mapping[str, Any]

    def apply(self, data: Answers) -> Answers:
        """Return data without what is not kept, or where there are weights with those.

        Raises:
            InputError: made of other data, not one for each sample, or a client that is left
                without a sample.
        """
        if self.manifest["data"] != data.fingerprint:
            raise InputError(
                "curation.masks",
                f"masks of data {str(self.manifest['data'])[:12]}",
                f"masks of the run's data, {data.fingerprint[:12]}",
            )
        clients = dict(data.clients)
        for name, held in self.clients.items():
            client = clients[name]
            index = client.splits["train"]
            weights = held.get("weights", held["keep"])
            if len(weights) != len(index):
                found = f"{len(weights)} masks of {name}"
                raise InputError("curation.masks", found, f"one for each of {len(index)} samples")
            if not bool(weights.any()):
                raise InputError(
                    "curation", f"no sample of {name} that is kept", "at least one; or without it"
                )
            # What counts nothing goes as well: a loss that is no number is none at weight 0 either.
            train = index[(weights > 0).numpy()]
            client = replace(client, splits={**client.splits, "train": train})
            if "weights" in held:
                counted = torch.ones(len(client.labels))
                counted[torch.from_numpy(index)] = weights.float()
                client = replace(client, weights=counted)
            clients[name] = client
        return replace(data, clients=clients)


def manifest(
    threshold: Threshold,
    *,
    rule: Mapping[str, Any],
    soft: bool,
    domains: Sequence[str],
    data: str,
    public: str,
    model: str,
    samples: Mapping[str, torch.Tensor],
    kept: Mapping[str, torch.Tensor],
    epsilon: float | None,
) -> dict[str, Any]:
    """Return what was done, for the bundle's card: no samples, and counts as the clients told them.

    Args:
        threshold: what was sent to the clients.
        rule: the options it was set by, as JSON values.
        soft: whether samples have weights.
        domains: names of the domains.
        data: fingerprint of the clients' data.
        public: fingerprint of the public examples.
        model: digest of the model that scored (``digest``).
        samples: client -> samples by domain, in the first column, and those without a score.
        kept: client -> samples kept by domain.
        epsilon: what the counts are private by, None where they are exact.
    """
    rows, everything = [*domains, _unlike("other", domains)], _unlike("all", domains)
    names = {**dict(enumerate(domains)), -1: everything}
    levels = {names[k]: value for k, value in threshold.levels.items()}
    about: dict[str, Any] = {
        "scores": list(threshold.by),
        "rule": dict(rule),
        # JSON has no infinities: null stands for a threshold that rejects nothing.
        "thresholds": {k: v if v != float("-inf") else None for k, v in levels.items()},
        "false_rejection": {names[k]: vars(bound) for k, bound in threshold.bounds.items()},
        "soft": soft,
        "data": data,
        "public": public,
        "model": model,
        "counts": {
            name: {
                row: {"samples": n, "not_scored": bad, "kept": k}
                for row, (n, bad), (k,) in zip(
                    rows, each.tolist(), kept[name].tolist(), strict=True
                )
                if n or k
            }
            for name, each in samples.items()
        },
        "epsilon": epsilon,
    }
    text = json.dumps(about, sort_keys=True)
    return {**about, "digest": hashlib.sha256(text.encode()).hexdigest()}


def _unlike(name: str, taken: Sequence[str]) -> str:
    """Return a name that is not taken."""
    return _unlike(f"{name} *", taken) if name in taken else name


def write_samples(
    folder: Path, examples: Sequence[Example], values: Tensors, keep: Tensors
) -> None:
    """Write what a client knows of its samples, into a folder of its own.

    Args:
        folder: the client's folder.
        examples: its training examples.
        values: score -> value of each [n].
        keep: ``keep``, and maybe ``weights``; empty before a threshold was applied.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {
        "id": [example.id for example in examples],
        "domain": [example.domain for example in examples],
        "kind": [example.kind for example in examples],
        **{f"score.{name}": tensor.tolist() for name, tensor in values.items()},
        **{name: tensor.tolist() for name, tensor in keep.items()},
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    write_atomic(folder / SAMPLES, sink.getvalue().to_pybytes())


def read_samples(folder: Path) -> pa.Table:
    """Return what ``write_samples`` has written.

    Raises:
        InputError: there is nothing, or something else.
    """
    path = folder / SAMPLES
    table = read_table(path, str(path))
    if not {"id", "domain", "kind"} <= set(table.column_names):
        raise InputError(str(path), "other columns", "those of a curation")
    return table


def read_kept(folder: Path) -> Kept:
    """Return the masks that a curation left in its folder.

    Raises:
        InputError: no such folder, or one whose filter step was not reached.
    """
    path = folder / MANIFEST
    try:
        held = json_of(read_text(path))
        names = list(held["counts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            "curation.masks", f"{folder} without masks", "a folder that hansa curate has finished"
        ) from error
    clients = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:  # or it leads elsewhere
            raise InputError(f"{path}: counts", repr(name), "names of folders")
        table = read_samples(folder / "clients" / name)
        if "keep" not in table.column_names:
            raise InputError(str(folder / "clients" / name), "no masks", "a finished curation")
        clients[name] = {
            column: torch.tensor(_column(table, column, kind, folder / "clients" / name))
            for column, kind in (("keep", bool), ("weights", float))
            if column in table.column_names
        }
    return Kept(clients, held)


def _column(table: pa.Table, name: str, kind: type, place: Path) -> list[Any]:
    values: list[Any] = table[name].to_pylist()
    if any(type(value) is not kind for value in values):
        raise InputError(f"{place}: {name}", "other values", f"a {kind.__name__} a row")
    return values
