"""`python -m tools.check_site`: reads site/ in a browser, as a student at a desk and on a phone.

On every page, in both widths: errors on the console, requests to other places, formulas that are
not drawn, pictures that do not load, and whether the page is wider than the screen. Then searches
in English and Chinese, and follows every link between pages.
"""

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

from tools.browser import NoBrowser, Tab, open_browser, open_tab

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = {"desk": (1280, 800), "phone": (390, 844)}
SEARCHES = ("softmax", "bubble", "注意力")
SEARCH_MILLISECONDS = 5_000
LOOK = r"""() => {
  const found = [];
  const text = document.querySelector("article")?.innerText ?? "";
  const drawn = document.querySelectorAll("mjx-container").length;
  const asked = document.querySelectorAll(".math").length;
  if (asked && !drawn) found.push(`none of ${asked} formulas is drawn`);
  if (document.querySelector("mjx-merror, [data-mjx-error]")) found.push("a formula with an error");
  for (const node of document.querySelectorAll(".math"))
    if (/\\\(|\\\[/.test(node.innerText)) found.push(`not drawn: ${node.innerText.slice(0, 50)}`);
  for (const node of document.querySelectorAll("mjx-container[jax=SVG]"))
    if (node.querySelectorAll(":scope > svg").length !== 1) found.push("a formula drawn twice");
  for (const image of document.images)
    if (image.loading !== "lazy" && !image.naturalWidth) found.push(`no picture: ${image.src}`);
  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth + 1) found.push(`${wide} px wide on a screen of ${innerWidth}`);
  if (text.length < 100) found.push("an empty page");
  return found;
}"""


def main(folder: Path = ROOT / "site") -> int:
    if not (folder / "index.html").is_file():
        print(f"no {folder.name}/index.html; `make site` builds it", file=sys.stderr)
        return 2
    problems = list(broken_links(folder))
    try:
        with open_browser() as browser:
            problems += seen_in(browser, folder)
    except NoBrowser as error:
        print(error, file=sys.stderr)
        return 2
    for problem in problems:
        print(problem)
    print(f"{sum(1 for _ in pages(folder))} pages, {len(problems)} problems")
    return 1 if problems else 0


def pages(folder: Path) -> Iterator[Path]:
    """The pages that people read."""
    for path in sorted(folder.rglob("*.html")):
        is_made = path.name in ("genindex.html", "search.html", "py-modindex.html")
        if not is_made and "_static" not in path.parts:
            yield path


def seen_in(browser: Any, folder: Path) -> list[str]:
    """What is wrong on any page, at either width, and with the search."""
    problems = []
    for device, (width, height) in WIDTHS.items():
        tab = open_tab(browser, width, height)
        for path in pages(folder):
            name = path.relative_to(folder).as_posix()
            said = [f"{name}, {device}: {problem}" for problem in _look(tab, path.as_uri())]
            problems += said
        tab.page.close()
    tab = open_tab(browser, *WIDTHS["desk"])
    for words in SEARCHES:
        tab.page.goto(f"{(folder / 'search.html').as_uri()}?q={words}")
        try:
            tab.page.wait_for_selector("#search-results li a", timeout=SEARCH_MILLISECONDS)
        except Exception:
            problems.append(f"search: nothing found for {words}")
    problems += [f"search: {error}" for error in [*tab.errors, *tab.requests]]
    return problems


def _look(tab: Tab, address: str) -> list[str]:
    tab.errors.clear()
    tab.requests.clear()
    tab.page.goto(address)
    tab.page.evaluate("() => window.MathJax?.startup?.promise")
    found: list[str] = tab.page.evaluate(LOOK)
    return [*found, *tab.errors, *(f"asks for {url}" for url in tab.requests)]


class _Page(HTMLParser):
    """A page's links and the places that can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.places.add(value)
            if tag == "a" and name == "href" and value:
                self.links.add(value)


def broken_links(folder: Path) -> Iterator[str]:
    """Links to pages or places that are not there."""
    read = {path.resolve(): _Page(path.read_text("utf-8")) for path in folder.rglob("*.html")}
    for path, page in read.items():
        for link in sorted(page.links):
            target, place = urldefrag(link)
            if "://" in target or target.startswith(("mailto:", "data:")):
                continue
            goal = (path.parent / unquote(target)).resolve() if target else path
            name = path.relative_to(folder.resolve()).as_posix()
            if not goal.exists():
                yield f"{name}: no {link}"
            elif place and goal in read and unquote(place) not in read[goal].places:
                yield f"{name}: no place {link}"


if __name__ == "__main__":
    sys.exit(main())
