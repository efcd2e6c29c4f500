"""Which examples a run was trained on, where they were filtered."""

from hansa.report.parts import Part, table
from hansa.runs import Run


def kept(label: str, run: Run, several: bool) -> list[Part]:
    """Return what each client kept last, nothing where all examples were used."""
    found = run.curated(run.round)
    if found is None:
        return []
    rows = []
    for name, domains in found.manifest["counts"].items():
        samples, left = (sum(row[key] for row in domains.values()) for key in ("samples", "kept"))
        share = f"{100 * left / samples:.1f} %" if samples else "-"
        rows.append([name, samples, left, share])
    scores, rule = ", ".join(found.manifest["scores"]), found.manifest["rule"]["kind"]
    note = f"By {scores or 'labels'}, rule {rule}, after round {found.manifest['round']}; as the "
    note += "clients told it."
    if any("weights" in held for held in found.clients.values()):
        note += " What is not kept counts less in training, instead of not at all."
    title = f"Examples used: {label}" if several else "Examples used"
    return [table(title, ["client", "examples", "kept", "share"], rows, note)]
