"""Every command of the documentation is run, or named with the reason why it is not."""

import argparse
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer

from documents import PAGES, ROOT, commands, quoted
from hansa import cli
from scenes import ELSEWHERE, EXCEPTED, SCENES

FENCED = {" ".join(command.split()): page for page in PAGES for command in commands(page)}
QUOTED = {" ".join(command.split()): page for page in PAGES for command in quoted(page)}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Hold PyTorch to one thread: several wait for one another where tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", SCENES)
@pytest.mark.filterwarnings("ignore")  # of tiny runs: NaN in means of one, unused anchors
def test_commands_do_what_they_are_shown_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = SCENES[name]
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    scene.prepare(tmp_path)
    for command, less in scene.commands.items():
        monkeypatch.setattr(sys, "argv", [*shlex.split(command), *less])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        assert ended.value.code == scene.ends.get(command, 0), f"{command}: {told.err}"
        assert bool(told.out) != (command in scene.silent), command


def test_every_command_is_run_or_excepted_with_a_reason() -> None:
    run = {command for scene in SCENES.values() for command in scene.commands}
    unknown = {
        f"{page.relative_to(ROOT)}: {command}"
        for command, page in FENCED.items()
        if command not in run | ELSEWHERE.keys() and not command.startswith(tuple(EXCEPTED))
    }
    assert unknown == set()


def test_no_command_is_listed_that_is_no_longer_shown() -> None:
    run = {command for scene in SCENES.values() for command in scene.commands}
    assert {*run, *ELSEWHERE} - FENCED.keys() == set()
    shown = {**FENCED, **QUOTED}
    assert [start for start in EXCEPTED if not any(c.startswith(start) for c in shown)] == []
    assert [test for test in ELSEWHERE.values() if not _is_there(test)] == []


def _is_there(test: str) -> bool:
    path, _, name = test.partition("::")
    return f"\ndef {name}(" in (ROOT / path).read_text()


@pytest.fixture(scope="module")
def parser() -> object:
    """The command line, whose commands do nothing."""
    command = typer.main.get_command(cli.app)
    todo = [command]
    while todo:
        one = todo.pop()
        if one.callback is not None:
            one.callback = _nothing
        todo += getattr(one, "commands", {}).values()
    return command


def _nothing(**_: object) -> None:
    pass


@pytest.mark.parametrize("command", sorted(c for c in {**FENCED, **QUOTED} if c[:6] == "hansa "))
def test_the_command_line_knows_every_option(command: str, parser, capsys) -> None:
    _, *words = shlex.split(command)
    try:
        parser.main(words, standalone_mode=False)
    except cli._UsageError as error:
        # In a sentence a command may be named without what it needs.
        told = error.format_message()
        named = command in QUOTED and command not in FENCED
        lacks = told.startswith(("Missing", "Usage:"))
        assert (named, lacks) == (True, True), f"{command}: {told}"


class _ParsedError(Exception):
    """The options of a benchmark were read."""


@pytest.mark.parametrize("command", sorted(c for c in {**FENCED, **QUOTED} if "benchmarks/" in c))
def test_every_benchmark_knows_its_options(command: str, monkeypatch) -> None:
    real = argparse.ArgumentParser.parse_args

    def parse(self, *given, **more):
        real(self, *given, **more)
        raise _ParsedError

    _, path, *words = shlex.split(command)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [path, *words])
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    with pytest.raises(_ParsedError):
        runpy.run_path(str(ROOT / path), run_name="__main__")


def test_every_extra_and_target_exists() -> None:
    shown = {**FENCED, **QUOTED}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {e for c in shown for e in re.findall(r"\[(\w+)\]", c) if c.startswith("pip ")}
    assert named
    assert named <= extras["optional-dependencies"].keys()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {word for c in shown if c.startswith("make ") for word in c.split()[1:]}
    assert asked
    assert asked <= targets
