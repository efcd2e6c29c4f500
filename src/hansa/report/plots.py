"""Plots as SVG that stands inside a page: its text and axes take the page's colour and font."""

import io
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("svg")

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Okabe and Ito's palette, told apart by people with any colour vision; lines differ in dash and
# marker as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
_INK = "#010203"  # stands for the page's own text colour until the SVG is written

MAX_NUMBERED = 16
"""Rows of a heat map up to which its cells hold numbers."""

Series = Mapping[str, Sequence[tuple[float, float]]]


def lines(
    series: Series,
    *,
    title: str,
    x: str,
    y: str,
    percent: bool = False,
    whole: bool = True,
    bytes_: bool = False,
) -> str:
    """Return one line per series over points (x, y), with a legend beside the plot.

    ``percent`` shows shares, on an axis from 0 to 100 % where ``whole``, else as far as they go.
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
            marker=MARKERS[(k + k // len(COLOURS)) % len(MARKERS)],
            markersize=4,
            markevery=max(1, len(xs) // 10),
            linewidth=1.8,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _format(axes, percent, bytes_)
    if percent and not whole:
        axes.set_ylim(0, 1.1 * max(y for points in series.values() for _, y in points))
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
            marker=MARKERS[k % len(MARKERS)],
            color=COLOURS[k % len(COLOURS)],
            alpha=0.85,
        )
    axes.set_yticks(range(len(clients)), clients)
    axes.invert_yaxis()
    axes.set_xlim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    return _svg(figure, axes)


def strips(values: Mapping[str, Sequence[float]], *, title: str, x: str) -> str:
    """Return one row of points per series, with its mean: series -> shares between 0 and 1."""
    figure, axes = _figure(title, x, "")
    figure.set_figheight(1.2 + 0.3 * len(values))
    for k, row in enumerate(values.values()):
        axes.plot(row, [k] * len(row), "o", color=COLOURS[0], alpha=0.35, markersize=5)
        axes.plot([sum(row) / len(row)], [k], "|", color=COLOURS[1], markersize=16, mew=2.5)
    axes.plot([], [], "o", color=COLOURS[0], alpha=0.35, label="a client in one seed")
    axes.plot([], [], "|", color=COLOURS[1], markersize=10, mew=2.5, label="mean")
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    return _svg(figure, axes)


def heatmap(
    values: Mapping[tuple[str, str], float], *, title: str, x: str, y: str, up_to: float = 1.0
) -> str:
    """Return a matrix of (row, column) -> share between 0 and ``up_to``, with numbers in it."""
    rows = sorted({row for row, _ in values})
    columns = sorted({column for _, column in values})
    figure, axes = _figure(title, x, y)
    side = max(3.4, 1.6 + 0.3 * len(rows))
    figure.set_size_inches(side + 1.6, side)
    grid = [[values.get((row, column), float("nan")) for column in columns] for row in rows]
    mesh = axes.pcolormesh(grid, cmap="viridis", vmin=0.0, vmax=up_to)
    axes.set_xticks([k + 0.5 for k in range(len(columns))], columns, rotation=90)
    axes.set_yticks([k + 0.5 for k in range(len(rows))], rows)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.grid(False)
    if len(rows) <= MAX_NUMBERED:
        for k, line in enumerate(grid):
            for i, value in enumerate(line):
                if value == value:
                    colour = "black" if value > up_to / 2 else "white"
                    text = f"{100 * value:.0f}"
                    axes.text(i + 0.5, k + 0.5, text, ha="center", va="center", color=colour)
    bar = figure.colorbar(mesh, format=FuncFormatter(lambda value, _: f"{value:.0%}"))
    if bar.solids is not None:
        bar.solids.set_rasterized(False)  # a raster would be an image file inside the page
    bar.ax.tick_params(colors=_INK)
    return _svg(figure, axes)


def bars(values: Mapping[str, float], *, title: str, x: str) -> str:
    """Return one bar per name, on a logarithmic axis that ends at 100 %."""
    figure, axes = _figure(title, x, "")
    figure.set_figheight(1.2 + 0.24 * len(values))
    axes.set_axisbelow(True)
    axes.barh(range(len(values)), list(values.values()), color=COLOURS[0])
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.5 * min(values.values()), 1.1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    return _svg(figure, axes)


def histogram(values: Mapping[str, Sequence[float]], *, title: str, x: str, y: str) -> str:
    """Return counts over equal bins, one outline per series, on a logarithmic axis."""
    figure, axes = _figure(title, x, y)
    drawn = [number for row in values.values() for number in row]
    span = (min(drawn), max(drawn)) if drawn else (0.0, 1.0)
    for k, (name, row) in enumerate(values.items()):
        axes.hist(
            row,
            bins=60,
            range=span,
            histtype="step",
            label=name,
            linewidth=1.8,
            color=COLOURS[k % len(COLOURS)],
            linestyle=DASHES[k % len(DASHES)],
        )
    axes.set_yscale("log", nonpositive="clip")
    return _svg(figure, axes)


def size(num: float) -> str:
    """Return a number of bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if num < 1000:
            return f"{num:.0f} {unit}" if unit == "B" else f"{num:.2f} {unit}"
        num /= 1000
    return f"{num:.2f} GB"


def _figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.tick_params(colors=_INK)
    axes.grid(color=_INK, alpha=0.15)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(_INK)
    return figure, axes


def _format(axes: Axes, percent: bool, bytes_: bool) -> None:
    if percent:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    if bytes_:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))


def _svg(figure: Figure, axes: Axes) -> str:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
            labelcolor=_INK,
            fontsize=9,
        )
    target = io.StringIO()
    title = axes.get_title(loc="left")
    # The salt makes ids the same in every run and different between the plots of a page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(
            target, format="svg", transparent=True, metadata={"Date": None, "Title": title}
        )
    text = target.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
