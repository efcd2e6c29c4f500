"""The documentation's code runs, and its names exist."""

import re
import shutil
from pathlib import Path

import pytest

from hansa.config import load
from hansa.federation.methods import METHODS
from hansa.federation.methods.official import QUIRKS

ROOT = Path(__file__).parents[1]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", blocks(ROOT / "README.md", "python"))
def test_code_in_the_readme_runs(code: str, tmp_path, monkeypatch, capsys) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # noqa: S102
    assert "mean" in capsys.readouterr().out


def test_the_documented_configuration_is_valid() -> None:
    import tomllib

    (text,) = blocks(ROOT / "docs" / "configuration.md", "toml")
    config = load(tomllib.loads(text))
    assert config.name == "ward-study"


def test_every_method_its_options_and_quirks_are_documented() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    assert all(f"| `{name}` |" in text for name in METHODS)
    assert all(f"| `{quirk}` |" in text for quirk in QUIRKS)
    options = {key for kind in METHODS.values() for key in kind.model_fields}
    assert not [key for key in options if f"`{key}`" not in text and f"`{key} =" not in text]
