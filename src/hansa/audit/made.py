"""Made-up names, and the fixtures' generator. Nothing that it names exists, but by chance.

    python -m hansa.audit.made FOLDER

writes the frozen cases of every domain again, bit by bit as they are in ``hansa/audit/fixtures``.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

from hansa.audit import encyclopedia, news, weather
from hansa.audit.cases import Case
from hansa.audit.draws import stream

NUM_CASES = 48
FIXTURES = 0
"""The seed of the frozen cases; the reader is trained on others."""
MAKERS: dict[str, Callable[[Random, int], Case]] = {
    "weather": weather.make,
    "encyclopedia": encyclopedia.make,
    "news": news.make,
}


def made_cases(domain: str, num: int, seed: int) -> list[Case]:
    """Return made-up cases of a domain; another seed gives other names and values."""
    return [MAKERS[domain](stream(seed, "made", domain, number), number) for number in range(num)]


def write_fixtures(folder: Path) -> None:
    """Write the frozen cases of every domain, one case a line within a JSON list."""
    for domain in MAKERS:
        entries = [case.as_json() for case in made_cases(domain, NUM_CASES, FIXTURES)]
        lines = [json.dumps(entry, ensure_ascii=False, separators=(",", ":")) for entry in entries]
        text = "[\n" + ",\n".join(lines) + "\n]\n"
        (folder / f"{domain}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_fixtures(Path(sys.argv[1]))
