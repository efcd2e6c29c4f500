"""The page of a pipeline, and the parts that pages of runs share with it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import hansa
from hansa.errors import InputError
from hansa.report import report as of_run
from hansa.report.federation import MAX_LEAVES
from hansa.report.line import Stop, draw
from hansa.report.pipeline import report
from support import config


def stage(name: str, state: str = "waiting", **more: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("start", "bundle", "digest", "report", "seconds", "figures"))
    known = {"name": name, "kind": name, "state": state, "key": "", "folder": ""}
    return {**known, **empty, **more}


def write(folder: Path, *stages: dict[str, Any], **more: Any) -> None:
    told = {"format": 1, "name": "line", "seed": 3, "stages": stages, "finished": False, **more}
    (folder / "pipeline.json").write_text(json.dumps(told))


def test_a_pipeline_that_has_not_begun_has_a_page(tmp_path: Path) -> None:
    write(tmp_path, stage("prune", "running"), stage("train", start="prune"))
    text = report(tmp_path).read_text()
    assert "0 of 2 stages done, seed 3" in text
    assert text.count("It has no page of its own yet.") == 2
    assert "stroke-dasharray" in text
    assert "At a glance" not in text


def test_every_stage_s_page_is_inside_and_lineage_is_that_of_the_last_bundle(
    tmp_path: Path,
) -> None:
    first = hansa.train(config(tmp_path, name="a", rounds=1, participation={}))
    model = {"options": {"hidden": [8]}, "bundle": str(first.path / "bundle")}
    second = hansa.train(config(tmp_path, name="b", rounds=1, participation={}, model=model))
    stages = []
    for name, run, start in (("a", first, None), ("b", second, "a")):
        of_run([run])
        digest = json.loads((run.path / "summary.json").read_text())["bundle"]
        folder = run.path.name
        made = {"folder": folder, "bundle": f"{folder}/bundle", "report": f"{folder}/report.html"}
        figures = {"accuracy": "12 %, worst & <tenth>"}
        stages.append(stage(name, "done", seconds=1.25, start=start, digest=digest, figures=figures,
                            **made, kind="train"))  # fmt: skip
    write(tmp_path, *stages, finished=True)
    text = report(tmp_path).read_text()
    lineage = text[text.index("<h2>Lineage of the bundle") : text.index("Pages of the stages")]
    assert re.findall(r"<td>([0-9a-f]{64})</td>", lineage) == [s["digest"] for s in stages]
    assert text.count(">Test accuracy over rounds</h4>") == 2
    glance = text[text.index("At a glance") : text.index("<h2>Stages")]
    assert re.findall(r">([^<]+)</h3>", glance) == [
        "a: Test accuracy over rounds", "b: Test accuracy over rounds",
    ]  # fmt: skip
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    assert referred
    assert referred <= set(ids)
    assert "worst &amp; &lt;tenth&gt;" in text
    assert "<tenth>" not in text
    assert "<script" not in text
    assert not re.search(r'src="', text)


def test_a_page_that_is_gone_is_no_reason_to_fail(tmp_path: Path) -> None:
    write(tmp_path, stage("audit", "done", report="audit-1/report.html", bundle="audit-1/bundle"))
    assert "The page of this stage alone" in report(tmp_path).read_text()


@pytest.mark.parametrize("content", ["", "{", '{"format": 2}', '{"format": 1, "stages": [{}]}'])
def test_what_is_no_pipeline_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "pipeline.json").write_text(content)
    with pytest.raises(InputError, match=r"pipeline\.json"):
        report(tmp_path)


def test_an_arrow_that_passes_a_stage_goes_round_it() -> None:
    stops = [Stop("a", ("a",), None, "done"), Stop("b", ("b",), "a", "done"),
             Stop("c", ("c",), "a", "waiting")]  # fmt: skip
    svg = draw(stops, "line")
    left = float(re.findall(r'<rect x="([\d.]+)"', svg)[0])
    straight, round_ = re.findall(r'<path d="(M[^"]+)" fill="none"', svg)
    assert "H" not in straight
    assert float(re.findall(r"H([\d.]+)V", round_)[0]) < left
    assert draw(stops[:2], "line").count("H") == 0


def test_the_federation_is_drawn_and_many_leaves_are_counted(tmp_path: Path) -> None:
    data = {"clients": MAX_LEAVES + 5, "train_per_class": 1, "test_per_class": 5}
    run = hansa.train(config(tmp_path, data=data, rounds=1, participation={}))
    text = of_run([run]).read_text()
    svg = text[text.index('aria-label="The federation"') :]
    svg = svg[svg.index("<svg") : svg.index("</svg>")]
    assert svg.count("<rect") == 1 + MAX_LEAVES
    assert ">6 more</text>" in svg
    assert ">answered 6 of 6</text>" in svg
    assert svg.count(">answered 1 of 1</text>") == MAX_LEAVES - 1


def test_a_run_s_page_names_its_bundle_and_one_without_does_not(tmp_path: Path) -> None:
    run = hansa.train(config(tmp_path, rounds=1, participation={}))
    digest = json.loads((run.path / "summary.json").read_text())["bundle"]
    assert f"<td>{digest}</td>" in of_run([run]).read_text()
    local = hansa.train(config(tmp_path, rounds=1, method={"name": "local"}))
    assert "Lineage of the bundle" not in of_run([local]).read_text()
