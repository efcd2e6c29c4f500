"""Placeholder until the page is merged."""

from pathlib import Path


def report(folder: Path) -> Path:
    """Return where the page will be."""
    return folder / "report.html"
