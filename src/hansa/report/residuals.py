"""What became of residuals, the key blocks that travel to other federations."""

from hansa.report.attention import figures
from hansa.report.parts import Part, plot, table
from hansa.report.plots import lines
from hansa.runs import Run

KINDS = ("cut", "up", "held", "used", "expired", "lost")
MAX_SHOWN = 12
"""Rounds up to which their table is open."""


def residuals_of(run: Run, named: str = "") -> list[Part]:
    """Return the flow of residuals over rounds, where any was cut.

    Args:
        run: the run.
        named: what stands behind the titles.
    """
    totals: dict[str, dict[int, float]] = {}
    for kind in KINDS:
        sums = totals.setdefault(kind, {})
        for by_round in figures(run, f"residuals_{kind}").values():
            for number, row in by_round.items():
                sums[number] = sums.get(number, 0.0) + sum(row.values())
    if not any(totals["cut"].values()):
        return []
    rounds = sorted({number for sums in totals.values() for number in sums})
    rows: list[list[object]] = [
        [number, *(f"{totals[kind].get(number, 0.0):.0f}" for kind in KINDS)] for number in rounds
    ]
    sums_of = {kind: f"{sum(totals[kind].values()):.0f}" for kind in KINDS}
    rows.append(["all", *("" if kind == "held" else sums_of[kind] for kind in KINDS)])
    title = f"Residuals over rounds{named}"
    series = {
        kind: [(float(number), totals[kind].get(number, 0.0)) for number in rounds]
        for kind in KINDS
    }
    caption = (
        "A residual is a key block that its own federation does not resemble. Each is cut, goes "
        "up, waits, comes down in another branch, and is used there or expires."
    )
    note = (
        "Summed over nodes. Cut: new in the round. Up: sent to a node's parent, once for every "
        "edge. Held: waiting at the end of the round. Used: taken up by a node. Expired: came too "
        "far on the way down. Lost: came too far while it waited or on the way up."
    )
    columns = ["round", *KINDS]
    svg = lines(series, title=title, x="round", y="residuals", counts=True)
    return [
        plot(title, caption, svg),
        table(f"Residuals of every round{named}", columns, rows, note, len(rows) > MAX_SHOWN),
    ]
