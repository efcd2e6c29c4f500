import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes

import hansa
from hansa.report import report
from hansa.report.matrices import heatmap
from hansa.report.plots import dots, lines
from hansa.report.sizes import size
from support import config


def page_of(tmp_path: Path, *methods: str) -> str:
    runs = [hansa.train(config(tmp_path, method={"name": method}, rounds=2)) for method in methods]
    return report(runs).read_text()


def test_a_page_compares_runs_and_needs_nothing_from_elsewhere(tmp_path) -> None:
    text = page_of(tmp_path, "fedavg", "fedselect")
    assert "<title>Hansa: fedavg, fedselect</title>" in text
    titles = re.findall(r'aria-label="([^"]*)"', text)
    assert titles == [
        "Test accuracy over rounds",
        "Bytes over rounds",
        "Personal share of every layer, fedselect",
        "Test accuracy of every client",
        "Every model on every client&#39;s data, fedselect",
        "Overlap of the clients&#39; masks, fedselect",
    ]
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert "<script" not in text


def test_a_page_shows_the_run_s_numbers(tmp_path) -> None:
    run = hansa.train(config(tmp_path, rounds=2))
    text = report([run]).read_text()
    accuracy = run.history.summary()["metrics"]["accuracy"]
    for key in ("mean", "std", "worst_tenth"):
        assert f"<td>{100 * accuracy[key]:.1f} %</td>" in text
    assert f"<td>{size(run.history.summary()['bytes']['up'])}</td>" in text
    assert run.checkpoint["data"][:16] in text


def test_uploads_as_papers_count_them_are_shown_where_they_are_sparse(tmp_path) -> None:
    assert "up as CSR" not in page_of(tmp_path, "fedavg", "fedselect")
    model = {"options": {"hidden": [64, 64]}}
    run = hansa.train(config(tmp_path, method={"name": "zerofl"}, rounds=1, model=model))
    text = report([run]).read_text()
    assert '<th scope="col">up as CSR</th>' in text
    assert f"<td>{size(run.history.summary()['bytes']['csr'])}</td>" in text


def test_clients_that_were_absent_are_counted(tmp_path) -> None:
    rules = {"fraction": 1.0, "failure_rate": 0.5}
    run = hansa.train(config(tmp_path, rounds=3, participation=rules))
    fates = run.history.table("ledger")["fate"].to_pylist()
    text = report([run]).read_text()
    row = f"<td>12</td><td>{fates.count('ok')}</td><td>0</td><td>{fates.count('failed')}</td>"
    assert row in text
    assert "Clients that were late or failed" in text
    whole = hansa.train(config(tmp_path, rounds=1, participation={}))
    assert "Clients that were late or failed" not in report([whole]).read_text()


def test_two_runs_of_one_method_are_told_apart(tmp_path) -> None:
    text = page_of(tmp_path, "fedavg", "fedavg")
    assert "fedavg (t-seed0)" in text
    assert "fedavg (t-seed0-2)" in text


def test_runs_of_one_name_in_two_folders_are_told_apart(tmp_path) -> None:
    runs = [hansa.train(config(tmp_path / name, rounds=1)) for name in ("a", "b")]
    text = report(runs).read_text()
    assert "<title>Hansa: fedselect (1), fedselect (2)</title>" in text


def test_a_run_without_test_data_is_reported(tmp_path) -> None:
    data = {"clients": 3, "test": 0.0}
    text = report([hansa.train(config(tmp_path, data=data, rounds=1))]).read_text()
    assert "digits, 3 clients" in text


def test_what_a_user_wrote_is_escaped(tmp_path) -> None:
    run = hansa.train(config(tmp_path, rounds=1))
    object.__setattr__(run.config, "output", "<script>alert(1)</script>")
    assert "<script>" not in report([run]).read_text()


def test_a_run_without_a_round_is_refused(tmp_path) -> None:
    run = hansa.Run.create(hansa.train(config(tmp_path, rounds=1)).config)
    with pytest.raises(hansa.InputError, match="without a whole round"):
        report([run])


def test_a_page_that_cannot_be_written_is_named(tmp_path) -> None:
    run = hansa.train(config(tmp_path, rounds=1))
    (tmp_path / "file").write_text("")
    with pytest.raises(hansa.InputError, match="no place to write"):
        report([run], tmp_path / "file" / "page.html")


def test_plots_are_xml_with_readable_text_in_the_page_s_colour() -> None:
    line = lines({"a < b": [(1, 0.5), (2, 0.7)]}, title="T & U", x="round", y="accuracy")
    dot = dots({"one": {"c0": 0.5}, "two": {"c0": 0.6, "c1": 1.0}}, title="V", x="a", y="")
    for svg in (line, dot):
        texts = [node.text for node in ElementTree.fromstring(svg).iter() if node.text]  # noqa: S314
        assert any("round" in text or "c1" in text for text in texts)
        assert "currentColor" in svg
        assert "#010203" not in svg
    assert "a &lt; b" in line


def test_the_same_plot_is_the_same_text() -> None:
    series = {"a": [(1, 0.5), (2, 0.7)]}
    options = {"title": "T", "x": "round", "y": "accuracy"}
    assert lines(series, **options) == lines(series, **options)


@pytest.mark.parametrize(
    ("num", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (2_500_000, "2.50 MB")]
)
def test_sizes_are_decimal(num: int, text: str) -> None:
    assert size(num) == text


def test_a_size_beyond_megabytes_is_in_gigabytes() -> None:
    assert size(3.2e12) == "3200.00 GB"


def test_matrices_hold_the_numbers_of_the_run(tmp_path) -> None:
    run = hansa.train(config(tmp_path, rounds=2))
    text = report([run]).read_text()
    crossed = run.history.pairs("accuracy")
    assert len(crossed) == 16
    svg = text[text.index("Every model on every client") :]
    shown = re.findall(r">(\d+)</text>", svg[: svg.index("</svg>")])
    assert {f"{100 * value:.0f}" for value in crossed.values()} <= set(shown)


def test_a_heat_map_draws_gaps_and_many_rows() -> None:
    few = heatmap({("a", "b"): 0.25}, title="t", x="x", y="y")
    assert ">25</text>" in few
    many = {(f"c{k:02}", f"c{i:02}"): 0.5 for k in range(20) for i in range(20)}
    text = heatmap(many, title="t", x="x", y="y")
    assert text.count(">50</text>") == 0
    assert "<image" not in text


def test_one_round_is_one_tick() -> None:
    texts = re.findall(r">([^<>]+)</text>", lines({"a": [(5, 1.0)]}, title="t", x="round", y="y"))
    assert "5" in texts
    assert not [text for text in texts if text.startswith(("4.", "5."))]


def test_lines_differ_in_more_than_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, str, str]] = []
    plain = Axes.plot

    def noted(axes: Axes, *args: object, **style: str) -> object:
        drawn.append((style["color"], style["marker"], style["linestyle"]))
        return plain(axes, *args, **style)

    monkeypatch.setattr(Axes, "plot", noted)
    lines({f"run {k}": [(0, k), (1, k)] for k in range(24)}, title="t", x="x", y="y")
    colours, markers, dashes = zip(*drawn, strict=True)
    assert len(set(zip(colours, markers, strict=True))) == 24
    assert len(set(zip(colours, dashes, strict=True))) == 24
    neighbours = [(first, second) for first, second in itertools.pairwise(drawn)]
    assert all(first[1] != second[1] for first, second in neighbours), "told apart without colour"


def test_the_density_of_sparse_training_is_drawn(tmp_path) -> None:
    model = {"options": {"hidden": [64, 64]}}
    method = {"name": "zerofl", "sparsity": 0.9}
    run = hansa.train(config(tmp_path, method=method, rounds=2, model=model))
    text = report([run]).read_text()
    assert "Weights that are not zero" in re.findall(r'aria-label="([^"]*)"', text)


def test_entries_that_nobody_shares_are_drawn(tmp_path) -> None:
    method = {"name": "fedselect", "rate": 1.0, "limit": 1.0}
    run = hansa.train(config(tmp_path, rounds=3, participation={}, method=method))
    assert "Entries that nobody shared, fedselect" in report([run]).read_text()
    pruned = hansa.train(config(tmp_path, rounds=2, method={"name": "lotteryfl"}))
    assert "Pruned share of every layer, lotteryfl" in report([pruned]).read_text()
