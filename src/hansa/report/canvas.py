"""What all plots are drawn on: SVG that stands inside a page.

Text and axes take the page's colour and font. A plot's title stands above it in the page, where it
can break, and not in the SVG. Its legend is below it and its size follows from the size of its
text, so that a phone shows it as a whole.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from hansa.report.sizes import size

# Okabe and Ito's palette, told apart by people with any colour vision. Lines differ in marker as
# well, and in dash where colours come again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK = "#010203"  # stands for the page's own text colour until the SVG is written
WIDTH = 5.4
"""Inches of a plot: with text of 10 points a phone still shows both."""
_LEAST, _MOST = 0.88, 1.6
"""CSS pixels per point of a plot, between which it follows the width of the page."""
WHOLE: dict[str, Any] = {"integer": True, "min_n_ticks": 1}
"""Of the ticks of an axis of rounds: were two the least, a short one would have fractions."""
LEGEND: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": 9}


def figure_of(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """Return a figure of the usual size and its axes, named."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained", label=title)
    axes = figure.add_subplot()
    dress(axes, "", x, y)
    return figure, axes


def marker_of(number: int) -> str:
    """Return a series' marker; where colours come again, they come with other markers."""
    return MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]


def dress(axes: Axes, title: str, x: str, y: str) -> None:
    """Give axes their names, colours and grid."""
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(which="both", colors=INK)
    axes.grid(color=INK, alpha=0.15)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(INK)


def format_axis(axes: Axes, percent: bool, bytes_: bool) -> None:
    """Show what goes up in percent, from 0 to 100, or in bytes."""
    if percent:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    if bytes_:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))


def logarithmic(axes: Axes, values: Sequence[float], along_x: bool = False) -> None:
    """Make an axis logarithmic, with plain numbers at round values."""
    axes.set_xscale("log") if along_x else axes.set_yscale("log")
    axis = axes.xaxis if along_x else axes.yaxis
    ratio = max(values) / min(values) if values else 1.0
    subs = (1, 2, 5) if ratio > 20 else (1, 1.5, 2, 3, 4, 5, 7)
    axis.set_major_locator(LogLocator(subs=subs) if ratio > 3 else MaxNLocator(6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def svg(figure: Figure, axes: Axes) -> str:
    """Return a figure as SVG, with a legend of what has a label."""
    if handles := axes.get_legend_handles_labels()[0]:
        legend_below(figure, handles)
    return written(figure, str(figure.get_label()))


def legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """Put a legend under a figure, which grows by as much."""
    labels = [str(handle.get_label()) for handle in handles]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = 1 if longest > 30 else 2 if longest > 16 else 3
    rows = -(-sum(label.count("\n") + 1 for label in labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.18 * rows)
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, **LEGEND)


def written(figure: Figure, title: str) -> str:
    """Return a figure as SVG."""
    target = io.StringIO()
    # The salt makes ids the same in every run and different between the plots of a page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        about = {"Date": None, "Title": title}
        figure.savefig(target, format="svg", transparent=True, bbox_inches="tight", metadata=about)
    text = target.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub('<g id="[^"]*"', "<g", text)  # nothing refers to them, and all plots have them
    # Text of about one size in all plots: one that is wider than the page can be scrolled.
    width = float(text.partition('viewBox="0 0 ')[2].partition(" ")[0])
    style = f"max-width:{_MOST * width:.0f}px;min-width:{_LEAST * width:.0f}px"
    return text.replace("<svg ", f'<svg style="{style}" ', 1)
