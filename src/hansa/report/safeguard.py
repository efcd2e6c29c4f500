"""The page about a safeguard under attack: what it does not show, then the worst case."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hansa.report.page import write_page
from hansa.report.parts import Part, plot, table
from hansa.report.plots import Band, curves, scatter
from hansa.safeguard.scorecard_text import CLAIM, tables, threat


def report(page: Path, card: Mapping[str, Any], configuration: str) -> Path:
    """Write one self-contained HTML page and return its path.

    Args:
        page: the file to write.
        card: the scorecard.
        configuration: what was asked for, as TOML.

    Raises:
        InputError: a page that cannot be written.
    """
    return write_page(
        page,
        title=f"{card['name']}, red team",
        lead=f"{CLAIM} {threat(card)}",
        tables=[table(t.title, t.columns, t.rows, t.note, words=t.words) for t in tables(card)],
        scored=[],
        plots=_plots(card),
        configurations=[("configuration", configuration)],
    )


def _plots(card: Mapping[str, Any]) -> list[Part]:
    parts = []
    caption = "The attack, the rate and the probe that recover most within so many steps."
    for key, what in (("worst", "worst case"), ("worst_of_use", "models of use")):
        series = {role: _band(body[key]) for role, body in card["roles"].items()}
        parts += _curves(f"Recovered, {what}", series, caption)
    for name, about in card["attacks"].items():
        series = {
            role: _band({step: point["worst"] for step, point in entry["points"].items()})
            for role, body in card["roles"].items()
            if (entry := body["attacks"].get(name)) is not None
        }
        caption = f"{name} at the rate that recovers most; {about['status']}: {about['why']}."
        parts += _curves(f"Recovered by {name}", series, caption)
    return [*parts, *_utility(card)]


def _curves(title: str, series: Mapping[str, Band], caption: str) -> list[Part]:
    drawn = {role: band for role, band in series.items() if band}
    if not drawn:
        return []
    svg = curves(drawn, title=title, x="attack steps", y="restricted answered right")
    shade = " Lines are means over seeds, shades reach from the least to the most of them."
    return [plot(title, caption + shade, svg, folded="worst" not in title and "use" not in title)]


def _utility(card: Mapping[str, Any]) -> list[Part]:
    """Return what attacks bring back against what they break."""
    points = {
        role: [
            (point["retained"], point["recovered"])
            for entry in body["attacks"].values()
            for at in entry["points"].values()
            for point in (at["worst"], at["of_use"])
            if point is not None
        ]
        for role, body in card["roles"].items()
    }
    points = {role: found for role, found in points.items() if found}
    if not points:
        return []
    title = "What is recovered, and what is left of use"
    svg = scatter(points, title=title, x="retained answered right", y="restricted answered right")
    caption = "Each attack at each probe, at the rate that recovers most, and at the one that does "
    caption += "so among models of use. An attacker wants to be at the upper right."
    return [plot(title, caption, svg)]


def _band(points: Mapping[str, Mapping[str, Any]]) -> Band:
    """Return (step, mean, least, most), without what takes no step."""
    found = []
    for step, point in points.items():
        if int(step):
            mean = point["recovered"]
            found.append((int(step), mean, point.get("low", mean), point.get("high", mean)))
    return found
