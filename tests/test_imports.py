import re
from pathlib import Path

from importlinter import cli

ROOT = Path(__file__).parents[1]


def test_imports_point_downward(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    # It would silence every logger that is there already.
    monkeypatch.setattr("logging.config.dictConfig", lambda config: None)
    assert cli.lint_imports(no_cache=True) == 0


def test_nothing_that_could_hold_code_is_ever_loaded() -> None:
    unsafe = re.compile(
        r"pickle\.loads?\(|(?<!safetensors\.)torch\.load\(|allow_pickle|yaml\.load\("
    )
    for path in (ROOT / "src").rglob("*.py"):
        assert not unsafe.search(path.read_text()), path
