"""What a person sees and does, in a browser."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hansa
from browser import Tab, tab
from hansa.pipeline import pipeline
from hansa.ui import Server
from serving import serving
from support import config

SHOWN = "tbody tr"


@pytest.fixture(scope="module")
def server(shelf: Path) -> Iterator[Server]:
    with serving(shelf) as made:
        yield made


@pytest.fixture(scope="module", params=[(1280, "light"), (390, "dark")], ids=str)
def view(request: Any) -> tuple[int, str]:
    """Both sides of what pages have to look good on."""
    return request.param


def names(page: Any) -> list[str]:
    return page.locator(f"{SHOWN} th a").all_inner_texts()


def opened(made: Tab, address: str) -> Any:
    made.page.goto(address)
    made.page.locator("h1").wait_for()
    return made.page


def fits(page: Any) -> bool:
    """Tell whether nothing makes the page wider than the window; tables and plots may scroll."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def test_the_list_is_searched_filtered_and_sorted(browser, server, view) -> None:
    with tab(browser, *view) as made:
        page = opened(made, server.url)
        page.locator(SHOWN).nth(3).wait_for()
        assert sorted(names(page)) == ["line-seed0", "one-seed0", "third-seed0", "two-seed0"]
        assert fits(page)
        page.get_by_label("Method").select_option("fedselect")
        assert sorted(names(page)) == ["third-seed0", "two-seed0"]
        page.get_by_label("State").select_option("stopped")
        assert names(page) == ["third-seed0"]
        assert page.get_by_role("status").filter(has_text="shown").inner_text() == "1 of 5 shown"
        page.reload()
        page.locator(SHOWN).first.wait_for()
        assert names(page) == ["third-seed0"], "filters are part of the address"
        page.get_by_label("Method").select_option("")
        page.get_by_label("State").select_option("")
        page.get_by_label("Kind").select_option("pipeline")
        assert names(page) == ["line-seed0"]
        page.get_by_label("Kind").select_option("")
        page.get_by_label("Stages of pipelines").check()
        assert len(names(page)) == 5
        page.get_by_label("Search").fill("fedavg ONE-seed")
        assert names(page) == ["one-seed0"]
        page.get_by_label("Search").fill("nothing of this name")
        assert names(page) == []


def test_columns_sort_both_ways(browser, server) -> None:
    with tab(browser) as made:
        page = opened(made, server.url)
        page.locator(SHOWN).nth(3).wait_for()
        head = page.get_by_role("columnheader", name="name")
        for way, order in (("ascending", False), ("descending", True)):
            head.get_by_role("button").click()
            assert head.get_attribute("aria-sort") == way
            assert names(page) == sorted(names(page), reverse=order)


def test_chosen_runs_are_compared(browser, server, view) -> None:
    with tab(browser, *view) as made:
        page = opened(made, server.url)
        button = page.get_by_role("button", name="Compare")
        assert button.is_disabled()
        page.get_by_label("compare one-seed0").check()
        assert button.is_disabled()
        page.get_by_label("compare two-seed0").check()
        button.click()
        page.get_by_role("heading", name="2 runs compared").wait_for()
        titles = page.locator("h2").all_inner_texts()
        assert titles == ["Test accuracy over rounds", "Bytes over rounds", "Summaries",
                          "Configuration differences"]  # fmt: skip
        assert page.locator("figure svg").count() == 2
        row = page.locator("tr", has=page.get_by_role("rowheader", name="method.name"))
        # In the order of the list, which begins with the last that was written.
        assert row.locator("td").all_inner_texts() == ["fedselect", "fedavg"]
        assert fits(page)


def test_everything_is_reached_by_the_keyboard_and_seen_to_be(browser, server) -> None:
    with tab(browser) as made:
        page = opened(made, server.url)
        page.locator(SHOWN).nth(3).wait_for()
        seen = []
        for _ in range(40):
            page.keyboard.press("Tab")
            about = page.evaluate(
                "(() => { const e = document.activeElement, s = getComputedStyle(e);"
                "return [e.tagName, e.name || e.textContent, s.outlineStyle, s.outlineWidth] })()"
            )
            if about[0] == "BODY":
                break
            seen.append(tuple(about[:2]))
            assert about[2] != "none"
            assert about[3] != "0px"
        assert seen[0] == ("A", "To the content")
        for wanted in (("INPUT", "text"), ("SELECT", "kind"), ("INPUT", "run"), ("A", "one-seed0")):
            assert wanted in seen
        for name in ("one-seed0", "two-seed0"):
            page.get_by_label(f"compare {name}").focus()
            page.keyboard.press("Space")
        page.get_by_role("button", name="Compare 2 runs").focus()
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="2 runs compared").wait_for()


def test_a_pipeline_shows_its_stages_and_leads_to_them(browser, server, view) -> None:
    with tab(browser, *view) as made:
        page = opened(made, f"{server.url}run?path=line-seed0")
        rows = page.locator(SHOWN)
        assert rows.nth(1).locator("td").nth(1).inner_text() == "waiting"
        assert page.get_by_role("progressbar").get_attribute("value") == "1"
        assert fits(page)
        rows.first.get_by_role("link").click()
        page.get_by_role("heading", name="train-12345678-seed0").wait_for()
        page.get_by_role("link", name="line-seed0").click()
        page.get_by_role("link", name="Report page").click()
        page.get_by_role("heading", name="line, pipeline").wait_for()
        page.locator("summary", has_text="train: done").click()
        page.get_by_role("link", name="The page of this stage alone").click()
        page.get_by_role("heading", level=1, name="train-12345678-seed0").wait_for()


def test_what_is_not_there_is_told(browser, server) -> None:
    with tab(browser) as made:
        page = opened(made, f"{server.url}run?path=none")
        page.get_by_role("heading", name="Nothing to show").wait_for()
        made.problems.clear()  # the browser tells of the answer's status


def test_names_are_text_whatever_is_in_them(browser, shelf, tmp_path) -> None:
    name = "<img src=x onerror=alert(1)>"
    folder = tmp_path / name
    folder.mkdir()
    for file in ("config.toml", "checkpoint.json", "summary.json"):
        (folder / file).write_bytes((shelf / "one-seed0" / file).read_bytes())
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace('name = "fedavg"', f'name = "{name}"'))
    with serving(tmp_path) as server, tab(browser) as made:
        page = opened(made, server.url)
        page.locator(SHOWN).first.wait_for()
        assert names(page) == [name]
        assert page.locator("main img").count() == 0
        page.locator(f"{SHOWN} th a").click()
        page.locator("h1").wait_for()
        assert page.locator("h1").inner_text() == name
        assert page.locator("main img").count() == 0


TRAIN = """
import sys, hansa
from pathlib import Path
def wait(run, result):
    while not Path(sys.argv[2], f"go-{result.number}").exists():
        import time; time.sleep(0.02)
hansa.train(sys.argv[1], watch=wait)
"""


def test_a_run_under_way_is_seen_to_go_on(browser, tmp_path) -> None:
    """The run waits after each round for a file, so that nothing here depends on speed."""
    runs, signs = tmp_path / "runs", tmp_path / "signs"
    runs.mkdir()
    signs.mkdir()
    file = tmp_path / "run.toml"
    whole = hansa.config.load(config(runs, name="live", rounds=3, participation={}))
    file.write_text(whole.as_toml())
    with serving(runs) as server, tab(browser) as made, tab(browser) as other:
        listed = opened(made, server.url)
        assert names(listed) == []
        with subprocess.Popen([sys.executable, "-c", TRAIN, str(file), str(signs)]) as process:
            try:
                state = listed.locator(".state")
                listed.locator(SHOWN).get_by_text("1 of 3").wait_for(timeout=120_000)
                assert state.inner_text() == "running"
                page = opened(other, f"{server.url}run?path=live-seed0")
                page.get_by_text("1 of 3 rounds").wait_for()
                assert page.get_by_role("progressbar").get_attribute("value") == "1"
                drawn = page.locator("figure svg").first.inner_html()
                page.locator("summary").focus()
                (signs / "go-1").touch()
                page.get_by_text("2 of 3 rounds").wait_for()
                listed.locator(SHOWN).get_by_text("2 of 3").wait_for()
                assert page.locator("figure svg").first.inner_html() != drawn
                assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
                for number in (2, 3):
                    (signs / f"go-{number}").touch()
                listed.locator(".state[data-state=done]").wait_for()
                page.locator(".state[data-state=done]").wait_for()
                assert process.wait(timeout=60) == 0
            finally:
                process.kill()


def test_a_pipeline_under_way_is_seen_to_go_on(browser, tmp_path) -> None:
    values: dict[str, Any] = {
        "name": "short",
        "output": str(tmp_path),
        "common": {"data": {"clients": 2, "train_per_class": 4}},
        "stages": [
            {"kind": "prune", "config": {"pruning": {"method": "snip", "density": 0.5}}},
            {"kind": "train", "config": {"rounds": 2}},
        ],
    }
    pipeline(values, until="prune")
    with serving(tmp_path) as server, tab(browser) as made, tab(browser) as other:
        listed = opened(made, server.url)
        listed.locator(SHOWN).get_by_text("1 of 2").wait_for()
        page = opened(other, f"{server.url}run?path=short-seed0")
        assert page.locator(SHOWN).nth(1).locator("td").nth(1).inner_text() == "waiting"
        pipeline(values)
        listed.locator(SHOWN).get_by_text("2 of 2").wait_for()
        page.get_by_text("2 of 2 stages").wait_for()
        row = page.locator(SHOWN).nth(1)
        assert row.locator("td").nth(1).inner_text() == "done"
        assert "accuracy" in row.inner_text()
        page.locator(".state[data-state=done]").wait_for()
