"""Pages of every kind in a browser, from a file: complete, readable, and nothing from elsewhere."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import hansa
from browser import tab
from hansa.auditing import audit
from hansa.compare import compare
from hansa.config import load
from hansa.federation.engines.engine import RoundResult, Visit
from hansa.prune import prune
from hansa.redteam import redteam
from hansa.report import report
from hansa.report.curation import report as curation
from hansa.runs import Run
from hansa.safeguarding import safeguard
from hansa.searching import search
from support import config

OUTLINE = """[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(h => +h.tagName[1])"""
UNNAMED = """[...document.querySelectorAll('svg, table, [role=group]')].filter(e =>
  !(e.ariaLabel || e.caption?.textContent
    || document.getElementById(e.getAttribute('aria-labelledby'))?.textContent)).length"""
TWICE = """(() => { const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
  return ids.filter((id, k) => ids.indexOf(id) !== k) })()"""
DANGLING = """[...document.querySelectorAll('[aria-labelledby], [aria-describedby]')].filter(e =>
  ['aria-labelledby', 'aria-describedby'].some(a => e.getAttribute(a)
    && !document.getElementById(e.getAttribute(a)))).length"""
CUT = """[...document.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth + 1
  && e.clientWidth > 1 && getComputedStyle(e).overflowX === 'hidden').map(e => e.outerHTML)"""
CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (colour, under) => { canvas.fillStyle = under; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3) };
  const light = c => { const [r, g, b] = c.map(v => { v /= 255;
    return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 });
    return .2126 * r + .7152 * g + .0722 * b };
  const dark = matchMedia('(prefers-color-scheme: dark)').matches;
  const ground = light(rgb(dark ? '#121212' : '#ffffff', '#000'));
  let worst = 99;
  for (const e of document.querySelectorAll('p, td, th, h1, h2, summary, figcaption, text')) {
    if (e.style.fill && !/currentcolor/i.test(e.style.fill)) continue;  // numbers in matrices
    const style = getComputedStyle(e);
    const colour = e.tagName === 'text' ? style.fill : style.color;
    const mixed = rgb(colour, dark ? '#121212' : '#ffffff');
    const [a, b] = [light(mixed), ground].sort((x, y) => y - x);
    worst = Math.min(worst, (a + .05) / (b + .05));
  }
  return worst })()"""


def run(folder: Path, **changes: Any) -> Path:
    return report([hansa.train(config(folder, participation={}, **{"rounds": 2, **changes}))])


def language(folder: Path) -> Path:
    """A run over a tree whose figures are made up, since only its page matters here."""
    values: dict[str, Any] = {
        "name": "words", "output": str(folder), "rounds": 2, "text": {"context": 8},
        "model": {"name": "llama"}, "method": {"name": "worldlm", "keys": 1},
        "nodes": {"root": {"text": "python:manual"}, "code": {},
                  "net": {"parent": "code", "text": "python:code-net"},
                  "tables": {"parent": "code", "text": "python:tables"}},
    }  # fmt: skip
    made = Run.create(load(values))
    made.store()
    leaves = ("root/code/net", "root/code/tables")
    for number in (1, 2):
        scores = {
            path: {split: {"loss": (3.0 - 0.2 * number, 1.0), "bits_per_byte": (4.0, 1.0)}
                   for split in ("test", "test:trained")}
            for path in ("root", *leaves)
        }  # fmt: skip
        visits = tuple(Visit(path, "ok", 900, 800) for path in ("root/code", *leaves))
        made.record(RoundResult(number, visits, scores, 1.0), None)
    return report([made])


def several(folder: Path) -> Path:
    values = config(folder, rounds=2, participation={})
    del values["method"]
    return compare({**values, "methods": {"fedavg": {}, "fedselect": {}}}, [], [0, 1]).report()


def pruned(folder: Path) -> Path:
    values = config(folder, method={"name": "fedavg"}, participation={})
    return prune({**values, "pruning": {"method": "snip", "density": 0.5}}).report


def searched(folder: Path) -> Path:
    return search({"name": "s", "output": str(folder), "budget": 6, "train": False}).report


def curated(folder: Path) -> Path:
    """A page of numbers that are written down where its content is tested."""
    from report import test_curation_report as numbers

    found, holders = numbers.summary(labelled=True), numbers.holders(labelled=True)
    return curation(folder / "report.html", numbers.config(), found, holders)


def audited(folder: Path) -> Path:
    values = {"name": "a", "output": str(folder), "cases": 6, "strengths": [0.5, 1.0]}
    defences = ["none", "delimiting", "schema", "cross-field", "allow-list", "history"]
    return audit({**values, "defences": defences, "target": {"kind": "trusting"}}).report


def small_safeguard(folder: Path) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    batches = {"batch_size": 4, "attack_batch_size": 4}
    return {
        "name": "s",
        "output": str(folder),
        "model": {"options": {**sizes, "num_attention_heads": 2}},
        "data": {"kind": "world", "entities": 16, "relations": 2, "values": 4},
        "phases": [
            {"kind": "pretrain", "steps": 4},
            {"kind": "random_mapping", "steps": 2},
            {"kind": "tar", "steps": 4, "inner_steps": 4, **batches},
        ],
        "redteam": {
            "seeds": [0],
            "probes": [2],
            "attacks": [{"name": "full", "lrs": [1e-3], "steps": 4, "batch": 8}],
            "edits": [{"name": "int4", "kind": "quantise", "amount": 4}],
        },
    }


def safeguarded(folder: Path) -> Path:
    return safeguard(small_safeguard(folder)).report


def attacked(folder: Path) -> Path:
    safeguarded(folder)
    return redteam(small_safeguard(folder)).report


KINDS: dict[str, Callable[[Path], Path]] = {
    "run": run,
    "run with masks": lambda folder: run(folder, method={"name": "fedselect", "rate": 0.2}),
    "tree": lambda folder: run(folder, tree={"federations": 2}, method={"name": "fedavg"}),
    "language": language,
    "compare": several,
    "prune": pruned,
    "search": searched,
    "curate": curated,
    "audit": audited,
    "safeguard": safeguarded,
    "redteam": attacked,
}


VIEWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_complete_readable_and_named(browser, tmp_path, kind) -> None:
    file = KINDS[kind](tmp_path)
    for view in VIEWS:
        check(browser, file, view)


def check(browser: Any, file: Path, view: tuple[int, str]) -> None:
    with tab(browser, *view) as made:
        page = made.page
        page.goto(file.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.lang") == "en"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        levels = page.evaluate(OUTLINE)
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        assert page.evaluate(UNNAMED) == 0
        assert page.evaluate(TWICE) == []
        assert page.evaluate(DANGLING) == 0
        assert page.evaluate(CUT) == []
        assert page.evaluate(CONTRAST) >= 4.5
        assert page.locator("td[scope], th:not([scope])").count() == 0
        assert page.locator("svg").count() > 0


def test_what_is_wider_than_a_phone_scrolls_by_the_keyboard(browser, shelf) -> None:
    with tab(browser, 390) as made:
        page = made.page
        page.goto((shelf / "two-seed0" / "report.html").as_uri())
        wide = page.locator(".wide").filter(has=page.locator("table")).first
        wide.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("document.activeElement.scrollLeft > 0")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.parametrize("view", [(1280, "dark"), (390, "light")], ids=str)
def test_a_pipeline_s_page_holds_those_of_its_stages(browser, shelf, view) -> None:
    file = shelf / "line-seed0" / "report.html"
    check(browser, file, view)
    with tab(browser, *view) as made:
        page = made.page
        page.goto(file.as_uri())
        page.get_by_role("heading", name="The line of stages").wait_for()
        page.get_by_role("heading", name="train: Test accuracy over rounds", level=3).wait_for()
        inner = page.get_by_role("heading", name="Test accuracy over rounds", exact=True)
        assert not inner.is_visible()
        page.locator("summary", has_text="train: done").focus()
        page.keyboard.press("Enter")
        inner.wait_for()
        assert inner.evaluate("e => e.tagName") == "H4"
        assert page.get_by_text("It has no page of its own yet.").count() == 1
        page.get_by_role("link", name="The page of this stage alone").click()
        page.get_by_role("heading", level=1, name="train-12345678-seed0").wait_for()
