"""Plots as SVG that stands inside a page: its text and axes take the page's colour and font.

A plot's title stands above it in the page, where it can break, and not in the SVG. Its legend is
below it and its size follows from the size of its text, so that a phone shows it as a whole.
"""

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Okabe and Ito's palette, told apart by people with any colour vision. Lines differ in marker as
# well, and in dash where colours come again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
_INK = "#010203"  # stands for the page's own text colour until the SVG is written
_WIDTH = 5.4
"""Inches of a plot: with text of 10 points a phone still shows both."""
_LEAST, _MOST = 0.88, 1.6
"""CSS pixels per point of a plot, between which it follows the width of the page."""
_WHOLE: dict[str, Any] = {"integer": True, "min_n_ticks": 1}
"""Of the ticks of an axis of rounds: with more than one they would be fractions where it is short."""

MAX_NUMBERED = 16
"""Rows of a heat map up to which its cells hold numbers."""

Points = Sequence[tuple[float, float]]
Series = Mapping[str, Points]
Band = Sequence[tuple[float, float, float, float]]
"""Points (x, y) with the least and the most that y was."""


def lines(
    series: Series,
    *,
    title: str,
    x: str,
    y: str,
    percent: bool = False,
    whole: bool = True,
    bytes_: bool = False,
    log: bool = False,
    counts: bool = False,
) -> str:
    """Return one line per series over points (x, y), with a legend beside the plot.

    ``percent`` shows shares, on an axis from 0 to 100 % where ``whole``, else as far as they go.
    ``log`` makes the axis logarithmic, ``counts`` marks whole numbers only.
    """
    figure, axes = _figure(title, x, y)
    for k, (name, points) in enumerate(series.items()):
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        axes.plot(
            xs,
            ys,
            label=textwrap.fill(name, 28),
            color=COLOURS[k % len(COLOURS)],
            linestyle=DASHES[k // len(COLOURS) % len(DASHES)],
            marker=_marker(k),
            markersize=4,
            markevery=max(1, len(xs) // 10),
            linewidth=1.8,
        )
    axes.xaxis.set_major_locator(MaxNLocator(**_WHOLE))
    _format(axes, percent, bytes_)
    if percent and not whole:
        highest = max(y for points in series.values() for _, y in points)
        axes.set_ylim(0, 1.1 * highest or 1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    if counts:
        axes.yaxis.set_major_locator(MaxNLocator(**_WHOLE))
    if log:
        _logarithmic(axes, [y for points in series.values() for _, y in points])
    return _svg(figure, axes)


def moments(
    panels: Mapping[str, Mapping[str, tuple[Points, Points]]],
    *,
    title: str,
    x: str,
    y: str,
    names: tuple[str, str],
) -> str:
    """Return two lines per series, solid and dashed, on logarithmic axes of one range.

    Args:
        panels: title of a panel -> series -> points (x, y) of its solid and of its dashed line.
        title: the name of the plot.
        x: what runs along a panel.
        y: what runs up.
        names: what the solid and the dashed lines are.
    """
    figure = Figure(
        figsize=(_WIDTH, 0.6 + (2.8 if len(panels) == 1 else 2.1) * len(panels)),
        layout="constrained",
    )
    rows = figure.subplots(len(panels), squeeze=False, sharex=True, sharey=True)[:, 0]
    drawn = [
        value for made in panels.values() for p in made.values() for line in p for _, value in line
    ]
    for number, (axes, (name, series)) in enumerate(zip(rows, panels.items(), strict=True)):
        heading = name if len(panels) > 1 else ""
        _dress(axes, heading, x if number == len(panels) - 1 else "", y)
        handles = []
        for k, (label, both) in enumerate(series.items()):
            colour, marker = COLOURS[k % len(COLOURS)], _marker(k)
            for points, dash in zip(both, ("-", "--"), strict=True):
                xs, ys = [p[0] for p in points], [p[1] for p in points]
                every = max(1, len(xs) // 10)
                style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.5}
                axes.plot(xs, ys, linestyle=dash, markevery=every, **style)
            handles.append(Line2D([], [], color=colour, marker=marker, label=label))
        for text, dash in zip(names if number == 0 else (), ("-", "--"), strict=False):
            handles += axes.plot([], [], color=_INK, linestyle=dash, label=text)
        axes.xaxis.set_major_locator(MaxNLocator(**_WHOLE))
        if len(panels) == 1:
            _legend_below(figure, handles)
        else:
            axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), **_LEGEND)
    _logarithmic(rows[0], drawn)
    return _written(figure, title)


def curves(series: Mapping[str, Band], *, title: str, x: str, y: str) -> str:
    """Return one line per series over points above 0 on a logarithmic axis, shares up, shaded."""
    figure, axes = _figure(title, x, y)
    for k, (name, points) in enumerate(series.items()):
        xs, means, least, most = zip(*points, strict=True)
        colour = COLOURS[k % len(COLOURS)]
        axes.plot(
            xs,
            means,
            label=textwrap.fill(name, 28),
            color=colour,
            linestyle=DASHES[k % len(DASHES)],
            marker=_marker(k),
            markersize=4,
        )
        axes.fill_between(xs, least, most, color=colour, alpha=0.15, linewidth=0)
    places = sorted({point[0] for points in series.values() for point in points})
    _logarithmic(axes, places, along_x=True)
    axes.set_xticks(places)
    _format(axes, percent=True, bytes_=False)
    return _svg(figure, axes)


def scatter(
    series: Series,
    *,
    title: str,
    x: str,
    y: str,
    shares: bool = True,
    stepped: Sequence[str] = (),
) -> str:
    """Return one kind of points per series.

    Args:
        series: name -> points (x, y); y is a share between 0 and 1.
        title: the name of the plot.
        x: what runs along it.
        y: what runs up.
        shares: whether x is a share as well and both axes go from 0 to 100 %; else they go as far
            as the points.
        stepped: series whose points a line joins, that goes up where the next one stands.
    """
    figure, axes = _figure(title, x, y)
    for k, (name, points) in enumerate(series.items()):
        axes.plot(
            [point[0] for point in points],
            [point[1] for point in points],
            label=textwrap.fill(name, 28),
            linestyle="-" if name in stepped else "",
            drawstyle="steps-post" if name in stepped else "default",
            marker=_marker(k),
            color=COLOURS[k % len(COLOURS)],
            alpha=0.7,
            markersize=5,
        )
    if shares:
        _format(axes, percent=True, bytes_=False)
        axes.set_xlim(-0.03, 1.03)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    return _svg(figure, axes)


def dots(values: Mapping[str, Mapping[str, float]], *, title: str, x: str, y: str) -> str:
    """Return one row of dots per client: series -> client -> share between 0 and 1."""
    figure, axes = _figure(title, x, y)
    clients = sorted({client for row in values.values() for client in row})
    figure.set_figheight(max(2.6, 1.2 + 0.26 * len(clients)))
    for k, (name, row) in enumerate(values.items()):
        axes.plot(
            [row[c] for c in clients if c in row],
            [clients.index(c) + 0.14 * (k - (len(values) - 1) / 2) for c in clients if c in row],
            label=textwrap.fill(name, 28),
            linestyle="",
            marker=_marker(k),
            color=COLOURS[k % len(COLOURS)],
            alpha=0.85,
        )
    axes.set_yticks(range(len(clients)), clients)
    axes.set_ylim(len(clients) - 0.4, -0.6)
    axes.set_xlim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    return _svg(figure, axes)


def strips(
    values: Mapping[str, Sequence[float]],
    *,
    title: str,
    x: str,
    one: str = "a client in one seed",
    log: bool = False,
) -> str:
    """Return one row of points per series, with its mean.

    Args:
        values: series -> shares between 0 and 1, or with ``log`` any numbers above 0.
        title: the name of the plot.
        x: what runs along it.
        one: what a point stands for.
        log: whether the axis is logarithmic.
    """
    figure, axes = _figure(title, x, "")
    figure.set_figheight(1.2 + 0.3 * len(values))
    for k, row in enumerate(values.values()):
        axes.plot(row, [k] * len(row), "o", color=COLOURS[0], alpha=0.35, markersize=5)
        axes.plot([sum(row) / len(row)], [k], "|", color=COLOURS[1], markersize=16, mew=2.5)
    axes.plot([], [], "o", color=COLOURS[0], alpha=0.35, label=one)
    axes.plot([], [], "|", color=COLOURS[1], markersize=10, mew=2.5, label="mean")
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
    if log:
        _logarithmic(axes, [value for row in values.values() for value in row], along_x=True)
    else:
        axes.set_xlim(-0.03, 1.03)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    return _svg(figure, axes)


def heatmap(
    values: Mapping[tuple[str, str], float], *, title: str, x: str, y: str, up_to: float = 1.0
) -> str:
    """Return a matrix of (row, column) -> share between 0 and ``up_to``, with numbers in it."""
    rows = sorted({row for row, _ in values})
    columns = sorted({column for _, column in values})
    return _mesh(
        values,
        _Look(
            rows,
            columns,
            bounds=(0.0, up_to),
            text=(lambda v: f"{100 * v:.0f}") if len(rows) <= MAX_NUMBERED else None,
            scale=lambda value: f"{value:.0%}",
        ),
        (title, x, y),
    )


def matrix(
    values: Mapping[tuple[str, str], float],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    x: str,
    y: str,
) -> str:
    """Return a matrix of (row, column) -> any number, two decimals in every cell; dark is high.

    Args:
        values: the numbers.
        rows: from top to bottom.
        columns: from left to right.
        title: the name of the plot.
        x: what the columns are.
        y: what the rows are.
    """
    shown = list(values.values())
    look = _Look(
        rows,
        columns,
        bounds=(min(shown), max(shown)),
        text=lambda value: f"{value:.2f}",
        scale=lambda value: f"{value:.3g}",
        colours="viridis_r",
        cell=0.44,
        size=8.5,
        least=2.4,
    )
    return _mesh(values, look, (title, x, y))


@dataclass(frozen=True)
class _Look:
    """How a matrix is drawn: order, range of colours, text in cells (or none) and at the scale.

    ``cell`` is the side of a cell and ``least`` the least height of all, in inches; ``size`` is
    that of the text in cells, in points.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    bounds: tuple[float, float]
    text: Callable[[float], str] | None
    scale: Callable[[float], str]
    colours: str = "viridis"
    cell: float = 0.3
    size: float = 10
    least: float = 3.4


def _mesh(values: Mapping[tuple[str, str], float], look: _Look, names: tuple[str, str, str]) -> str:
    """Return a matrix with a scale beside it; ``names`` are its title, x and y."""
    rows, columns = look.rows, look.columns
    low, high = look.bounds
    figure, axes = _figure(*names)
    height = max(look.least, 1.6 + look.cell * len(rows))
    figure.set_size_inches(max(3.4, 1.6 + look.cell * len(columns)) + 1.6, height)
    grid = [[values.get((row, column), float("nan")) for column in columns] for row in rows]
    mesh = axes.pcolormesh(grid, cmap=look.colours, vmin=low, vmax=high)
    axes.set_xticks([k + 0.5 for k in range(len(columns))], columns, rotation=90)
    axes.set_yticks([k + 0.5 for k in range(len(rows))], rows)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.grid(False)
    for k, line in enumerate(grid if look.text else ()):
        for i, value in enumerate(line):
            if value == value and look.text:
                red, green, blue, _ = mesh.to_rgba(np.array(value))
                light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.45
                axes.text(
                    i + 0.5,
                    k + 0.5,
                    look.text(value),
                    ha="center",
                    va="center",
                    color="#0a0a0a" if light else "white",  # on the cell, not on the page
                    fontsize=look.size,
                )
    bar = figure.colorbar(mesh, format=FuncFormatter(lambda value, _: look.scale(value)))
    if bar.solids is not None:
        bar.solids.set_rasterized(False)  # a raster would be an image file inside the page
    bar.ax.tick_params(colors=_INK)
    bar.outline.set_edgecolor(_INK)
    return _svg(figure, axes)


@dataclass(frozen=True)
class Stack:
    """Shares that make up a whole, over points.

    Attributes:
        xs: the points.
        shares: name -> share at every point, between 0 and 1.
        line: a share at every point, drawn over the bars.
    """

    xs: Sequence[float]
    shares: Mapping[str, Sequence[float]]
    line: Sequence[float]


def stacks(panels: Mapping[str, Stack], *, title: str, x: str, line: str) -> str:
    """Return stacked bars in panels below one another, each share named at its end.

    Args:
        panels: title of a panel -> what it shows.
        title: the name of the plot.
        x: what runs along a panel.
        line: what the lines over the bars are.
    """
    most = max(len(panel.shares) for panel in panels.values())
    high = 0.5 + max(1.5, 0.18 * most)
    figure = Figure(figsize=(_WIDTH, 0.3 + high * len(panels)), layout="constrained")
    places = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (name, panel) in zip(places, panels.items(), strict=True):
        _dress(axes, name, x, "")
        axes.grid(False)
        base = [0.0] * len(panel.xs)
        for k, (label, shares) in enumerate(panel.shares.items()):
            colour = COLOURS[k % len(COLOURS)]
            axes.bar(
                panel.xs,
                shares,
                bottom=base,
                width=0.92,
                color=colour,
                alpha=0.75 if k < len(COLOURS) else 0.4,
            )
            if shares[-1] > 0:
                axes.text(
                    panel.xs[-1] + 0.7,
                    base[-1] + shares[-1] / 2,
                    f"{textwrap.shorten(label, 24, placeholder='...')} {shares[-1]:.0%}",
                    va="center",
                    fontsize=8.5,
                    color=_INK,
                )
            base = [low + share for low, share in zip(base, shares, strict=True)]
        axes.plot(panel.xs, panel.line, color=_INK, marker=".", linewidth=1.2)
        axes.set_xlim(panel.xs[0] - 0.6, panel.xs[-1] + 0.6)
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.xaxis.set_major_locator(MaxNLocator(**_WHOLE))
    handles = [Line2D([], [], color=_INK, marker=".", label=line)]
    figure.legend(handles=handles, loc="outside lower left", **_LEGEND)
    return _written(figure, title)


def bars(values: Mapping[str, float], *, title: str, x: str) -> str:
    """Return one bar per name, on a logarithmic axis that ends at 100 %."""
    figure, axes = _figure(title, x, "")
    figure.set_figheight(1.2 + 0.24 * len(values))
    axes.set_axisbelow(True)
    axes.barh(range(len(values)), list(values.values()), color=COLOURS[0])
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(0.5 * min(values.values()), 1.1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    return _svg(figure, axes)


def histogram(
    values: Mapping[str, Sequence[float]],
    *,
    title: str,
    x: str,
    y: str,
    log: bool = True,
    span: tuple[float, float] | None = None,
    marks: Mapping[str, float] | None = None,
) -> str:
    """Return counts over equal bins, one outline per series.

    Args:
        values: series -> numbers.
        title: the name of the plot.
        x: what runs along it.
        y: what runs up.
        log: whether the counts are on a logarithmic axis.
        span: the range drawn; what lies outside is counted at its ends.
        marks: name -> place of an upright line.
    """
    figure, axes = _figure(title, x, y)
    drawn = [number for row in values.values() for number in row]
    span = span or ((min(drawn), max(drawn)) if drawn else (0.0, 1.0))
    for k, (name, row) in enumerate(values.items()):
        axes.hist(
            np.clip(row, *span),
            bins=60,
            range=span,
            histtype="step",
            label=name,
            linewidth=1.8,
            color=COLOURS[k % len(COLOURS)],
            linestyle=DASHES[k % len(DASHES)],
        )
    for k, (name, place) in enumerate((marks or {}).items(), 2):
        axes.axvline(place, label=name, color=COLOURS[k % len(COLOURS)], linestyle=DASHES[2])
    if log:
        axes.set_yscale("log", nonpositive="clip")
    return _svg(figure, axes)


def size(num: float) -> str:
    """Return a number of bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if num < 1000:
            return f"{num:.0f} {unit}" if unit == "B" else f"{num:.2f} {unit}"
        num /= 1000
    return f"{num:.2f} GB"


_LEGEND: dict[str, Any] = {"frameon": False, "labelcolor": _INK, "fontsize": 9}


def _figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, 3.0), layout="constrained", label=title)
    axes = figure.add_subplot()
    _dress(axes, "", x, y)
    return figure, axes


def _marker(number: int) -> str:
    """Return a series' marker; where colours come again, they come with other markers."""
    return MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.tick_params(which="both", colors=_INK)
    axes.grid(color=_INK, alpha=0.15)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(_INK)


def _format(axes: Axes, percent: bool, bytes_: bool) -> None:
    if percent:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    if bytes_:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))


def _logarithmic(axes: Axes, values: Sequence[float], along_x: bool = False) -> None:
    """Make an axis logarithmic, with plain numbers at round values."""
    axes.set_xscale("log") if along_x else axes.set_yscale("log")
    axis = axes.xaxis if along_x else axes.yaxis
    ratio = max(values) / min(values) if values else 1.0
    subs = (1, 2, 5) if ratio > 20 else (1, 1.5, 2, 3, 4, 5, 7)
    axis.set_major_locator(LogLocator(subs=subs) if ratio > 3 else MaxNLocator(6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _svg(figure: Figure, axes: Axes) -> str:
    if handles := axes.get_legend_handles_labels()[0]:
        _legend_below(figure, handles)
    return _written(figure, str(figure.get_label()))


def _legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """Put a legend under a figure, which grows by as much."""
    labels = [str(handle.get_label()) for handle in handles]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = 1 if longest > 30 else 2 if longest > 16 else 3
    rows = -(-sum(label.count("\n") + 1 for label in labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.18 * rows)
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, **_LEGEND)


def _written(figure: Figure, title: str) -> str:
    target = io.StringIO()
    # The salt makes ids the same in every run and different between the plots of a page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        about = {"Date": None, "Title": title}
        figure.savefig(target, format="svg", transparent=True, bbox_inches="tight", metadata=about)
    text = target.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub('<g id="[^"]*"', "<g", text)  # nothing refers to them, and all plots have them
    # Text of about one size in all plots: one that is wider than the page can be scrolled.
    width = float(text.partition('viewBox="0 0 ')[2].partition(" ")[0])
    style = f"max-width:{_MOST * width:.0f}px;min-width:{_LEAST * width:.0f}px"
    return text.replace("<svg ", f'<svg style="{style}" ', 1)
