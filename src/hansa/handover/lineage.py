"""Whether a bundle is what its card says, and whether its ancestors are."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hansa.bundle import CARD, read_bundle
from hansa.errors import InputError


def verify(path: str | Path, parents: Iterable[str | Path] = ()) -> dict[str, Any]:
    """Check all digests of a bundle, and of those of its ancestors that lie below some folders.

    An ancestor is known by the digest in the bundle's card, wherever it lies. It counts as found
    once all its own digests hold and it descends from the bundles that the card names before it.

    Args:
        path: the bundle.
        parents: folders in which to look for ancestors, at any depth.

    Returns:
        JSON values: ``digest``, ``files`` (name -> digest), and ``lineage``: ``stage``, ``digest``
        and ``found`` (its folder, None where it is not there) of every ancestor, oldest first.

    Raises:
        InputError: a file whose content differs from its digest, in the bundle or an ancestor; an
            ancestor with another line; or no such folder.
    """
    found = read_bundle(path)
    line: list[dict[str, Any]] = [dict(step) for step in found.card["lineage"]]
    places = _places({step["digest"] for step in line}, parents)
    for number, step in enumerate(line):
        place = places.get(step["digest"])
        if place is not None:
            ancestor = read_bundle(place)
            if ancestor.lineage != found.lineage[: number + 1]:
                raise InputError(str(place), "an ancestor with another line", f"that of {path}")
        step["found"] = str(place) if place else None
    return {
        "bundle": str(path),
        "digest": found.digest,
        "files": dict(found.card["files"]),
        "lineage": line,
    }


def _places(digests: set[str], parents: Iterable[str | Path]) -> dict[str, Path]:
    """Return digest of a card -> the folder that it lies in."""
    found: dict[str, Path] = {}
    for folder in map(Path, parents):
        if not folder.is_dir():
            raise InputError("--parents", f"{folder}, which is no folder", "folders with bundles")
        for card in sorted(folder.rglob(CARD)):
            digest = hashlib.sha256(card.read_bytes()).hexdigest()
            if digest in digests:
                found.setdefault(digest, card.parent)
    return found
