"""`python -m tools.build_handouts [NN_STEM ...]`: slides/NN_STEM.html -> slides/NN_STEM.pdf.

A page a slide, printed by Chromium, Chrome or Edge, whichever is there; nothing is fetched.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
SECONDS = 180


def main(argv: list[str] | None = None, folder: Path = ROOT / "slides") -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.build_handouts")
    parser.add_argument("stems", nargs="*", help="chapters, as 01_normalization (all)")
    options = parser.parse_args(argv)
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        print(f"no browser to print with; install one of: {', '.join(BROWSERS)}", file=sys.stderr)
        return 2
    decks = sorted(folder.glob("*.html"))
    if options.stems:
        decks = [folder / f"{stem}.html" for stem in options.stems]
    missing = [deck.name for deck in decks if not deck.is_file()]
    if missing or not decks:
        print(f"no {', '.join(missing) or 'decks'} in {folder.name}/; `make slides` builds them",
              file=sys.stderr)  # fmt: skip
        return 2
    for deck in decks:
        print_deck(browser, deck, deck.with_suffix(".pdf"))
        print(f"{deck.with_suffix('.pdf').name}")
    return 0


def print_deck(browser: str, deck: Path, pdf: Path) -> None:
    """Print one deck; the PDF appears whole or not at all."""
    with tempfile.TemporaryDirectory() as profile:
        draft = Path(profile) / "deck.pdf"
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
             "--disable-background-networking", "--virtual-time-budget=60000",
             "--no-pdf-header-footer", f"--print-to-pdf={draft}",
             f"{deck.resolve().as_uri()}?print-pdf"],
            check=True, capture_output=True, timeout=SECONDS,
        )  # fmt: skip
        shutil.move(draft, pdf)


if __name__ == "__main__":
    sys.exit(main())
