"""What an audit found, as a page, as Markdown for a review, and as JUnit for other tools."""

import xml.etree.ElementTree as ET  # nosec B405 # XML is written, and none is read
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hansa.report.page import write_page
from hansa.report.parts import Part, plot, table
from hansa.report.plots import lines

SAID = (
    "A rate is over valid cases, those whose answer to the response as it is tells the true value. "
    "Insertion counts answers that tell the inserted value, deletion those that have lost the true "
    "one without a defence saying so, substitution is the harmonic mean of both. Figures of other "
    "harnesses are not comparable."
)
SIGNED = (
    "A signature tells that a response is what its provider sent. It stops edits on the way, and "
    "does not stop a provider that lies: see the arms marked (provider). A defence that refuses "
    "gives no answer in the place of a wrong one; read utility and false blocks beside every rate."
)
BLOCKED = (
    "The share of tampered responses or answers that a defence refused: its true positives, which "
    "the first column, the refused ones that were not tampered with, has to be read beside."
)
Summary = Mapping[str, Any]


def report(page: Path, summary: Summary, config: str) -> Path:
    """Write one self-contained HTML page and return its path.

    Raises:
        InputError: a page that cannot be written.
    """
    tables = [
        table("Verdict", ["", ""], _verdict(summary), SAID),
        table("Defences", *_defences(summary), SIGNED),
        table("Blocked, by manipulation", *_blocked(summary), BLOCKED),
        table("Without a defence", *_arms(summary, "none"), "With 95 % intervals (Wilson)."),
        table("By domain, without a defence", *_domains(summary)),
    ]
    if "gate" in summary:
        tables.insert(1, table("Gate", *_gate(summary)))
    folded = [
        table(f"With {name}", *_arms(summary, name), _reasons(row), folded=True)
        for name, row in summary["defences"].items()
        if name != "none"
    ]
    return write_page(
        page,
        title=f"{summary['name']}, API audit",
        lead=_lead(summary),
        tables=[*tables, *folded],
        scored=[],
        plots=_plots(summary),
        configurations=[("configuration", config)],
    )


def markdown(summary: Summary) -> str:
    """Return the same tables as Markdown."""
    parts = [f"# {summary['name']}, API audit", _lead(summary), _rows(["", ""], _verdict(summary))]
    if "gate" in summary:
        parts += ["## Gate", _rows(*_gate(summary))]
    parts += ["## Defences", _rows(*_defences(summary)), SAID, SIGNED]
    parts += ["## Blocked, by manipulation", _rows(*_blocked(summary)), BLOCKED]
    parts += ["## Without a defence", _rows(*_arms(summary, "none"))]
    parts += ["## By domain, without a defence", _rows(*_domains(summary))]
    for name in summary["defences"]:
        if name != "none":
            parts += [f"## With {name}", _rows(*_arms(summary, name))]
    return "\n\n".join(parts) + "\n"


def junit(summary: Summary) -> str:
    """Return the audit as JUnit: a suite for each defence, a case for each arm.

    A case fails where the gate says that it exceeds; without a gate none does. An audit that does
    not conclude is an error.
    """
    root = ET.Element("testsuites", name=f"hansa audit {summary['name']}")
    gate = summary.get("gate", {})
    rows = {row["arm"]: row for row in gate.get("arms", ())}
    for name, defence in summary["defences"].items():
        suite = ET.SubElement(root, "testsuite", name=name)
        failed = errors = 0
        for arm, row in defence["arms"].items():
            case = ET.SubElement(suite, "testcase", classname=f"audit.{name}", name=arm)
            row_ = rows.get(arm) if gate.get("defence") == name else None
            if summary["verdict"] == "no conclusion":
                ET.SubElement(case, "error", message=summary["why"])
                errors += 1
            elif row_ is not None and row_["exceeded"]:
                told = f"adopted {_percent(row['adopted'])}, at most {_percent(row_['limit'])}"
                ET.SubElement(case, "failure", message=told)
                failed += 1
            ET.SubElement(case, "system-out").text = ", ".join(
                f"{key} {_percent(row[key])}" for key in ("adopted", "lost", "blocked", "correct")
            )
        suite.set("tests", str(len(defence["arms"])))
        suite.set("failures", str(failed))
        suite.set("errors", str(errors))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _lead(summary: Summary) -> str:
    return (
        f"{summary['verdict']}: {summary['why']}; target {summary['target']['name']}, "
        f"{summary['cases']} cases of {', '.join(summary['domains'])}, seed {summary['seed']}"
    )


def _verdict(summary: Summary) -> list[list[object]]:
    known, harness = summary["calibration"], summary["harness"]
    rows: list[list[object]] = [
        ["verdict", f"{summary['verdict']}: {summary['why']}"],
        ["clean cases answered", _percent(summary["clean_accuracy"])],
    ]
    for name, share in summary["clean_accuracy_by_domain"].items():
        rows.append([f"clean cases answered, {name}", _percent(share)])
    rows += [
        ["valid cases, invalid ones", f"{summary['valid']}, {summary['invalid']}"],
        ["noise floor: changed when asked again", _percent(summary["noise_floor"])],
    ]
    for name, what in (("trusting", "adopted"), ("verifying", "adopted"), ("constant", "changed")):
        if name in known:
            rows.append([f"calibration: {name} reader, {what}", _percent(known[name][what])])
    return [*rows, ["harness", f"hansa {harness['hansa']}, Python {harness['python']}"]]


def _gate(summary: Summary) -> tuple[list[str], list[list[object]]]:
    gate = summary["gate"]
    rows: list[list[object]] = [
        [row["arm"], _percent(row["adopted"]), _percent(row["limit"]), _passed(not row["exceeded"])]
        for row in gate["arms"]
    ]
    if not gate["concluded"]:
        rows.append(["the audit", "-", "-", "does not conclude"])
    rows.append([f"in all, by {gate['defence']}", "", "", _passed(gate["passed"])])
    return ["arm", "adopted", "at most", ""], rows


def _defences(summary: Summary) -> tuple[list[str], list[list[object]]]:
    columns = ["defence", "utility without attack", "false blocks", "latency, ms"]
    plain = _plain(summary)
    rows = []
    for name, row in summary["defences"].items():
        line: list[object] = [name, _percent(row["utility"])]
        line.append(_spread(row["false_blocks"], row["false_blocks_interval"]))
        line.append("-" if row["latency_ms"] is None else f"{row['latency_ms']:.3f}")
        line += [_percent(row["arms"].get(arm, {}).get("rate")) for arm in plain]
        rows.append(line)
    return [*columns, *(f"{arm}: rate" for arm in plain)], rows


def _blocked(summary: Summary) -> tuple[list[str], list[list[object]]]:
    plain = _plain(summary)
    rows: list[list[object]] = []
    for name, row in summary["defences"].items():
        shares = [row["arms"].get(arm, {}).get("blocked") for arm in plain]
        rows.append([name, _percent(row["false_blocks"]), *map(_percent, shares)])
    return ["defence", "not tampered with", *plain], rows


def _plain(summary: Summary) -> list[str]:
    """Return the arms that the table of defences shows: all that are not doses."""
    arms = summary["defences"]["none"]["arms"]
    first = next((r["strength"] for r in arms.values() if r["operator"] == "insertion"), None)
    return [
        name
        for name, row in arms.items()
        if row["operator"] != "substitution"
        or row["action"] != "value"
        or first is None
        or row["strength"] == first
    ]


def _arms(summary: Summary, defence: str) -> tuple[list[str], list[list[object]]]:
    keys = ["lost", "both", "abstained", "flagged", "changed_above_floor", "blocked", "correct"]
    columns = ["arm", "valid", "rate", "adopted", *(key.replace("_", " ") for key in keys)]
    columns += [] if defence == "none" else ["p, adopted as without"]
    rows = []
    for name, row in summary["defences"][defence]["arms"].items():
        few = " (few)" if row["few"] else ""
        line: list[object] = [name, f"{row['valid']}{few}", _percent(row["rate"])]
        line.append(_spread(row["adopted"], row["adopted_interval"]))
        line += [_percent(row[key]) for key in keys]
        if "mcnemar_p" in row:
            line.append(f"{row['mcnemar_p']:.2g}")
        rows.append(line)
    return columns, rows


def _domains(summary: Summary) -> tuple[list[str], list[list[object]]]:
    found = summary["defences"]["none"]["by_domain"]
    rows: list[list[object]] = [
        [arm, *(_percent(found[d][arm]["rate"]) if arm in found[d] else "-" for d in found)]
        for arm in summary["defences"]["none"]["arms"]
    ]
    return ["arm: rate", *found], rows


def _plots(summary: Summary) -> list[Part]:
    series = {}
    for name, row in summary["defences"].items():
        points = sorted(
            (100 * arm["strength"], arm["adopted"])
            for arm in row["arms"].values()
            if (arm["operator"], arm["action"], arm["where"]) == ("substitution", "value", "path")
            and arm["adopted"] is not None
        )
        if len(points) > 1:
            series[name] = points
    if not series:
        return []
    title = "Dose and response: false values adopted, by strength"
    caption = "Substitution of all fields that state the value, from plausible (0) to absurd (100)."
    svg = lines(series, title=title, x="strength, %", y="adopted", percent=True)
    return [plot(title, caption, svg)]


def _reasons(row: Summary) -> str:
    return "Refused, for example: " + "; ".join(row["reasons"]) if row["reasons"] else ""


def _rows(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return "\n".join(_lines(columns, rows))


def _lines(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"


def _spread(share: float | None, interval: Sequence[float] | None) -> str:
    if share is None or interval is None:
        return _percent(share)
    return f"{_percent(share)} ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"


def _percent(share: float | None) -> str:
    return "undefined" if share is None else f"{100 * share:.1f} %"


def _passed(passed: bool) -> str:
    return "passes" if passed else "exceeded"
