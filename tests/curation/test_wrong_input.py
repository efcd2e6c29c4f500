"""Wrong input of a curation, through the real command: status 2, and one line with the key."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tomli_w
import torch
from small import CLIENTS, config, records, write

import hansa
from hansa.bundle import read_bundle
from hansa.cli import main

Values = dict[str, Any]
Spoil = Callable[[Values, Path], None]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(values: Values, *arguments: str, name: str = "curate") -> tuple[int, str, str]:
        file = tmp_path / "config.toml"
        file.write_text(tomli_w.dumps(values))
        monkeypatch.setattr(sys, "argv", ["hansa", name, str(file), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def put(key: str, value: Any) -> Spoil:
    """Return what sets a dotted key."""

    def spoil(values: Values, tmp_path: Path) -> None:
        *way, last = key.split(".")
        for part in way:
            values = values.setdefault(part, {})
        values[last] = value

    return spoil


def anchors(*held: dict[str, Any], num: int = 12) -> Spoil:
    def spoil(values: Values, tmp_path: Path) -> None:
        write(tmp_path / "data" / "anchors.jsonl", [*records(num, "anchor"), *held])

    return spoil


def without(key: str) -> Spoil:
    def spoil(values: Values, tmp_path: Path) -> None:
        *way, last = key.split(".")
        for part in way:
            values = values[part]
        del values[last]

    return spoil


def validation(held: list[dict[str, Any]]) -> Spoil:
    def spoil(values: Values, tmp_path: Path) -> None:
        values["curation"]["validation"] = write(tmp_path / "data" / "validation.jsonl", held)

    return spoil


def alien(values: Values, tmp_path: Path) -> None:
    values["nodes"]["b"]["text"] = write(tmp_path / "data" / "b.jsonl", records(12, "b", ["new"]))
    values["curation"]["threshold"]["per_domain"] = True


def broken(values: Values, tmp_path: Path) -> None:
    with (tmp_path / "data" / "a.jsonl").open("a") as file:
        file.write('{"question": "half\n')


def emptied(values: Values, tmp_path: Path) -> None:
    held = records(10, "a")
    for record in held[1:]:
        record["answer"] = " "
    write(tmp_path / "data" / "a.jsonl", held)


def silenced(values: Values, tmp_path: Path) -> None:
    held = records(10, "a")
    for record in held:
        record["answer"] = "x"
    write(tmp_path / "data" / "a.jsonl", held)
    values["curation"] |= {"by": ["length"], "threshold": {"kind": "anchor_mean"}}


TOO_LONG = {"id": "l", "question": "q", "answer": "x" * 40, "domain": "x"}
NO_ANSWER = {"id": "e", "question": "q", "answer": "", "domain": "x"}
WRONG: dict[str, tuple[Spoil, str]] = {
    "few anchors": (anchors(num=4), r"curation\.anchors: found 4 anchors; allowed: 5 or more"),
    "no anchors": (without("curation.anchors"), r"curation: found .*; allowed: anchors"),
    "anchors that are not there": (
        put("curation.anchors", "jsonl:/nowhere.jsonl"),
        r"curation\.anchors: found no JSON lines at",
    ),
    "an anchor too long": (anchors(TOO_LONG), r"curation\.anchors: found .*1 long"),
    "an anchor without an answer": (anchors(NO_ANSWER), r"curation\.anchors: found .*1 empty"),
    "a domain without anchors": (alien, r"curation\.anchors: found \d+ samples of b in a domain"),
    "more anchors than there are": (
        put("curation.threshold.anchors", 50),
        r"curation\.threshold\.anchors: found 50; allowed: at most the 12",
    ),
    "gradients without validation": (
        put("curation.scores", ["tracin"]),
        r"curation: found .*; allowed: validation",
    ),
    "anchors that vouch for themselves": (
        validation(records(12, "anchor")[:2]),
        r"curation\.validation: found 2 of the anchors",
    ),
    "validation without an answer": (
        validation([NO_ANSWER]),
        r"curation\.validation: found .*1 empty",
    ),
    "a score that is none": (put("curation.scores", ["ifd", "bleu"]), r"curation\.scores: found"),
    "a score twice": (put("curation.scores", ["ifd", "ifd"]), r"curation\.scores: found"),
    "no score": (put("curation.scores", []), r"curation: found .*; allowed: at least one"),
    "by what is not scored": (put("curation.by", ["ira"]), r"curation: found .*'ira'"),
    "a rate of one": (put("curation.threshold.rate", 1.0), r"curation\.threshold\.rate: found 1"),
    "a key that is none": (put("curation.rate", 0.1), r"curation\.rate: found an unknown key"),
    "a kind that is none": (
        put("curation.threshold.kind", "median"),
        r"curation\.threshold\.kind: found 'median'",
    ),
    "no answers": (without("text.answers"), r"curation: found .*without \[text\.answers\]"),
    "no curation": (without("curation"), r"curation: found nothing; allowed: a table"),
    "privacy": (
        put("nodes.a.privacy", {"noise": 1.0}),
        r"nodes\.a\.privacy: found privacy beside \[curation\]",
    ),
    "masks and scores anew": (
        put("curation", {"masks": "x", "every": 2}),
        r"curation: found .*; allowed: masks or every",
    ),
    "masks to make masks": (put("curation.masks", "x"), r"curation\.masks: found .*made here"),
    "a line that is no JSON": (broken, r"nodes\.a\.text: found line \d+ of .*which is no JSON"),
    "answers that are empty": (
        emptied,
        r"nodes\.a\.text: found \d examples for train \(\d empty were left out\)",
    ),
    "a client that is silenced": (
        silenced,
        r"curation\.guard\.client: found client a keeps 0 of 9 samples",
    ),
    "soft with a mean": (
        put(
            "curation", {"soft": True, "threshold": {"kind": "anchor_mean"}, "anchors": "made:lab"}
        ),
        r"curation: found .*; allowed: soft with",
    ),
    "epsilon of none": (put("curation.epsilon", 0.0), r"curation\.epsilon: found 0"),
    "a prompt without a place": (
        put("text.answers.prompt", "Answer:"),
        r"text\.answers\.prompt: found 'Answer:'",
    ),
    "a corruption that is none": (
        put("text.answers.corruption", {"shares": 0.5, "kinds": ["typo"]}),
        r"text\.answers\.corruption\.kinds\.0: found 'typo'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_ends_with_one_line(
    name: str, command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    values = config(tmp_path)
    spoil, message = WRONG[name]
    spoil(values, tmp_path)
    status, out, err = command(values)
    assert (status, out) == (2, "")
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert re.match(rf"hansa: {message}", lines[0]), lines[0]
    assert not list(tmp_path.rglob("manifest.json"))


def test_steps_that_are_none_are_refused(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, _, err = command(config(tmp_path), "--until", "end")
    assert status == 2
    assert err.startswith("hansa: --until: found 'end'; allowed: score, threshold")
    assert not (tmp_path / "runs").exists()


def test_a_model_that_scores_no_numbers_is_named(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    values = config(tmp_path)
    run = hansa.train({**values, "curation": None, "rounds": 1})
    folder = run.path / "bundle"
    weights = {n: torch.full_like(t, torch.inf) for n, t in read_bundle(folder).weights.items()}
    (folder / "weights.safetensors").write_bytes(safetensors.torch.save(weights))
    values["model"]["bundle"] = str(folder)
    status, _, err = command(values)
    assert status == 2
    assert re.match(r"hansa: .*bundle|hansa: curation\.anchors: found a score", err), err
    assert len(err.splitlines()) == 1


def test_a_run_without_anchors_keeps_the_share_that_is_asked_for(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    values = config(tmp_path)
    values["curation"] = {"scores": ["ifd"], "threshold": {"kind": "share", "share": 0.5}}
    status, out, err = command(values, "--json", "--until", "filter")
    assert (status, err) == (0, "")
    assert '"kept": 5' in out
    assert all((tmp_path / "runs" / "t-seed0-curation" / "clients" / n).is_dir() for n in CLIENTS)
