"""Matrices of numbers as plots."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import FuncFormatter

from hansa.report.canvas import INK, figure_of, svg

MAX_NUMBERED = 16
"""Rows of a heat map up to which its cells hold numbers."""


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
    figure, axes = figure_of(*names)
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
    bar.ax.tick_params(colors=INK)
    bar.outline.set_edgecolor(INK)
    return svg(figure, axes)
