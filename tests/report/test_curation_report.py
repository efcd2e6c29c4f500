"""The page about a curation, of numbers that are written down here."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from hansa.config import RunConfig, load
from hansa.curation.findings import Holder
from hansa.report.curation import report

EVIL = "<b>x & 'y'</b>"
EMPTY = {"meta", "br", "link", "hr", "img", "input", "path", "line", "rect", "circle", "col"}


class Pairs(HTMLParser):
    """Checks that what is opened is closed, and gathers the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def config() -> RunConfig:
    nodes = {name: {"text": "made:lab"} for name in ("a", "b")}
    curation = {"scores": ["ifd", "length"], "anchors": "made:lab"}
    return load({"name": "t", "nodes": nodes, "text": {"answers": {}}, "curation": curation})


def summary(labelled: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "path": "runs/t",
        "scores": ["ifd", "length"],
        "by": ["ifd"],
        "excluded": {"a": {"empty": 7, "long": 2}, "b": {}},
        "rule": {"kind": "anchor_quantile", "rate": 0.1},
        "thresholds": {"all": -0.875, EVIL: None},
        "false_rejection": {
            "all": {"anchors": 40, "rank": 4, "expected": 4 / 41, "upper": 0.1875},
            EVIL: {"anchors": 5, "rank": 0, "expected": 0.0, "upper": 0.0},
        },
        "clients": {
            "a": {"samples": 1200, "kept": 300, "share": 0.25, "domains": {}},
            "b": {"samples": 0, "kept": 0, "share": math.nan, "domains": {}},
        },
        "bytes": {"up": 320, "down": 64_000},
    }
    if labelled:
        row = {"precision": 0.9375, "recall": 0.5, "f1": 0.652, "kept": 0.25}
        found["rules"] = {
            "chosen": {**row, "recall_of": {"a": 0.5, "b": 0.125}},
            "everything": {**row, "precision": math.nan, "recall_of": {"a": 1.0, "b": 1.0}},
        }
        found["auroc"] = {
            "ifd": {"wrong_fact": 0.515, "all": 0.9, "within": math.nan},
            "length": {"wrong_fact": 0.5, "all": 0.57, "within": 0.6},
        }
        found["test_loss"] = {
            name: {"mean": mean, "clients": {"a": mean, "b": 1.0}}
            for name, mean in (("all", 0.4231), ("filtered", 0.2502), ("clean", 0.2153))
        }
    return found


def holders(labelled: bool) -> dict[str, Holder]:
    kinds = ("clean", "clean", "cut", "wrong_fact") if labelled else ("",) * 4
    values = torch.tensor([-0.5, -0.7, -1.2, math.nan], dtype=torch.float64)
    lengths = torch.tensor([3.0, 3, 3, 3], dtype=torch.float64)
    one = Holder({"ifd": values, "length": lengths}, kinds, torch.zeros(4, dtype=torch.int64))
    return {"a": one, "b": one}


def page(tmp_path: Path, labelled: bool, **changes: Any) -> tuple[str, str]:
    """Return the page and the text on it."""
    found = {**summary(labelled), **changes}
    html = report(tmp_path / "page.html", config(), found, holders(labelled)).read_text()
    parser = Pairs()
    parser.feed(html)
    assert not parser.open
    return html, " ".join(" ".join(parser.text).split())


def test_a_page_of_what_a_federation_knows(tmp_path: Path) -> None:
    html, text = page(tmp_path, labelled=False)
    assert html.startswith("<!doctype html>")
    for wanted in (
        "t, curated",
        "300 of 1,200 training examples of 2 clients kept by ifd, rule anchor_quantile",
        "25.0 %",
        "7 empty, 2 long",
        "-0.875",
        "9.8 %",
        "18.8 %",
        "rejects nothing",
    ):
        assert wanted in text, wanted
    for other in ("recall", "AUROC", "Test loss", "labelled clean"):
        assert other not in text
    assert not re.search(r"""(src|href)=["']?http""", html)  # it needs nothing from elsewhere


def test_names_are_escaped(tmp_path: Path) -> None:
    html, text = page(tmp_path, labelled=False)
    assert EVIL not in html
    assert EVIL in text


def test_a_page_of_a_simulation_tells_what_labels_say(tmp_path: Path) -> None:
    _, text = page(tmp_path, labelled=True)
    for wanted in (
        "93.8 %",
        "12.5 %",  # the worst client's recall
        "recall of the worst client",
        "wrong fact",
        "0.52",
        "0.4231",
        "0.2502",
        "labelled clean",
        "clean ones kept",
        "threshold, all",
    ):
        assert wanted in text, wanted
    assert "nan" not in text.lower().replace("nanoseconds", "")


def test_a_score_that_no_example_has_is_left_out(tmp_path: Path) -> None:
    nothing = torch.full((4,), math.nan, dtype=torch.float64)
    one = Holder({"ifd": nothing, "length": nothing}, ("",) * 4, torch.zeros(4).long())
    path = report(tmp_path / "page.html", config(), summary(False), {"a": one, "b": one})
    assert "Good examples have" not in path.read_text()


@pytest.mark.parametrize("by", [["ifd"], ["ifd", "length"]])
def test_thresholds_are_drawn_where_one_score_decides(tmp_path: Path, by: list[str]) -> None:
    _, text = page(tmp_path, labelled=False, by=by)
    assert ("threshold, all" in text) == (len(by) == 1)
