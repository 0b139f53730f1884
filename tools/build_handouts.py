"""`python -m tools.build_handouts [NN_STEM ...]`: slides/NN_STEM.html -> slides/NN_STEM.pdf.

A page a slide, all its fragments shown, printed by Chromium, Chrome or Edge, whichever is there.
`--notes` prints the speaker's notes as pages between the slides: the lecturer's copy.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from tools.browser import NoBrowser, built_decks, open_browser, open_tab

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 1280, 720


def main(argv: list[str] | None = None, folder: Path = ROOT / "slides") -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.build_handouts")
    parser.add_argument("stems", nargs="*", help="chapters, as 01_normalization (all)")
    parser.add_argument("--notes", action="store_true", help="with the speaker's notes")
    options = parser.parse_args(argv)
    try:
        with open_browser() as browser:
            for deck in built_decks(folder, options.stems):
                pdf = deck.with_name(f"{deck.stem}{'-notes' * options.notes}.pdf")
                print_deck(browser, deck, pdf, with_notes=options.notes)
                print(f"slides/{pdf.name}", flush=True)
    except (NoBrowser, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def print_deck(browser: Any, deck: Path, pdf: Path, *, with_notes: bool = False) -> None:
    """Print one deck; the PDF appears whole or not at all."""
    page = open_tab(browser, WIDTH, HEIGHT).page
    page.goto(f"{deck.resolve().as_uri()}?print-pdf{'&showNotes=separate-page' * with_notes}")
    page.wait_for_function("window.Reveal?.isReady()", timeout=120_000)
    page.wait_for_function("document.querySelector('.pdf-page')")
    draft = pdf.with_suffix(".tmp")
    try:
        page.pdf(path=draft, prefer_css_page_size=True, print_background=True)
        os.replace(draft, pdf)
    finally:
        page.close()
        draft.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
