"""The bundle: what passes from one stage of a model's life to the next.

A bundle is a folder:

``weights.safetensors``
    every parameter and buffer by name.
``architecture.json``
    how to build the model.
``masks.safetensors``
    a method's masks by parameter name, where there are any.
``kept.safetensors``
    which weights of a pruned model are there at all, by parameter name.
``tokenizer.json``
    of a language model, what its tokens stand for.
``card.json``
    provenance: stage, configuration, seed, data fingerprint, metrics, the digests of the files
    above, and the digests of the bundles that this one came from. Where training was private,
    what it and that of the ancestors spent; where classes have names, those.

The digest of a bundle is the SHA-256 of its card; since the card holds the digests of all other
files and of the ancestors, it vouches for the whole line. Nothing in a bundle is code.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from hansa.errors import InputError
from hansa.files import sync_folder, write_atomic
from hansa.tensor_files import tensors_of
from hansa.untrusted import json_of, read_bytes

FORMAT = 1
CARD, ARCHITECTURE, WEIGHTS, MASKS, KEPT, TOKENIZER = (
    "card.json",
    "architecture.json",
    "weights.safetensors",
    "masks.safetensors",
    "kept.safetensors",
    "tokenizer.json",
)
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory, as read and verified.

    Attributes:
        weights: every parameter and buffer by name.
        architecture: how to build the model.
        masks: a method's bool masks by parameter name; empty where there are none.
        kept: bool masks by parameter name, True where a weight was kept by pruning; empty where
            nothing was pruned.
        card: provenance.
        digest: SHA-256 of the card, as hex.
        tokenizer: of a language model, its tokenizer as JSON (``tokenizer_from_json``); else empty.
    """

    weights: Tensors
    architecture: Mapping[str, Any]
    masks: Tensors
    kept: Tensors
    card: Mapping[str, Any]
    digest: str
    tokenizer: str = ""

    @property
    def lineage(self) -> list[dict[str, str]]:
        """Stage and digest of every ancestor, oldest first, and of this bundle."""
        return [*self.card["lineage"], {"stage": self.card["stage"], "digest": self.digest}]

    @property
    def privacy(self) -> list[dict[str, Any]]:
        """What every private stage up to here spent, oldest first: ``stage`` and ``nodes``."""
        return list(self.card.get("privacy", ()))

    @property
    def labels(self) -> list[str]:
        """Names of the classes in the order of the logits; empty where they are not known."""
        return list(self.card.get("labels", ()))


def write(
    path: Path,
    *,
    stage: str,
    weights: Tensors,
    architecture: Mapping[str, Any],
    config: Mapping[str, Any],
    seed: int,
    data: str,
    metrics: Mapping[str, Any],
    masks: Tensors | None = None,
    kept: Tensors | None = None,
    parent: Bundle | None = None,
    tokenizer: str = "",
    privacy: Mapping[str, Mapping[str, Any]] | None = None,
    labels: Sequence[str] = (),
) -> Bundle:
    """Write a bundle; the folder appears whole or not at all.

    Args:
        path: the folder to make, or an older bundle to replace.
        stage: what made it: ``search``, ``prune``, ``train``, ...
        weights: every parameter and buffer by name.
        architecture: how to build the model, as JSON values.
        config: the stage's configuration, as JSON values.
        seed: the run's seed.
        data: fingerprint of the data.
        metrics: what was measured, as JSON values.
        masks: a method's bool masks by parameter name.
        kept: bool masks by parameter name, True where a weight was kept by pruning.
        parent: the bundle that the stage started from.
        tokenizer: of a language model, its tokenizer as JSON.
        privacy: private node -> what this stage spent of it, as JSON values.
        labels: names of the classes in the order of the logits; by default the parent's.

    Raises:
        InputError: the path holds something that is no bundle.
    """
    if path.exists() and not (path / CARD).is_file():
        raise InputError(str(path), "a file or folder that is no bundle", "a new path")
    files = {
        ARCHITECTURE: _json(architecture),
        WEIGHTS: _tensors(weights),
    }
    for name, group in ((MASKS, masks), (KEPT, kept)):
        if group:
            files[name] = _tensors(group)
    if tokenizer:
        files[TOKENIZER] = tokenizer.encode()
    card = {
        "format": FORMAT,
        "stage": stage,
        "config": config,
        "seed": seed,
        "data": data,
        "metrics": metrics,
        "lineage": parent.lineage if parent else [],
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    # What training spent, it spent for every model that is made of its own.
    spent = [*(parent.privacy if parent else ())]
    spent += [{"stage": stage, "nodes": privacy}] if privacy else []
    named = [*labels] or (parent.labels if parent else [])
    card |= {key: value for key, value in (("privacy", spent), ("labels", named)) if value}
    files[CARD] = _json(card)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    for name, content in files.items():
        write_atomic(beside / name, content)
    # The old one is moved aside whole: a kill leaves one bundle, the other, or none, never a part.
    aside = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        path.replace(aside)
    beside.replace(path)
    sync_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)
    return read_bundle(path)


def restated(
    parent: Bundle, path: Path, stage: str, found: Mapping[str, Any], config: Mapping[str, Any]
) -> Bundle:
    """Write a bundle again, with what a stage that leaves its weights alone has found.

    Args:
        parent: the bundle.
        path: the folder to make, or an older bundle to replace.
        stage: what was found by, which is also its key among the metrics and in the configuration.
        found: what was found, as JSON values.
        config: how, as JSON values.

    Raises:
        InputError: the path holds something that is no bundle.
    """
    return write(
        path,
        stage=stage,
        weights=parent.weights,
        architecture=parent.architecture,
        config={**parent.card["config"], stage: config},
        seed=parent.card["seed"],
        data=parent.card["data"],
        metrics={**parent.card["metrics"], stage: found},
        masks=parent.masks,
        kept=parent.kept,
        parent=parent,
        tokenizer=parent.tokenizer,
    )


def read_bundle(path: str | Path) -> Bundle:
    """Read a bundle and verify it.

    Raises:
        InputError: no bundle there, or one whose content does not match its digests.
    """
    path = Path(path)
    card_bytes = _bytes(path, CARD)
    try:
        card = json_of(card_bytes)
        known = card["format"] == FORMAT
        files = card["files"]
        complete = isinstance(files, dict)
        complete = complete and {ARCHITECTURE, WEIGHTS} <= set(files) <= {
            ARCHITECTURE,
            WEIGHTS,
            MASKS,
            KEPT,
            TOKENIZER,
        }
        complete = complete and _is_card(card)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(str(path / CARD), "no card of a bundle", "a bundle") from error
    if not (known and complete):
        raise InputError(str(path / CARD), "another format", f"format {FORMAT}")
    held = {p.name for p in path.iterdir()}
    # What a link leads to is not part of the bundle, and goes wherever it likes once it is moved.
    if links := sorted(name for name in (*files, CARD) if (path / name).is_symlink()):
        raise InputError(str(path / links[0]), "a link", "the file itself")
    if odd := sorted(held - set(files) - {CARD}):
        raise InputError(str(path / odd[0]), "a file that the card does not name", "no such file")
    content = {name: _bytes(path, name) for name in files}
    for name, digest in files.items():
        if hashlib.sha256(content[name]).hexdigest() != digest:
            raise InputError(str(path / name), "content that differs from the card", f"{digest}")
    try:
        weights = tensors_of(content[WEIGHTS])
        masks, kept = (
            tensors_of(content[name]) if name in content else {} for name in (MASKS, KEPT)
        )
        architecture = json_of(content[ARCHITECTURE])
        tokenizer = content.get(TOKENIZER, b"").decode()
    except ValueError as error:
        raise InputError(str(path), f"unreadable content ({error})", "a bundle") from error
    if not isinstance(architecture, dict):
        found = type(architecture).__name__
        raise InputError(str(path / ARCHITECTURE), found, "a table that says how to build it")
    for name, group in ((MASKS, masks), (KEPT, kept)):
        for key, mask in group.items():
            if mask.dtype is not torch.bool:
                raise InputError(str(path / name), f"{mask.dtype} as {key}", "truth values")
    digest = hashlib.sha256(card_bytes).hexdigest()
    return Bundle(weights, architecture, masks, kept, card, digest, tokenizer)


def digest(tensors: Tensors) -> str:
    """Return SHA-256 over the values of a model, as hex."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _bytes(path: Path, name: str) -> bytes:
    try:
        return read_bytes(path / name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(str(path / name), "no such file", "a bundle's folder") from error
    except OSError as error:
        raise InputError(str(path / name), f"unreadable ({error.strerror})", "a file") from error


def _is_card(card: Mapping[str, Any]) -> bool:
    """Tell whether a card has what those who pass a bundle on take from it, of the right kinds."""
    kinds = {"stage": str, "config": dict, "seed": int, "data": str, "metrics": dict}
    lineage = card["lineage"]
    return (
        all(isinstance(card[key], kind) for key, kind in kinds.items())
        and isinstance(lineage, list)
        and all(
            isinstance(each, dict)
            and isinstance(each.get("stage"), str)
            and isinstance(each.get("digest"), str)
            for each in lineage
        )
        and all(isinstance(digest, str) for digest in card["files"].values())
    )


def _tensors(tensors: Tensors) -> bytes:
    # Copies, since the format takes neither tied nor strided tensors.
    copies = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    data: bytes = safetensors.torch.save(copies)
    return data


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
