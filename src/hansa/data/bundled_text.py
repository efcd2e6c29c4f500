"""Text that a Python installation holds of itself, cut by kind, so that nothing is downloaded.

The kinds differ as the texts of real sites do: prose, code of several trades, headers, tables. What
they hold depends on the version of the interpreter and of the libraries beside it, so runs on them
compare only on one installation; the fingerprint of the data tells whether two runs had the same.
"""

import ast
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from hansa.errors import InputError

MOST = 1_000_000


def bundled(kind: str, key: str = "text", most: int = MOST) -> str:
    """Return the text of one kind, up to the end of the document that reaches ``most`` characters.

    Args:
        kind: one of ``KINDS``.
        key: the configuration key that asked for it.
        most: where to stop; what is returned for more starts with what is returned for less.

    Raises:
        InputError: an unknown kind, or one of which this installation has nothing.
    """
    if kind not in _KINDS:
        raise InputError(key, f"an unknown kind {kind!r}", f"one of {', '.join(KINDS)}")
    held, size = [], 0
    for document in _KINDS[kind][1]():
        held.append(document.strip())
        size += len(document)
        if size >= most:
            break
    if not held:
        raise InputError(
            key,
            f"the kind {kind!r}, which is cut from {_KINDS[kind][0]}; this Python installation "
            "has none",
            f"one of {', '.join(available())}",
        )
    return "\n\n".join(held)


def available() -> tuple[str, ...]:
    """Return the kinds of which this installation has any text."""
    return tuple(kind for kind, (_, cut) in _KINDS.items() if next(cut(), None) is not None)


def _manual() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    yield from (topics[name] for name in sorted(topics))


def _docstrings() -> Iterator[str]:
    for text in _files(_standard("."), "*.py"):
        yield from _docstrings_of(ast.parse(text))


def _docstrings_of(node: ast.AST) -> Iterator[str]:
    """Yield docstrings in the order of the source, which ``ast.walk`` does not keep."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        yield from _docstrings_of(child)


def _licences() -> Iterator[str]:
    """Yield licence texts; a paragraph that several packages share comes once.

    Otherwise the held-out part of the text would repeat the part a model is trained on.
    """
    known: set[str] = set()
    for package in _PACKAGES:
        try:
            files = distribution(package).files or []
        except PackageNotFoundError:
            continue
        for file in sorted(files, key=str):
            path = Path(str(file.locate()))
            if not _is_licence(str(file)) or not path.is_file():
                continue
            new = []
            for paragraph in _read(path).split("\n\n"):
                words = " ".join(paragraph.split())
                if words and words not in known:
                    known.add(words)
                    new.append(paragraph)
            if new:
                yield "\n\n".join(new)


def _is_licence(file: str) -> bool:
    name = file.rpartition("/")[2].lower()
    return ".dist-info/" in file and name.startswith(("licen", "copying", "notice"))


def _names() -> Iterator[str]:
    """Yield one line for each named character that is no Chinese or Korean syllable."""
    lines = []
    for code in range(0x20000):
        name = unicodedata.name(chr(code), "")
        if name and not name.startswith(("CJK ", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN")):
            lines.append(f"U+{code:04X} {name.lower()}")
    yield "\n".join(lines)


def _standard(*folders: str) -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return [root / folder for folder in folders]


def _package(package: str, *folders: str) -> list[Path]:
    spec = find_spec(package)  # found, not imported
    places = (spec.submodule_search_locations or []) if spec else []
    return [Path(place) / folder for place in places for folder in folders]


def _files(folders: list[Path], pattern: str) -> Iterator[str]:
    """Yield the files of folders that match, in sorted order, without tests and empty files."""
    for folder in folders:
        found = {file.relative_to(folder).as_posix(): file for file in folder.glob(pattern)}
        for name in sorted(found):
            parts = name.split("/")[:-1]
            if any(part.endswith(("test", "tests")) for part in parts) or not found[name].is_file():
                continue
            text = _read(found[name])
            if text.strip():
                yield text


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:  # some test files hold broken text on purpose
        return ""


# What a wheel of Hansa's own dependencies brings, whatever else is installed beside it.
_PACKAGES = (
    "jinja2",
    "matplotlib",
    "numpy",
    "pillow",
    "pyarrow",
    "pydantic",
    "rich",
    "safetensors",
    "scikit-learn",
    "scipy",
    "torch",
    "typer",
)
_NET = ("asyncio", "email", "http", "urllib", "wsgiref", "xmlrpc")
_GUI = ("tkinter", "idlelib", "turtledemo")

_KINDS: dict[str, tuple[str, Callable[[], Iterator[str]]]] = {
    "manual": ("the topics of pydoc", _manual),
    "docstrings": ("the modules of the standard library", _docstrings),
    "licences": (f"the licences of {', '.join(_PACKAGES)}", _licences),
    "names": ("the names of characters in Unicode", _names),
    "tables": ("the package encodings", lambda: _files(_standard("encodings"), "*.py")),
    "code-net": (
        f"the packages {', '.join(_NET)}",
        lambda: _files(_standard(*_NET), "**/*.py"),
    ),
    "code-gui": (
        f"the packages {', '.join(_GUI)}",
        lambda: _files(_standard(*_GUI), "**/*.py"),
    ),
    "code-tests": ("the package test", lambda: _files(_standard("test"), "test_*.py")),
    "code-numerics": (
        "the libraries numpy and scipy",
        lambda: _files(
            _package("numpy", "polynomial", "linalg") + _package("scipy", "integrate", "signal"),
            "**/*.py",
        ),
    ),
    "headers": (
        "the headers of Python",
        lambda: _files([Path(sysconfig.get_path("include"))], "**/*.h"),
    ),
    "headers-cpp": (
        "the headers of PyTorch",
        lambda: _files(_package("torch", "include/c10"), "**/*.h"),
    ),
}
KINDS: tuple[str, ...] = tuple(_KINDS)
"""Names of the kinds, whether this installation has them or not."""
