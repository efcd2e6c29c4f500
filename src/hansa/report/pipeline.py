"""Placeholder until the page is merged."""

from pathlib import Path


def report(folder: Path) -> Path:
    return folder / "report.html"
