"""The pieces that a page is put together from, as its template takes them."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

Part = dict[str, Any]


def plot(title: str, caption: str, svg: str, folded: bool = False) -> Part:
    """Return a plot, which stands below its title; a folded one is opened by a click."""
    # The SVG is Hansa's own output; the texts in it were escaped when it was written.
    svg = Markup(svg)  # noqa: S704 # nosec B704 # as the line above says
    return {"title": title, "caption": caption, "svg": svg, "folded": folded}


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    note: str = "",
    folded: bool = False,
    words: bool = False,
) -> Part:
    """Return a table whose first column names its rows.

    A folded one is opened by a click; the cells of one of words are sentences, and their lines
    may break.
    """
    shown = {"title": title, "columns": columns, "rows": rows, "note": note, "folded": folded}
    return {**shown, "words": words}
