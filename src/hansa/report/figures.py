"""What came out of a stage, in a few figures for people: label -> text."""

from collections.abc import Mapping
from typing import Any

from hansa.report.sizes import size


def of_search(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return those of ``search.json``."""
    told = {"model": str(summary["model"])}
    for key in ("validation_accuracy", "test_accuracy"):
        if summary.get(key) is not None:
            told[key.replace("_", " ")] = _share(summary[key])
    if summary.get("parameters") is not None:
        told["parameters"] = f"{summary['parameters']:,.0f}"
    if limits := summary["limits"]:
        told["limits"] = ", ".join(f"{key} {value}" for key, value in limits.items())
    return told


def of_prune(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return those of a prune stage's summary."""
    before, after = summary["parameters"]["before"], summary["parameters"]["after"]
    return {
        "method": str(summary["method"]),
        "kept": _share(summary["density"]),
        "parameters": f"{before:,} to {after:,}",
    }


def of_run(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return those of a run's summary."""
    told = {"method": str(summary["method"])}
    metrics = summary["metrics"]
    if accuracy := metrics.get("accuracy"):
        told["accuracy"] = (
            f"{_share(accuracy['mean'])}, worst tenth {_share(accuracy['worst_tenth'])}"
        )
    for key in ("perplexity", "perplexity_after_local_steps"):
        if values := metrics.get(key):
            told[key.replace("_", " ")] = f"{values['mean']:.3g}"
    total = summary["bytes"]["up"] + summary["bytes"]["down"]
    return {**told, "messages": size(total)}


def of_curation(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return those of a curation's summary."""
    clients = summary["clients"].values()
    samples, kept = (sum(row[key] for row in clients) for key in ("samples", "kept"))
    told = {"examples kept": f"{kept:,} of {samples:,}"}
    if chosen := (summary.get("rules") or {}).get("chosen"):
        told["F1 of finding the clean"] = f"{chosen['f1']:.2f}"
    return told


def of_safeguard(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return those of a safeguard's summary."""
    scores, cost = summary["scores"], summary["cost_in_steps"]["safeguarded"]
    told = {}
    for what in ("restricted", "retained"):
        before, after = (scores[role][what]["choice"] for role in ("unprotected", "safeguarded"))
        told[f"{what} answered"] = f"{_share(before)} to {_share(after)}"
    return {**told, "cost": f"{cost:,.0f} plain steps"}


def of_redteam(card: Mapping[str, Any]) -> dict[str, str]:
    """Return those of a scorecard, worst case first."""
    told = {}
    for role in ("safeguarded", *sorted(set(card["recovery"]) - {"safeguarded"})):
        line = {int(step): value for step, value in card["recovery"][role].items()}
        if len(line) > 1:
            last = max(line)
            told[f"{role}, back within {last} steps"] = _share(line[last])
    return told


def of_audit(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return those of an audit's summary."""
    undefended = summary["defences"]["none"]["arms"]
    told = {"verdict": str(summary["verdict"]), "clean answers": _share(summary["clean_accuracy"])}
    if undefended:
        worst = max(undefended, key=lambda arm: undefended[arm]["adopted"] or 0)
        told[f"adopted, {worst}"] = _share(undefended[worst]["adopted"] or 0)
    return told


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"
