import __future__

import ast
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from hansa.data import bundled_text
from hansa.data.bundled_text import KINDS, available, bundled
from hansa.errors import InputError

# What no distribution of CPython or wheel of a dependency leaves out.
SURE = ("docstrings", "names", "tables", "code-net", "code-numerics")


def library(monkeypatch: pytest.MonkeyPatch, **folders: Path) -> None:
    """Let the installation be somewhere else."""
    real = sysconfig.get_path
    monkeypatch.setattr(
        bundled_text.sysconfig,
        "get_path",
        lambda name: str(folders[name]) if name in folders else real(name),
    )


def test_what_every_installation_has_is_there() -> None:
    assert set(SURE) <= set(available()) <= set(KINDS)
    assert len(set(KINDS)) == len(KINDS)


@pytest.mark.parametrize("kind", available())
def test_a_kind_holds_enough_text_to_train_on(kind: str) -> None:
    text = bundled(kind, most=150_000)
    assert len(text) >= 150_000
    assert "\ufffd" not in text or kind.startswith("code-")
    text.encode()  # no half characters either


def test_kinds_are_other_texts() -> None:
    lines = {kind: set(bundled(kind, most=150_000).splitlines()) for kind in available()}
    for first in lines:
        for second in lines:
            shared = len(lines[first] & lines[second]) / len(lines[first])
            assert first == second or shared < 0.3, (first, second)


def test_less_of_a_kind_is_the_beginning_of_more() -> None:
    less, more = bundled("code-net", most=100), bundled("code-net", most=60_000)
    assert more.startswith(less)
    assert 100 <= len(less) < len(more) < len(bundled("code-net"))


def test_another_process_reads_the_same_text() -> None:
    program = (
        "import hashlib; from hansa.data.bundled_text import bundled;"
        "print([hashlib.sha256(bundled(k, most=50_000).encode()).hexdigest()"
        " for k in ('licences', 'docstrings', 'tables')])"
    )
    answers = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) > 3 * 64


def test_files_come_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(monkeypatch, include=tmp_path)
    (tmp_path / "cpython").mkdir()
    for name, text in (("b.h", "bee"), ("a.h", "ay"), ("cpython/c.h", "sea"), ("d.c", "dee")):
        (tmp_path / name).write_text(text + "\n")
    assert bundled("headers") == "ay\n\nbee\n\nsea"


def test_tests_and_broken_files_are_no_part_of_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(monkeypatch, stdlib=tmp_path)
    for folder in ("tkinter/test", "idlelib/idle_test", "idlelib/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "some.py").write_text(folder)
    (tmp_path / "tkinter" / "latin.py").write_bytes(b"\xe4")
    (tmp_path / "tkinter" / "empty.py").write_text("\n")
    assert bundled("code-gui") == "idlelib/deep"


def test_docstrings_come_cleaned_and_in_the_order_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(monkeypatch, stdlib=tmp_path)
    (tmp_path / "one.py").write_text(
        '"""Module."""\n'
        "class A:\n"
        '    """Class.\n\n    More.\n    """\n'
        "    async def first(self):\n"
        '        """First."""\n'
        "def second():\n"
        '    "Second."\n'
        "    x = 'no docstring'\n"
    )
    assert bundled("docstrings") == "Module.\n\nClass.\n\nMore.\n\nFirst.\n\nSecond."


def test_docstrings_of_this_python_are_those_of_its_modules() -> None:
    first = ast.parse(Path(__future__.__file__).read_text("utf-8"))
    assert bundled("docstrings", most=100).startswith(str(ast.get_docstring(first)))


def test_no_paragraph_of_a_licence_comes_twice() -> None:
    if "licences" not in available():
        pytest.skip("the installed packages bring no licence texts")
    paragraphs = [" ".join(p.split()) for p in bundled("licences").split("\n\n") if p.split()]
    assert len(paragraphs) == len(set(paragraphs)) > 100


def test_names_are_those_of_unicode() -> None:
    lines = bundled("names").split("\n")
    assert lines[0] == "U+0020 space"
    assert "U+00DF latin small letter sharp s" in lines
    assert len(lines) == len(set(lines))


def test_a_kind_that_an_installation_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdlib = Path(sysconfig.get_path("stdlib"))
    shutil.copytree(stdlib / "encodings", tmp_path / "encodings")
    library(monkeypatch, stdlib=tmp_path, include=tmp_path / "nothing")
    assert {"code-gui", "code-tests", "code-net", "headers"} & set(available()) == set()
    assert "tables" in available()
    with pytest.raises(InputError) as caught:
        bundled("code-gui", "nodes.a.text")
    assert caught.value.key == "nodes.a.text"
    assert "tkinter, idlelib, turtledemo" in str(caught.value)
    assert caught.value.allowed == f"one of {', '.join(available())}"


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="text: found an unknown kind 'poems'; allowed: one of"):
        bundled("poems")
