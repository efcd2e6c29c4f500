"""What tampered responses do to a small reader, and what each defence stops, costs and blocks.

A transformer of 0.15 M parameters is trained here to answer questions from JSON responses of three
made-up services, on cases whose names and values are others than those it is audited on. It is a
toy that believes what it reads: the order of defences is the message, and nothing is said about any
language model. Tables:

clean       share of held-out clean cases that it answers, before anything is tampered with
dose        false values adopted, by strength and defence
defences    rates of the three operators, utility, false blocks and latency, by defence
domains     rates without a defence, by domain
entities    precision and recall of the recogniser on the fixtures' own names

    python benchmarks/audit.py [--quick] [--json] [--output FOLDER] [--reader FOLDER]

What is done is kept in FOLDER (by default ``runs/benchmark-audit``): the same command goes on where
it was stopped. ``--quick`` takes 16 cases of each domain and four defences.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hansa.audit.domains import DOMAINS, domain
from hansa.audit.entities import recognise
from hansa.audit.options import DEFENCES
from hansa.audit.paths import look, parse
from hansa.audit.summary import adoption
from hansa.auditing import Audited, audit, load

STACK = "schema+cross-field+history"
"""What needs neither a signature nor a second provider."""
QUICK = ("none", "schema", "signature", "second-source")


def config(quick: bool, output: Path, reader: str) -> dict[str, Any]:
    """Return the audit's configuration."""
    return {
        "name": "quick" if quick else "full",
        "output": str(output),
        "cases": 16 if quick else 0,
        "strengths": [0.0, 1.0] if quick else [0.0, 0.5, 0.75, 1.0],
        "defences": list(QUICK) if quick else [*DEFENCES, STACK],
        "target": {"kind": "reader", "path": reader},
    }


def entities() -> dict[str, dict[str, float]]:
    """Return label -> precision, recall and number of names, on the texts of the fixtures."""
    right, missed, wrong = Counter[str](), Counter[str](), Counter[str]()
    for case in (case for name in DOMAINS for case in domain(name).cases):
        for path in sorted({path for path, _, _ in case.labels}):
            known = {(label, text) for place, label, text in case.labels if place == path}
            found = {(e.label, e.text) for e in recognise(look(case.document, parse(path)))}
            right.update(label for label, _ in known & found)
            missed.update(label for label, _ in known - found)
            wrong.update(label for label, _ in found - known)
    return {
        label: {
            "precision": right[label] / (right[label] + wrong[label]),
            "recall": right[label] / (right[label] + missed[label]),
            "names": right[label] + missed[label],
        }
        for label in sorted(right)
    }


def rows(made: Audited) -> dict[str, list[list[str]]]:
    """Return the tables, each with its head first."""
    summary, defences = made.summary, made.summary["defences"]
    arms = defences["none"]["arms"]
    doses = [name for name, row in arms.items() if _is_dose(row)]
    others = [name for name in arms if name not in doses]
    plausible = [n for n in doses if arms[n]["strength"] == arms[others[0]]["strength"]]
    clean = summary["clean_accuracy_by_domain"] | {"all": summary["clean_accuracy"]}
    tables = {"clean": [["domain", "answered"], *([n, _percent(s)] for n, s in clean.items())]}
    tables["dose"] = [["defence", *(f"{arms[name]['strength']:g}" for name in doses)]]
    head = ["defence", "utility", "false blocks", "ms", *plausible, *others]
    tables["defences"] = [head]
    tables["blocked"] = [["defence", *plausible, *others]]
    for name, row in defences.items():
        tables["dose"].append([name, *(_percent(row["arms"][d]["adopted"]) for d in doses)])
        start = [name, _percent(row["utility"]), _percent(row["false_blocks"])]
        start.append(f"{row['latency_ms']:.2f}")
        rates = [_percent(row["arms"][arm]["rate"]) for arm in (*plausible, *others)]
        tables["defences"].append([*start, *rates])
        stopped = [_percent(row["arms"][arm]["blocked"]) for arm in (*plausible, *others)]
        tables["blocked"].append([name, *stopped])
    domains = defences["none"]["by_domain"]
    tables["domains"] = [["arm", *domains]]
    for arm in arms:
        told = [_percent(d[arm]["rate"]) if arm in d else "-" for d in domains.values()]
        tables["domains"].append([arm, *told])
    return tables


def main() -> None:
    """Run the audit and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-audit"))
    parser.add_argument("--reader", default="", help="a reader that was saved, to train none")
    given = parser.parse_args()
    values = config(given.quick, given.output, given.reader)
    start = time.process_time()
    made = audit(values)
    seconds = time.process_time() - start
    summary = made.summary
    if given.json:
        from audit_proxy import overhead  # which stands beside this file

        found = {
            "clean_accuracy": summary["clean_accuracy"],
            "adoption": adoption(summary, load(values).chosen),
            "proxy_ms": overhead(200 if given.quick else 1000),
            "verdict": summary["verdict"],
            "noise_floor": summary["noise_floor"],
            "calibration": summary["calibration"],
            "entities": entities(),
            "cpu_seconds": round(seconds, 1),
            "report": str(made.report),
        }
        print(json.dumps(found))
        return
    print(f"{summary['verdict']}: {summary['why']}\n")
    for name, table in rows(made).items():
        _print(name, table)
    known = [
        [label, *(f"{row[key]:.3f}" for key in ("precision", "recall")), str(row["names"])]
        for label, row in entities().items()
    ]
    _print("entities", [["label", "precision", "recall", "names"], *known])
    print(f"{seconds:.0f} s of processor time; report: {made.report}")


def _is_dose(row: dict[str, Any]) -> bool:
    dose = ("substitution", "value", "path")
    return (row["operator"], row["action"], row["where"]) == dose


def _print(name: str, table: list[list[str]]) -> None:
    head, *body = table
    print(f"## {name}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in body:
        print(f"| {' | '.join(row)} |")
    print()


def _percent(share: float | None) -> str:
    return "undefined" if share is None else f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()
