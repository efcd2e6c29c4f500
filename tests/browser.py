"""A headless browser for tests, where there is one, and what it must not see."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def executable() -> str | None:
    """Return where a browser is: on the path, or where Playwright puts its own."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        try:
            from playwright.sync_api import sync_playwright
        except ImportError:
            return None
        with sync_playwright() as made:
            own = made.chromium.executable_path
        found = own if Path(own).exists() else None
    return found


class Tab:
    """A page of the browser, and what went wrong in it.

    Attributes:
        page: Playwright's.
        problems: errors of the console and of scripts, and addresses off this machine that were
            asked for.
    """

    def __init__(self, context: Any) -> None:
        self.problems: list[str] = []
        self.page = context.new_page()
        self.page.set_default_timeout(30_000)
        self.page.on("console", self._told)
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        context.route("**/*", self._asked)

    def _told(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"{message.type}: {message.text}")

    def _asked(self, route: Any) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in ("file", "data") or address.hostname == "127.0.0.1":
            route.continue_()
        else:
            self.problems.append(f"asked for {route.request.url}")
            route.abort()


@contextmanager
def opened() -> Iterator[Any]:
    """Start the browser, or skip the test and say why."""
    where = executable()
    if where is None:
        pytest.skip("no browser: install chromium, or run playwright install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as made:
        browser = made.chromium.launch(
            executable_path=where, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def tab(browser: Any, width: int = 1280, scheme: str = "light") -> Iterator[Tab]:
    """Open a page, and fail where anything went wrong in it.

    Args:
        browser: Playwright's.
        width: of the window, in pixels.
        scheme: ``light`` or ``dark``.
    """
    height = 900
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    made = Tab(context)
    yield made
    if folder := os.environ.get("HANSA_SCREENSHOTS"):  # to look at them
        test = os.environ["PYTEST_CURRENT_TEST"].partition(" ")[0].rpartition("::")[2]
        name = f"{test.replace('/', '-')}-{width}-{scheme}.png"
        made.page.screenshot(path=str(Path(folder) / name), full_page=True)
    context.close()
    assert not made.problems
