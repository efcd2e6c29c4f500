"""The tree of a run as SVG: a box for every node, and what its edge carries above it.

Written by hand, since a box is as large as its text. Colours and font are the page's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from hansa.federation.tree import ROOT, Tree

WIDTH, LINE, PAD = 172, 17, 9
"""Width of a box, height of a line of text and room around the lines, in pixels."""
GAP, DROP = 18, 46
"""Pixels between columns, and between a node and what stands below it."""
ABOVE = 24
"""Pixels above a box in a column of leaves, where the edge's text stands."""
MAX_COLUMNS = 3
MAX_STACKED = 8
"""Columns that a tree takes if it can, and most leaves that stand below one another for that."""
_LETTERS = 21
_STROKE = 'stroke="currentColor" stroke-opacity=".6"'


@dataclass(frozen=True)
class Box:
    """What is said of one node.

    Attributes:
        lines: the first is its name.
        edge: what the edge above it carries: down, and up.
        is_private: whether it gets a dashed frame.
    """

    lines: tuple[str, ...]
    edge: tuple[str, str] = ("", "")
    is_private: bool = False

    @property
    def height(self) -> int:
        """Pixels from top to bottom."""
        return 2 * PAD + LINE * len(self.lines)


def draw(tree: Tree, boxes: Mapping[str, Box], title: str) -> str:
    """Return the tree with its root at the top.

    Inner nodes stand side by side. Leaves do so too while there is room, and else stand below one
    another under their parent.

    Args:
        tree: the nodes.
        boxes: node path -> what is said of it; of every node.
        title: the name of the drawing.
    """
    sizes = range(1, MAX_STACKED + 1)
    stacked = next((m for m in sizes if _columns(tree, ROOT, m) <= MAX_COLUMNS), MAX_STACKED)
    drawing = _Drawing(tree, boxes, stacked)
    width = _columns(tree, ROOT, stacked) * (WIDTH + GAP) + GAP
    height = drawing.place(ROOT, GAP / 2, 4) + 6
    edges = f'<path d="{"".join(drawing.lines)}" fill="none" {_STROKE}/>'
    return (
        f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(title)}" '
        f'style="width:100%;max-width:{width}px;min-width:{0.85 * width:.0f}px" '
        f'font-size="13" fill="currentColor">{edges}{"".join(drawing.marks)}</svg>'
    )


class _Drawing:
    """Places nodes, and keeps the boxes and the lines that were made."""

    def __init__(self, tree: Tree, boxes: Mapping[str, Box], stacked: int) -> None:
        self.tree, self.boxes, self.stacked = tree, boxes, stacked
        self.marks: list[str] = []
        self.lines: list[str] = []

    def place(self, path: str, left: float, top: float) -> float:
        """Draw a node and all below it, and return where the lowest box ends."""
        box, columns = self.boxes[path], _columns(self.tree, path, self.stacked)
        centre = left + columns * (WIDTH + GAP) / 2
        self._box(box, centre - WIDTH / 2, top)
        children = self.tree.children(path)
        if not children:
            return top + box.height
        start = top + box.height
        bus, below = start + DROP / 2 - 4, start + DROP
        self._line((centre, start), (centre, bus))
        bottom, place, entered = start, left, [centre]
        for child in children:
            if not self.tree.is_leaf(child):
                width = _columns(self.tree, child, self.stacked) * (WIDTH + GAP)
                entered.append(place + width / 2)
                self._enter(self.boxes[child], entered[-1], bus, below)
                bottom, place = max(bottom, self.place(child, place, below)), place + width
        leaves = [child for child in children if self.tree.is_leaf(child)]
        for first in range(0, len(leaves), self.stacked):
            column = leaves[first : first + self.stacked]
            if self.stacked == 1:
                entered.append(place + (WIDTH + GAP) / 2)
                self._enter(self.boxes[column[0]], entered[-1], bus, below)
                bottom = max(bottom, self.place(column[0], place, below))
            else:
                entered.append(place + 4)
                bottom = max(bottom, self._hang(column, place, bus))
            place += WIDTH + GAP
        # Once and not for every child: lines that lie on each other would be darker than others.
        self._line((min(entered), bus), (max(entered), bus))
        return bottom

    def _enter(self, box: Box, middle: float, bus: float, below: float) -> None:
        """Draw an edge that comes down on the middle of a box."""
        self._line((middle, bus), (middle, below))
        down, up = box.edge
        self._text(down, middle - 7, below - 7, "small", "end")
        self._text(up, middle + 7, below - 7, "small")

    def _hang(self, column: list[str], left: float, bus: float) -> float:
        """Draw leaves below one another, each with an edge from the left."""
        spine, top, middle = left + 4, bus, bus
        for path in column:
            box = self.boxes[path]
            top += ABOVE
            middle = top + box.height / 2
            self._line((spine, middle), (left + GAP, middle))
            self._box(box, left + GAP, top)
            self._text("  ".join(filter(None, box.edge)), left + GAP + 2, top - 6, "small")
            top += box.height
        self._line((spine, bus), (spine, middle))
        return top

    def _box(self, box: Box, left: float, top: float) -> None:
        dashes = ' stroke-dasharray="5 3"' if box.is_private else ""
        about = escape(", ".join(box.lines))
        self.marks.append(
            f"<g><title>{about}</title>"
            f'<rect x="{left:g}" y="{top:g}" width="{WIDTH}" height="{box.height}" rx="6" '
            f'fill-opacity=".06" {_STROKE}{dashes}/>'
        )
        for k, line in enumerate(box.lines):
            kind = "" if k else "bold"
            self._text(_cut(line), left + PAD, top + PAD + LINE * (k + 0.72), kind)
        self.marks.append("</g>")

    def _line(self, *points: tuple[float, float]) -> None:
        self.lines.append("M" + "L".join(f"{x:g} {y:g}" for x, y in points))

    def _text(self, text: str, x: float, y: float, kind: str = "", anchor: str = "start") -> None:
        if text:
            style = {"bold": ' font-weight="bold"', "small": ' font-size="11.5" opacity=".85"'}
            place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
            self.marks.append(f"<text {place}{style.get(kind, '')}>{escape(text)}</text>")


def _columns(tree: Tree, path: str, stacked: int) -> int:
    """Return how many columns a node and all below it take."""
    children = tree.children(path)
    leaves = sum(tree.is_leaf(child) for child in children)
    inner = (_columns(tree, child, stacked) for child in children if not tree.is_leaf(child))
    return max(1, sum(inner) + -(-leaves // stacked))


def _cut(line: str) -> str:
    """Return a line as far as it fits; of a path the end is worth more than the middle."""
    if len(line) <= _LETTERS:
        return line
    return f"{line[:9]}\N{HORIZONTAL ELLIPSIS}{line[-(_LETTERS - 10) :]}"
