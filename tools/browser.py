"""Chromium for the authors' tools: found where it is installed, asked through Playwright.

Playwright is a package of the `dev` extra; the browser is the machine's own (Debian and Ubuntu:
`apt-get install chromium`). Nothing is downloaded.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_browser() -> str | None:
    """The path of the first browser of BROWSERS on PATH."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


class NoBrowser(RuntimeError):
    """There is none; the message says which would do."""

    def __init__(self) -> None:
        super().__init__(f"no browser found; install one of: {', '.join(BROWSERS)}")


def built_decks(folder: Path, stems: list[str]) -> list[Path]:
    """What `make slides` has written of `stems`, or all. Raises: FileNotFoundError."""
    decks = [folder / f"{stem}.html" for stem in stems] or sorted(folder.glob("*.html"))
    missing = [deck.name for deck in decks if not deck.is_file()]
    if missing or not decks:
        raise FileNotFoundError(
            f"no {', '.join(missing) or 'decks'} in {folder.name}/; `make slides` builds them"
        )
    return decks


@dataclass
class Tab:
    """A page, with what went wrong in it: errors on the console, requests to other places."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def open_browser() -> Iterator[Any]:
    """A headless browser of Playwright's. Raises: NoBrowser."""
    from playwright.sync_api import sync_playwright

    path = find_browser()
    if path is None:
        raise NoBrowser
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        try:
            yield browser
        finally:
            browser.close()


def open_tab(browser: Any, width: int, height: int) -> Tab:
    """A fresh page that notes errors and requests beyond file: and data:."""
    tab = Tab(browser.new_page(viewport={"width": width, "height": height}))
    tab.page.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.page.on(
        "console", lambda said: tab.errors.append(said.text) if said.type == "error" else None
    )
    tab.page.on(
        "request",
        lambda request: (
            tab.requests.append(request.url)
            if not request.url.startswith(("file:", "data:", "blob:"))
            else None
        ),
    )
    return tab
