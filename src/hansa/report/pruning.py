"""The page about a pruned model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hansa.config import RunConfig
from hansa.federation.message import Tensors
from hansa.report.lineage import lineage
from hansa.report.page import write_page
from hansa.report.parts import plot
from hansa.report.plots import bars, histogram


def report(
    page: Path, config: RunConfig, summary: Mapping[str, Any], scores: Tensors, kept: Tensors
) -> Path:
    """Write one self-contained HTML page and return its path.

    Args:
        page: the file to write.
        config: what was asked for.
        summary: what the stage found.
        scores: layer -> the scores that decided.
        kept: layer -> bool tensor of the same shape.

    Raises:
        InputError: a page that cannot be written.
    """
    what = "channels" if summary["structured"] else "weights"
    density = summary["density"]
    densities = {layer["name"]: layer["kept"] / layer["total"] for layer in summary["layers"]}
    shares = f"Share of each layer's {what} that is kept"
    return write_page(
        page,
        title=f"{config.name}, pruned",
        lead=f"{summary['method']}, {100 * density:.3g} % of the {what} kept "
        f"({100 * (1 - density):.3g} % pruned), model {config.model.name}, {config.data.source}, "
        f"seed {config.seed}",
        tables=[_sizes(summary), _layers(summary, what), *lineage(page.parent / "bundle")],
        scored=[],
        plots=[
            plot(shares, "On a logarithmic scale.", bars(densities, title=shares, x="density")),
            _scores(scores, kept, what),
        ],
        configurations=[("configuration", config.as_toml())],
    )


def _sizes(summary: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for key, name in (("parameters", "parameters"), ("flops", "FLOPs of a forward pass")):
        before, after = summary[key]["before"], summary[key]["after"]
        share = f"{100 * after / before:.3g} %" if before else "-"
        rows.append([name, f"{before:,}", f"{after:,}", share])
    note = "FLOPs of convolutions and linear layers for one sample, by PyTorch's counter; "
    if summary["structured"]:
        note += "seconds are the median of a batch's forward pass on this machine."
        seconds = summary["forward_seconds"]
        before, after = seconds["before"], seconds["after"]
        numbers = [f"{before:.4f}", f"{after:.4f}", f"{100 * after / before:.3g} %"]
        rows.append(["seconds of a forward pass", *numbers])
    else:
        note += "after pruning they count only weights that are kept, which saves no time where "
        note += "zeros are multiplied like other numbers."
    columns = ["", "before", "after", "after / before"]
    return {"title": "Size", "columns": columns, "rows": rows, "folded": False, "note": note}


def _layers(summary: Mapping[str, Any], what: str) -> dict[str, Any]:
    rows = [
        [
            layer["name"],
            f"{layer['total']:,}",
            f"{layer['kept']:,}",
            f"{100 * layer['kept'] / layer['total']:.3g} %",
            *([] if what == "channels" else [layer["dead"]]),
        ]
        for layer in summary["layers"]
    ]
    columns = ["layer", what, "kept", "density"]
    return {
        "title": "Layers",
        "columns": columns if what == "channels" else [*columns, "dead outputs"],
        "rows": rows,
        "folded": len(rows) > 30,
        "note": "" if what == "channels" else "A dead output has no weight left that leads to it.",
    }


def _scores(scores: Tensors, kept: Tensors, what: str) -> dict[str, Any]:
    values = torch.cat([scores[name].flatten().double() for name in kept])
    chosen = torch.cat([kept[name].flatten() for name in kept])
    sizes = values.abs()
    logs = sizes.clamp(min=torch.finfo(torch.float64).tiny).log10()
    nonzero = sizes > 0
    title = f"Scores of {what}"
    zeros = int((~nonzero).sum())
    series = {"kept": logs[chosen & nonzero].tolist(), "pruned": logs[~chosen & nonzero].tolist()}
    caption = "How many have a score of which size; both axes are logarithmic."
    if bool((values < 0).any()):
        caption += " Scores have signs here, and the plot shows their sizes."
    if zeros:
        caption += f" {zeros:,} scores are zero."
    svg = histogram(series, title=title, x="log10 of the score", y=what)
    return plot(title, caption, svg)
