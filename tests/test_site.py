"""The documentation as a site: it builds without a warning, and no link of it leads nowhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import hansa
from documents import ROOT

VOID = ("img", "script", "link", "iframe", "source", "video", "audio")


class _Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        if tag in VOID:
            self.loaded |= {given[name] for name in ("src", "href") if name in given}


def _built(folder: Path) -> Path:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow(20)
def test_no_link_leads_nowhere_and_all_that_is_public_is_in_the_reference(tmp_path: Path) -> None:
    site = _built(tmp_path / "site")
    pages = {path: _Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 35
    wrong = []
    for path, page in pages.items():
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https") or parts.netloc:
                if link in page.loaded:
                    wrong.append(f"{path.name} loads {link}")
                continue
            if parts.scheme or path.name == "404.html":  # its links begin at the server's root
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            lost = (
                parts.fragment
                and target in pages
                and unquote(parts.fragment) not in (pages[target].anchors | {"__skip"})
            )
            if not target.is_file() or lost:
                wrong.append(f"{path.relative_to(site)} -> {link}")
    assert wrong == []
    # A fence that is not understood stands in the page as it was written.
    assert [path.name for path in pages if "<p>```" in path.read_text()] == []
    reference = "".join(path.read_text() for path in (site / "reference").rglob("*.html"))
    anchors = set(re.findall(r'id="(hansa\.[\w.]+)"', reference))
    assert {f"hansa.{name}" for name in hansa.__all__} - anchors == set()


def test_links_of_the_readme_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text()
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if not link.startswith(("http:", "https:")):
                assert (ROOT / link).is_file(), f"{name}: {link}"
