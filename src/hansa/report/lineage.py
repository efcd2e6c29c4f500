"""Which bundles a bundle came from, and what is in it."""

from pathlib import Path

from hansa.bundle import read_bundle
from hansa.errors import InputError
from hansa.report.parts import Part, table

NOTE = (
    "Oldest first; each was made from the one above it, and the last is the one of this page. A "
    "digest is the SHA-256 of a bundle's card, which holds the digests of its files and of all "
    "bundles before it."
)


def lineage(folder: Path) -> list[Part]:
    """Return a table of a bundle's ancestors and itself, nothing where there is no whole bundle."""
    try:
        found = read_bundle(folder)
    except InputError:
        return []
    rows = [[each["stage"], each["digest"]] for each in found.lineage]
    return [table("Lineage of the bundle", ["stage", "digest"], rows, NOTE, words=True)]
