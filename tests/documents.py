"""What stands in the documentation: code and files by language and title, commands in order."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    ROOT / "examples" / "deployment" / "README.md",
]
_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page whose first line names a language and nothing more."""
    return [code for head, code in _fences(path) if head == language]


def files(path: Path) -> dict[str, str]:
    """Return title -> content of the blocks that a reader is asked to save."""
    titled = ((re.search(r'title="([^"]+)"', head), code) for head, code in _fences(path))
    return {found[1]: code for found, code in titled if found}


def commands(path: Path) -> list[str]:
    """Return the command lines of a page: of its blocks without a language, or of a shell."""
    lines = [
        line
        for head, code in _fences(path)
        if head in ("", "sh")
        for line in code.replace("\\\n", " ").splitlines()
    ]
    # Variables of the environment stand before a command.
    bare = [re.sub(r"^([A-Z_]+=\S+ +)+", "", line.strip()) for line in lines]
    return [line.partition("  #")[0].strip() for line in bare if _is_command(line)]


def quoted(path: Path) -> list[str]:
    """Return the commands that stand in a page's sentences and tables, between backticks."""
    text = _FENCE.sub("", path.read_text())
    return [code for code in re.findall(r"`([^`\n]+)`", text) if _is_command(code)]


def _fences(path: Path) -> list[tuple[str, str]]:
    return [(head.strip(), code) for _, head, code in _FENCE.findall(path.read_text())]


def _is_command(line: str) -> bool:
    return re.match(r"(hansa|python|pip|make|flwr|inspect) [^=]*", line.strip()) is not None
