"""Plots: lines, points, bars and shares, each as SVG."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hansa.report.canvas import (
    COLOURS,
    DASHES,
    INK,
    LEGEND,
    WHOLE,
    WIDTH,
    dress,
    figure_of,
    format_axis,
    legend_below,
    logarithmic,
    marker_of,
    svg,
    written,
)

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
    figure, axes = figure_of(title, x, y)
    for k, (name, points) in enumerate(series.items()):
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        axes.plot(
            xs,
            ys,
            label=textwrap.fill(name, 28),
            color=COLOURS[k % len(COLOURS)],
            linestyle=DASHES[k // len(COLOURS) % len(DASHES)],
            marker=marker_of(k),
            markersize=4,
            markevery=max(1, len(xs) // 10),
            linewidth=1.8,
        )
    axes.xaxis.set_major_locator(MaxNLocator(**WHOLE))
    format_axis(axes, percent, bytes_)
    if percent and not whole:
        highest = max(y for points in series.values() for _, y in points)
        axes.set_ylim(0, 1.1 * highest or 1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    if counts:
        axes.yaxis.set_major_locator(MaxNLocator(**WHOLE))
    if log:
        logarithmic(axes, [y for points in series.values() for _, y in points])
    return svg(figure, axes)


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
        figsize=(WIDTH, 0.6 + (2.8 if len(panels) == 1 else 2.1) * len(panels)),
        layout="constrained",
    )
    rows = figure.subplots(len(panels), squeeze=False, sharex=True, sharey=True)[:, 0]
    drawn = [
        value for made in panels.values() for p in made.values() for line in p for _, value in line
    ]
    for number, (axes, (name, series)) in enumerate(zip(rows, panels.items(), strict=True)):
        heading = name if len(panels) > 1 else ""
        dress(axes, heading, x if number == len(panels) - 1 else "", y)
        handles = []
        for k, (label, both) in enumerate(series.items()):
            colour, marker = COLOURS[k % len(COLOURS)], marker_of(k)
            for points, dash in zip(both, ("-", "--"), strict=True):
                xs, ys = [p[0] for p in points], [p[1] for p in points]
                every = max(1, len(xs) // 10)
                style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.5}
                axes.plot(xs, ys, linestyle=dash, markevery=every, **style)
            handles.append(Line2D([], [], color=colour, marker=marker, label=label))
        for text, dash in zip(names if number == 0 else (), ("-", "--"), strict=False):
            handles += axes.plot([], [], color=INK, linestyle=dash, label=text)
        axes.xaxis.set_major_locator(MaxNLocator(**WHOLE))
        if len(panels) == 1:
            legend_below(figure, handles)
        else:
            axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), **LEGEND)
    logarithmic(rows[0], drawn)
    return written(figure, title)


def curves(series: Mapping[str, Band], *, title: str, x: str, y: str) -> str:
    """Return one line per series over points above 0 on a logarithmic axis, shares up, shaded."""
    figure, axes = figure_of(title, x, y)
    for k, (name, points) in enumerate(series.items()):
        xs, means, least, most = zip(*points, strict=True)
        colour = COLOURS[k % len(COLOURS)]
        axes.plot(
            xs,
            means,
            label=textwrap.fill(name, 28),
            color=colour,
            linestyle=DASHES[k % len(DASHES)],
            marker=marker_of(k),
            markersize=4,
        )
        axes.fill_between(xs, least, most, color=colour, alpha=0.15, linewidth=0)
    places = sorted({point[0] for points in series.values() for point in points})
    logarithmic(axes, places, along_x=True)
    axes.set_xticks(places)
    format_axis(axes, percent=True, bytes_=False)
    return svg(figure, axes)


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
    figure, axes = figure_of(title, x, y)
    for k, (name, points) in enumerate(series.items()):
        axes.plot(
            [point[0] for point in points],
            [point[1] for point in points],
            label=textwrap.fill(name, 28),
            linestyle="-" if name in stepped else "",
            drawstyle="steps-post" if name in stepped else "default",
            marker=marker_of(k),
            color=COLOURS[k % len(COLOURS)],
            alpha=0.7,
            markersize=5,
        )
    if shares:
        format_axis(axes, percent=True, bytes_=False)
        axes.set_xlim(-0.03, 1.03)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    return svg(figure, axes)


def dots(values: Mapping[str, Mapping[str, float]], *, title: str, x: str, y: str) -> str:
    """Return one row of dots per client: series -> client -> share between 0 and 1."""
    figure, axes = figure_of(title, x, y)
    clients = sorted({client for row in values.values() for client in row})
    figure.set_figheight(max(2.6, 1.2 + 0.26 * len(clients)))
    for k, (name, row) in enumerate(values.items()):
        axes.plot(
            [row[c] for c in clients if c in row],
            [clients.index(c) + 0.14 * (k - (len(values) - 1) / 2) for c in clients if c in row],
            label=textwrap.fill(name, 28),
            linestyle="",
            marker=marker_of(k),
            color=COLOURS[k % len(COLOURS)],
            alpha=0.85,
        )
    axes.set_yticks(range(len(clients)), clients)
    axes.set_ylim(len(clients) - 0.4, -0.6)
    axes.set_xlim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    return svg(figure, axes)


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
    figure, axes = figure_of(title, x, "")
    figure.set_figheight(1.2 + 0.3 * len(values))
    for k, row in enumerate(values.values()):
        axes.plot(row, [k] * len(row), "o", color=COLOURS[0], alpha=0.35, markersize=5)
        axes.plot([sum(row) / len(row)], [k], "|", color=COLOURS[1], markersize=16, mew=2.5)
    axes.plot([], [], "o", color=COLOURS[0], alpha=0.35, label=one)
    axes.plot([], [], "|", color=COLOURS[1], markersize=10, mew=2.5, label="mean")
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
    if log:
        logarithmic(axes, [value for row in values.values() for value in row], along_x=True)
    else:
        axes.set_xlim(-0.03, 1.03)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    return svg(figure, axes)


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
    figure = Figure(figsize=(WIDTH, 0.3 + high * len(panels)), layout="constrained")
    places = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (name, panel) in zip(places, panels.items(), strict=True):
        dress(axes, name, x, "")
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
                    color=INK,
                )
            base = [low + share for low, share in zip(base, shares, strict=True)]
        axes.plot(panel.xs, panel.line, color=INK, marker=".", linewidth=1.2)
        axes.set_xlim(panel.xs[0] - 0.6, panel.xs[-1] + 0.6)
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.xaxis.set_major_locator(MaxNLocator(**WHOLE))
    handles = [Line2D([], [], color=INK, marker=".", label=line)]
    figure.legend(handles=handles, loc="outside lower left", **LEGEND)
    return written(figure, title)


def bars(values: Mapping[str, float], *, title: str, x: str) -> str:
    """Return one bar per name, on a logarithmic axis that ends at 100 %."""
    figure, axes = figure_of(title, x, "")
    figure.set_figheight(1.2 + 0.24 * len(values))
    axes.set_axisbelow(True)
    axes.barh(range(len(values)), list(values.values()), color=COLOURS[0])
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(0.5 * min(values.values()), 1.1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    return svg(figure, axes)


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
    figure, axes = figure_of(title, x, y)
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
    return svg(figure, axes)
