"""The curate stage and what a training run makes of it: steps, masks, and going on."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from small import ALL, CLIENTS, GRADIENTS, config, curation, records, write

import hansa
from hansa.config import load
from hansa.curate import Curated, curate
from hansa.curation.federated import Cohort
from hansa.curation.masks import read_kept, read_samples
from hansa.data.examples import STATS, read_examples
from hansa.errors import InputError
from hansa.training import prepare

Values = dict[str, Any]
STAGE = sys.modules["hansa.curate"]  # `hansa.curate` is its function


class Killed(BaseException):
    """As a kill would end it: what catches exceptions does not catch it."""


@pytest.fixture
def values(tmp_path: Path) -> Values:
    return config(tmp_path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count how often clients were asked."""
    found: Counter[str] = Counter()
    for name in ("score", "filter"):
        monkeypatch.setattr(Cohort, name, _counting(name, getattr(Cohort, name), found))
    return found


def _counting(name: str, of: Any, found: Counter[str]) -> Any:
    def counted(self: Cohort, *given: Any) -> Any:
        found[name] += 1
        return of(self, *given)

    return counted


def changed(values: Values, **options: Any) -> Values:
    return {**values, "curation": {**values["curation"], **options}}


def manifest(made: Curated) -> dict[str, Any]:
    return json.loads((made.path / "manifest.json").read_text())


def files(path: Path) -> dict[str, str]:
    """Return the digest of each file that a curation is about."""
    found = [path / "manifest.json", *(path / "clients").rglob("*.*")]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def outcome(run: hansa.Run) -> str:
    return hansa.read_bundle(run.path / "bundle").digest


# Steps.


def test_a_curation_from_start_to_report(values: Values, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in (tmp_path / "data").iterdir()}
    made = curate(values)
    assert made.report is not None
    assert made.path == tmp_path / "runs" / "t-seed0-curation"
    about = manifest(made)
    for name in CLIENTS:
        table = read_samples(made.path / "clients" / name)
        examples = read_examples(values["nodes"][name]["text"], "k")
        by_id = {example.id: example for example in examples}
        assert set(table["id"].to_pylist()) < set(by_id)  # all but those of the test
        assert len(table) == round(0.9 * len(examples))
        # What a client told is what stands in its file.
        counts = Counter(zip(table["domain"].to_pylist(), table["keep"].to_pylist(), strict=True))
        for domain in "xy":
            row = about["counts"][name][domain]
            assert row["kept"] == counts[domain, True]
            assert row["samples"] == counts[domain, True] + counts[domain, False]
            assert row["not_scored"] == 0
        kept = read_examples(f"jsonl:{made.path / 'clients' / name / 'kept.jsonl'}", "k")
        assert [example.id for example in kept] == [
            id_
            for id_, keep in zip(*(table[c].to_pylist() for c in ("id", "keep")), strict=True)
            if keep
        ]
        for example in kept:
            assert example.question == by_id[example.id].question
            assert example.answer == by_id[example.id].answer
            assert set(example.extra) == {STATS}
            stats = example.extra[STATS]
            assert set(stats) == {"conditional_loss", "length", "hansa_keep"}
            assert stats["length"] == len(example.answer)
            assert stats["hansa_keep"] == 1
        every = read_examples(f"jsonl:{made.path / 'clients' / name / 'samples.jsonl'}", "k")
        assert [example.id for example in every] == table["id"].to_pylist()
        level = about["thresholds"]["all"]
        for score, keep in zip(
            table["score.conditional_loss"].to_pylist(), table["keep"].to_pylist(), strict=True
        ):
            assert keep == (-score >= level)
    assert {p: p.read_bytes() for p in (tmp_path / "data").iterdir()} == before
    assert about["false_rejection"]["all"]["rank"] == 5  # of 12 at 0.4
    assert 0 < made.summary["clients"]["a"]["share"] < 1


def test_what_is_done_is_not_done_again(values: Values, calls: Counter[str]) -> None:
    first = curate(values)
    found = files(first.path)
    assert calls == {"score": 1, "filter": 1}
    assert files(curate(values).path) == found
    assert calls == {"score": 1, "filter": 1}
    curate(changed(values, threshold={"rate": 0.2}))
    assert calls == {"score": 1, "filter": 2}
    assert files(first.path) != found
    assert files(curate(values).path) == found
    assert calls == {"score": 1, "filter": 3}
    curate(changed(values, scores=["conditional_loss"]))
    assert calls == {"score": 2, "filter": 4}
    curate(changed(values, scores=["conditional_loss"], guard={"client": 0.05}))
    assert calls == {"score": 2, "filter": 4}


@pytest.mark.parametrize("what", ["answer", "domain", "anchor", "tree", "bundle"])
def test_what_scores_stand_on_is_scored_again(
    values: Values, calls: Counter[str], tmp_path: Path, what: str
) -> None:
    out = tmp_path / "out"
    curate(values, out=out)
    held = records(10, "a")
    if what == "answer":
        held[3]["answer"] = "another"
    if what == "domain":
        held = records(10, "a", "y")
    write(tmp_path / "data" / "a.jsonl", held)
    if what == "anchor":
        changed_ = records(12, "anchor")
        changed_[2]["answer"] = "another"
        write(tmp_path / "data" / "anchors.jsonl", changed_)
    if what == "tree":
        for name in CLIENTS[:2]:
            values["nodes"][name]["parent"] = "ward"
        values["nodes"]["ward"] = {}
    if what == "bundle":
        run = hansa.train({**values, "curation": None, "rounds": 1})
        values["model"] = {**values["model"], "bundle": str(run.path / "bundle")}
    found = curate(values, out=out)
    assert calls == {"score": 2, "filter": 2}
    fresh = curate(values, out=tmp_path / "fresh")
    assert files(found.path) == files(fresh.path)


@pytest.mark.parametrize("at", ["anchor_scores", "score", "threshold", "filter", "write", "jsonl"])
def test_a_kill_leaves_what_the_same_call_goes_on_from(
    values: Values, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: str
) -> None:
    whole = curate(values, out=tmp_path / "whole")
    first = changed(values, threshold={"rate": 0.2})
    curate(first, out=tmp_path / "broken")  # so that there is something older to mix up
    turns = iter(range(100))

    def killed(*given: Any, **named: Any) -> None:
        if at not in ("write", "jsonl") or next(turns) == 1:  # the second client's
            raise Killed
        return real(*given, **named)

    with monkeypatch.context() as patch:
        if at in ("write", "jsonl"):
            name = {"write": "write_samples", "jsonl": "write_jsonl"}[at]
            real = getattr(STAGE, name)
            patch.setattr(STAGE, name, killed)
        else:
            patch.setattr(Cohort, at, killed)
        if at in ("anchor_scores", "score"):
            (tmp_path / "broken" / "steps.json").write_text("{}")
        with pytest.raises(Killed):
            curate(values, out=tmp_path / "broken")
    if at in ("write", "jsonl"):  # half of the masks are of another threshold
        with pytest.raises(InputError, match=r"^curation\.masks: found .*without masks"):
            read_kept(tmp_path / "broken")
    again = curate(values, out=tmp_path / "broken")
    assert manifest(again) == manifest(whole)
    assert files(again.path) == files(whole.path)


def test_steps_end_where_they_are_told_to(values: Values) -> None:
    made = curate(values, until="score")
    assert made.report is None
    assert "clients" not in made.summary
    made = curate(values, until="threshold")
    assert set(made.summary["clients"]) == set(CLIENTS)
    for name in ("manifest.json", "clients", "report.html"):
        assert not (made.path / name).exists()
    with pytest.raises(InputError, match=r"^curation\.masks: found .*without masks"):
        read_kept(made.path)
    curate(values, until="filter")
    assert set(read_kept(made.path).clients) == set(CLIENTS)
    assert not (made.path / "report.html").exists()


def test_every_score_is_written(values: Values, tmp_path: Path) -> None:
    validation = write(tmp_path / "data" / "validation.jsonl", records(4, "val"))
    made = curate(
        changed(
            values,
            scores=[*ALL, *GRADIENTS],
            by=["conditional_loss", "gradient_cosine"],
            validation=validation,
            sketch=16,
            soft=True,
        )
    )
    table = read_samples(made.path / "clients" / "a")
    for name in (*ALL, *GRADIENTS):
        column = torch.tensor(table[f"score.{name}"].to_pylist())
        assert column.isfinite().all(), name
        assert len(column.unique()) > 1 or name == "duplicates", name
    weights = torch.tensor(table["weights"].to_pylist())
    assert ((weights > 0) & (weights <= 1)).all()
    line = json.loads((made.path / "clients" / "a" / "samples.jsonl").read_text().splitlines()[0])
    assert {"ifd_score", "llm_perplexity", "hansa_keep", "hansa_weight"} < set(line[STATS])


# Floors.


def far(values: Values, tmp_path: Path, name: str) -> Values:
    """Let a client hold nothing that scores as anchors do: its answers are of one rare byte."""
    held = records(12, name)
    for k, record in enumerate(held):
        record["answer"] = "\x01" * (4 + k % 3)
    values["nodes"][name]["text"] = write(tmp_path / "data" / f"{name}.jsonl", held)
    run = hansa.train(
        {
            **values,
            "curation": None,
            "rounds": 4,
            "nodes": {"a": values["nodes"]["a"], "b": {"text": values["curation"]["anchors"]}},
        }
    )
    values["model"] = {**values["model"], "bundle": str(run.path / "bundle")}
    return values


def test_a_client_that_is_silenced_stops_the_stage(
    values: Values, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = far(values, tmp_path, "c")
    with pytest.raises(InputError, match=r"^curation\.guard\.client: found client c keeps 0 of"):
        curate(values)
    path = tmp_path / "runs" / "t-seed0-curation"
    assert not (path / "manifest.json").exists()
    assert not (path / "clients").exists()
    caplog.clear()
    curate(values, until="threshold")
    assert "client c keeps 0 of" in caplog.text
    made = curate(changed(values, guard={"action": "warn", "domain": 0}))
    assert made.summary["clients"]["c"]["kept"] == 0
    # What the stage let pass, training cannot use.
    with pytest.raises(InputError, match=r"^curation: found no sample of c that is kept"):
        hansa.train(changed(values, masks=str(made.path)))


def test_a_domain_that_is_silenced_stops_the_stage(values: Values, tmp_path: Path) -> None:
    for name in CLIENTS:
        held = records(12, name)
        for record in held[1::2]:  # of domain y
            record["answer"] = "a far, far longer answer"
        write(tmp_path / "data" / f"{name}.jsonl", held)
    asked = changed(values, by=["length"], threshold={"kind": "anchor_mean"}, guard={"domain": 0.9})
    with pytest.raises(
        InputError, match=r"^curation\.guard\.domain: found domain 'x' keeps \d+ of"
    ):
        curate(asked)
    made = curate(changed(asked, by=["length"], guard={"domain": 0.0}))
    rows = made.summary["clients"]["a"]["domains"]
    assert rows["y"]["kept"] == rows["y"]["samples"]


# Training on what is kept.


def test_training_takes_the_masks_of_a_folder(values: Values, tmp_path: Path) -> None:
    made = curate(values)
    run = hansa.train(changed(values, masks=str(made.path)))
    card = hansa.read_bundle(run.path / "bundle").card
    assert card["metrics"]["curation"]["digest"] == manifest(made)["digest"]
    # The same training on files that hold nothing else; tests take no part in it.
    plain: Values = {**values, "curation": None, "text": {**values["text"], "test": 0.0}}
    plain["nodes"] = {
        name: {"text": f"jsonl:{made.path / 'clients' / name / 'kept.jsonl'}"} for name in CLIENTS
    }
    other = hansa.train(plain)
    first, second = (hansa.read_bundle(r.path / "bundle").weights for r in (run, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    everything = hansa.train({**values, "curation": None})
    third = hansa.read_bundle(everything.path / "bundle").weights
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_masks_alone_need_nothing_else(values: Values) -> None:
    """The threshold was set when they were made, so nobody needs anchors any more."""
    made = curate(values)
    whole = hansa.train(changed(values, masks=str(made.path)))
    found = hansa.train({**values, "curation": {"masks": str(made.path)}})
    first, second = (hansa.read_bundle(r.path / "bundle").weights for r in (whole, found))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_masks_of_other_data_are_refused(values: Values, tmp_path: Path) -> None:
    made = curate(values)
    held = records(10, "a")
    held[3]["answer"] = "another"
    write(tmp_path / "data" / "a.jsonl", held)
    with pytest.raises(InputError, match=r"^curation\.masks: found masks of data"):
        hansa.train(changed(values, masks=str(made.path)))


@pytest.mark.parametrize("harm", ["manifest", "parquet", "short", "none"])
def test_masks_that_are_damaged_are_refused(values: Values, tmp_path: Path, harm: str) -> None:
    made = curate(values)
    file = made.path / "clients" / "a" / "samples.parquet"
    if harm == "manifest":
        (made.path / "manifest.json").write_text("{")
    elif harm == "parquet":
        file.write_bytes(b"PAR1")
    elif harm == "short":
        pq.write_table(pq.read_table(file).slice(0, 3), file)
    else:
        file.unlink()
    with pytest.raises(InputError, match=r"masks|samples"):
        hansa.train(changed(values, masks=str(made.path)))


def test_training_curates_before_its_first_round(values: Values) -> None:
    made = curate(values)
    run, masked = hansa.train(values), hansa.train(changed(values, masks=str(made.path)))
    first, second = (hansa.read_bundle(r.path / "bundle") for r in (run, masked))
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    assert first.card["metrics"]["curation"]["digest"] == manifest(made)["digest"]
    # What the curation has sent stands beside what the rounds have.
    sent = manifest(made)["ledger"]
    held, without = (
        Counter({way: sum(r.history.table("ledger")[way].to_pylist()) for way in ("up", "down")})
        for r in (run, masked)
    )
    for way in ("up", "down"):
        assert held[way] - without[way] == sum(visit[way] for visit in sent) > 0


@pytest.mark.parametrize("options", [{"every": 2}, {"soft": True}])
def test_a_run_that_stops_goes_on_with_its_masks(
    values: Values, options: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = changed({**values, "rounds": 3}, **options)
    whole = hansa.train(values)
    places = {"record": 2, "keep_curated": 1} if "every" in options else {"record": 1}
    for name, turn in places.items():
        with monkeypatch.context() as patch:
            patch.setattr(hansa.Run, name, _killed_at(turn, getattr(hansa.Run, name)))
            with pytest.raises(Killed):
                hansa.train({**values, "name": name})
        again = hansa.train(resume=Path(values["output"]) / f"{name}-seed0")
        assert outcome(again) == outcome(whole)
        for table in ("ledger", "scores"):
            assert again.history.table(table).equals(whole.history.table(table))


def _killed_at(turn: int, real: Any) -> Any:
    turns = iter(range(100))

    def killed(*given: Any) -> None:
        if next(turns) == turn:
            raise Killed
        real(*given)

    return killed


def test_scores_made_anew_are_of_the_model_as_it_is(values: Values) -> None:
    run = hansa.train(changed({**values, "rounds": 4}, every=2))
    about = [run.curated(number) for number in (1, 3)]
    assert [kept.manifest["round"] for kept in about if kept is not None] == [0, 2]
    first, second = (kept.manifest for kept in about if kept is not None)
    assert first["model"] != second["model"]
    assert first["thresholds"] != second["thresholds"]
    assert first["data"] == second["data"]
    card = hansa.read_bundle(run.path / "bundle").card
    assert card["metrics"]["curation"]["digest"] == second["digest"]
    # Masks are of all examples, not of those that the last masks had left.
    counts = [sum(row["samples"] for row in m["counts"]["c"].values()) for m in (first, second)]
    assert counts[0] == counts[1] == 13


def test_a_run_that_is_extended_is_curated_as_a_longer_one(values: Values) -> None:
    values = changed(values, every=2)
    whole = hansa.train({**values, "rounds": 4})
    part = hansa.train({**values, "rounds": 3})
    assert outcome(hansa.train(resume=part.path, overrides=["rounds=4"])) == outcome(whole)


def test_what_training_cannot_score_by_is_refused(values: Values) -> None:
    local = {**values, "method": {"name": "local"}}
    assert hansa.train(local).round == 2  # once, by the model that everybody starts from
    for key, value in (("every", 1), ("warm_up", {"rounds": 1})):
        with pytest.raises(InputError, match=rf"^curation\.{key}: found scores by a trained model"):
            hansa.train(changed(local, **{key: value}))
    with pytest.raises(InputError, match=r"^curation\.warm_up: found a table, which training"):
        hansa.train(changed(values, warm_up={"rounds": 1}))


def test_soft_weights_count_and_nothing_is_left_out(values: Values) -> None:
    trial = prepare(load(values))
    made = curate(changed(values, soft=True))
    kept = read_kept(made.path)
    data = kept.apply(trial.data)  # type: ignore[arg-type]
    for name in CLIENTS:
        client = data.clients[name]
        assert client.count("train") == trial.data.clients[name].count("train")
        _, _, weights = client.weighted("train")
        table = read_samples(made.path / "clients" / name)
        assert weights.tolist() == pytest.approx(table["weights"].to_pylist())
        # Where the p-value reaches the rate is where the threshold lies.
        assert (weights[torch.tensor(table["keep"].to_pylist())] == 1).all()
        assert (weights[~torch.tensor(table["keep"].to_pylist())] < 1).all()
    hard, soft = (
        hansa.read_bundle(hansa.train(changed(values, soft=s)).path / "bundle").weights
        for s in (False, True)
    )
    assert not all(torch.equal(hard[n], soft[n]) for n in hard)


# Warm-up, and training to compare.


def test_gradients_are_taken_after_a_warm_up(
    values: Values, tmp_path: Path, calls: Counter[str]
) -> None:
    validation = write(tmp_path / "data" / "validation.jsonl", records(4, "val"))
    options = {"scores": ["tracin", "conditional_loss"], "validation": validation}
    warm = changed(values, **options, warm_up={"rounds": 2, "keep": [1, 2]})
    made = curate(warm)
    cold = curate(changed(values, **options), out=tmp_path / "cold")
    tables = [read_samples(m.path / "clients" / "b") for m in (made, cold)]
    assert tables[0]["score.conditional_loss"] == tables[1]["score.conditional_loss"]
    assert tables[0]["score.tracin"] != tables[1]["score.tracin"]
    found = files(made.path)
    (made.path / "steps.json").write_text("{}")
    assert files(curate(warm).path) == found


def test_training_too_compares_all_with_kept_and_clean(values: Values) -> None:
    asked = {"corruption": {"shares": 0.3, "kinds": ["noise"]}}
    values = {**values, "rounds": 1, "text": {**values["text"], "answers": asked}}
    made = curate(values, train_too=True)
    losses = made.summary["test_loss"]
    assert set(losses) == {"all", "filtered", "clean"}
    assert set(losses["all"]["clients"]) == set(CLIENTS)
    assert set(made.summary["auroc"]["conditional_loss"]) == {"noise", "all", "within"}
    assert made.summary["rules"]["everything"]["recall"] == 1
    clean = read_kept(made.path / "clean")
    examples = {name: read_samples(made.path / "clients" / name) for name in CLIENTS}
    for name in CLIENTS:
        kinds = examples[name]["kind"].to_pylist()
        assert clean.clients[name]["keep"].tolist() == [kind == "clean" for kind in kinds]
    again = curate(values, train_too=True)
    assert again.summary["test_loss"] == losses


def test_a_folder_that_is_a_file_is_refused(values: Values, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file"):
        curate(values, out=tmp_path / "file")


def test_counts_with_noise_are_told_as_such(values: Values) -> None:
    exact = curate(values)
    asked = changed(values, epsilon=0.5, guard={"action": "warn"})
    noised = curate(asked, out=exact.path.with_name("noised"))
    assert manifest(exact)["epsilon"] is None
    assert manifest(noised)["epsilon"] == 0.5
    assert manifest(exact)["counts"] != manifest(noised)["counts"]
    # Masks are of the clients' own, and no count has a say in them.
    for name in CLIENTS:
        tables = [read_kept(m.path).clients[name]["keep"] for m in (exact, noised)]
        assert torch.equal(*tables)


def test_curation_is_told_of_in_its_options(tmp_path: Path) -> None:
    again = load(load(config(tmp_path, curation=curation(tmp_path, soft=True))).as_dict())
    assert again.curation is not None
    assert again.curation.soft
