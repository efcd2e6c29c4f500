"""A line of stages as SVG: a box for each, below one another, so that a phone shows it whole.

Written by hand, since a box is as large as its text. Colours and font are the page's own.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LINE, PAD, GAP = 330, 18, 9, 26
"""Width of a box, height of a line of text, room around the lines, and between boxes, in pixels."""
LANE = 13
"""Pixels between arrows that pass boxes on the left."""
LETTERS = 46
"""Letters of a line of text that fit a box."""
_FRAMES = {
    "running": 'stroke-width="2.6"',
    "waiting": 'stroke-dasharray="5 4" stroke-opacity=".7"',
    "done": 'stroke-width="1.2"',
}


@dataclass(frozen=True)
class Stop:
    """One stage.

    Attributes:
        name: what arrows call it.
        lines: what stands in its box; the first is set in bold.
        start: the stage that an arrow comes from.
        state: ``waiting``, ``running`` or ``done``, which the frame shows.
    """

    name: str
    lines: Sequence[str]
    start: str | None
    state: str


def draw(stops: Sequence[Stop], title: str) -> str:
    """Return the stages from top to bottom, joined by arrows.

    An arrow to the next stage is straight; one that passes others goes round them on the left.
    """
    place = {stop.name: number for number, stop in enumerate(stops)}
    far = [s for s in stops if s.start in place and place[s.name] - place[s.start] > 1]
    left = LANE * (len(far) + 1) if far else 4
    texts = [[part for line in stop.lines for part in _broken(line)] for stop in stops]
    tops, heights, marks, top = [], [], [], 4.0
    for stop, lines in zip(stops, texts, strict=True):
        height = 2 * PAD + LINE * len(lines)
        marks.append(_box(stop, lines, left, top, height))
        tops.append(top)
        heights.append(height)
        top += height + GAP
    for number, stop in enumerate(stops):
        if stop.start not in place:
            continue
        origin = place[stop.start]
        middle = left + WIDTH / 2
        if stop in far:
            lane = left - LANE * (far.index(stop) + 1)
            low, high = tops[origin] + heights[origin] - 14, tops[number] + 14
            way = f"M{left} {low:g}H{lane:g}V{high:g}H{left - 7}"
            tip = f"M{left - 1} {high:g}l-8 -4.5v9z"
        else:
            high = tops[number]
            way = f"M{middle:g} {tops[origin] + heights[origin]:g}V{high - 7:g}"
            tip = f"M{middle:g} {high - 1:g}l-4.5 -8h9z"
        marks.append(f'<path d="{way}" fill="none" stroke="currentColor"/><path d="{tip}"/>')
    width, bottom = left + WIDTH + 4, max(top - GAP + 4, 8)
    return (
        f'<svg viewBox="0 0 {width} {bottom:g}" role="img" aria-label="{escape(title)}" '
        f'style="width:100%;max-width:{1.15 * width:.0f}px;min-width:{0.8 * width:.0f}px" '
        f'font-size="13" fill="currentColor">{"".join(marks)}</svg>'
    )


def _box(stop: Stop, lines: Sequence[str], left: float, top: float, height: float) -> str:
    frame = _FRAMES.get(stop.state, "")
    texts = []
    for number, line in enumerate(lines):
        bold = "" if number else ' font-weight="bold"'
        y = top + PAD + LINE * (number + 0.72)
        texts.append(f'<text x="{left + PAD:g}" y="{y:g}"{bold}>{escape(line)}</text>')
    return (
        f'<rect x="{left:g}" y="{top:g}" width="{WIDTH}" height="{height}" rx="6" '
        f'fill-opacity=".06" stroke="currentColor" {frame}/>{"".join(texts)}'
    )


def _broken(line: str) -> list[str]:
    return textwrap.wrap(line, LETTERS, subsequent_indent="\N{NO-BREAK SPACE}" * 3) or [""]
