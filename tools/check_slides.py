"""`python -m tools.check_slides [NN_STEM ...]`: walks through slides/*.html as a lecturer would.

In a real browser, each slide with all its fragments shown: is anything cut off, on top of something
else, too small for the back row, is a formula not drawn, does the page ask for anything from
elsewhere? `--pictures DIR` writes contact sheets of all slides, to look at.
"""

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.browser import NoBrowser, Tab, built_decks, open_browser, open_tab

ROOT = Path(__file__).resolve().parent.parent
AUDIT = (Path(__file__).resolve().parent / "slides" / "audit.js").read_text(encoding="utf-8")
WIDTH, HEIGHT = 1280, 720
COLUMNS, ROWS = 2, 3


def main(argv: list[str] | None = None, folder: Path = ROOT / "slides") -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.check_slides")
    parser.add_argument("stems", nargs="*", help="chapters, as 01_normalization (all)")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write contact sheets")
    options = parser.parse_args(argv)
    num_problems = 0
    try:
        with open_browser() as browser:
            for deck in built_decks(folder, options.stems):
                problems, num_slides = check_deck(browser, deck, options.pictures)
                num_problems += len(problems)
                print(f"{deck.stem}: {num_slides} slides, {len(problems)} problems", flush=True)
                for problem in problems:
                    print(f"  {problem}")
    except (NoBrowser, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if num_problems else 0


def check_deck(browser: Any, deck: Path, pictures: Path | None = None) -> tuple[list[str], int]:
    """What is wrong with a deck, each problem with its slide's number; and how many slides."""
    tab = open_tab(browser, WIDTH, HEIGHT)
    problems, shots = [], []
    for number, said in _slides(tab, deck):
        problems += [f"slide {number}: {problem}" for problem in said]
        if pictures:
            shots.append(tab.page.screenshot())
    problems += [f"console: {error}" for error in tab.errors]
    problems += [f"asks for {url}" for url in tab.requests]
    tab.page.close()
    if pictures:
        write_sheets(shots, pictures, deck.stem)
    return problems, number


def _slides(tab: Tab, deck: Path) -> Iterator[tuple[int, list[str]]]:
    tab.page.goto(deck.resolve().as_uri())
    tab.page.wait_for_function("window.Reveal?.isReady()", timeout=120_000)
    tab.page.add_style_tag(content="* { transition: none !important; }")
    tab.page.add_script_tag(content=AUDIT)
    for number in range(1, tab.page.evaluate("Reveal.getSlides().length") + 1):
        tab.page.evaluate(
            "n => { const at = Reveal.getIndices(Reveal.getSlides()[n - 1]);"
            " Reveal.slide(at.h, at.v);"
            " while (Reveal.availableFragments().next) Reveal.nextFragment(); }",
            number,
        )
        yield number, tab.page.evaluate("auditSlide()")


def write_sheets(shots: list[bytes], folder: Path, stem: str) -> None:
    """Six slides a sheet, in reading order."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    size = WIDTH * 5 // 8, HEIGHT * 5 // 8
    per_sheet = COLUMNS * ROWS
    for start in range(0, len(shots), per_sheet):
        sheet = Image.new("RGB", (size[0] * COLUMNS + 4, size[1] * ROWS + 8), "#888888")
        for place, shot in enumerate(shots[start : start + per_sheet]):
            picture = Image.open(io.BytesIO(shot)).convert("RGB").resize(size)
            row, column = divmod(place, COLUMNS)
            sheet.paste(picture, (column * (size[0] + 4), row * (size[1] + 4)))
        last = min(start + per_sheet, len(shots))
        sheet.save(folder / f"{stem}-{start + 1:03d}-{last:03d}.png")


if __name__ == "__main__":
    sys.exit(main())
