"""`python -m tools.build_slides [STEM ...]`: executed notebooks -> slides/STEM.html, offline.

Cells become slides by their slideshow metadata; `<!-- notes: ... -->` in a markdown cell becomes
the speaker's notes (press S). reveal.js and MathJax are inlined from the wheels sphinx-revealjs
and sphinx-mathjax-offline, so that one file is all that a lecture needs.
"""

import argparse
import importlib.metadata
import logging
import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tools.build_notebooks import ROOT, stems

TEMPLATES = Path(__file__).resolve().parent
REVEAL = "sphinx_revealjs/_static/revealjs"
NOTES = re.compile(r"<!--\s*notes:\s*(.*?)\s*-->", re.DOTALL)


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.build_slides")
    parser.add_argument("stems", nargs="*", help="such as 01_normalization (all)")
    options = parser.parse_args(argv)
    unknown = set(options.stems) - set(stems(root))
    if unknown:
        print(f"no notebooks/src/ of: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    (root / "slides").mkdir(exist_ok=True)
    for stem in options.stems or stems(root):
        notebook = nbformat.read(root / "notebooks" / f"{stem}.ipynb", as_version=4)
        target = root / "slides" / f"{stem}.html"
        target.write_text(slides(notebook), encoding="utf-8")
        print(f"slides/{target.name}: {target.stat().st_size / 1e6:.1f} MB")
    return 0


def slides(notebook: NotebookNode) -> str:
    """The page of one executed notebook."""
    from nbconvert import SlidesExporter

    logging.getLogger("traitlets").setLevel(logging.ERROR)  # it asks for images' alternative text
    notebook = notebook.copy()
    notebook.cells = [_for_a_room(cell) for cell in notebook.cells]
    exporter = SlidesExporter(
        template_name="slides",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    page, _ = exporter.from_notebook_node(notebook, {"slides": _assets(_title(notebook))})
    return page


def _for_a_room(cell: NotebookNode) -> NotebookNode:
    """Notes go to the speaker, and what only the formatter reads goes away."""
    cell = cell.copy()
    if cell.cell_type != "markdown":
        cell.source = re.sub(r"  # (fmt: skip|noqa: \w+)$", "", cell.source, flags=re.MULTILINE)
        return cell
    cell.source = NOTES.sub(
        lambda found: f'\n<aside class="notes">\n\n{found[1]}\n\n</aside>\n', cell.source
    )
    return cell


def _title(notebook: NotebookNode) -> str:
    return next((c.source.splitlines()[0].lstrip("# ") for c in notebook.cells if c.source), "")


def _assets(title: str) -> dict[str, object]:
    reveal = [_file("sphinx-revealjs", f"{REVEAL}/{name}") for name in
              ("dist/reset.css", "dist/reveal.css", "dist/theme/white.css")]  # fmt: skip
    scripts = [
        _file("sphinx-revealjs", f"{REVEAL}/dist/reveal.js"),
        _file("sphinx-revealjs", f"{REVEAL}/plugin/notes/notes.js"),
        _file("sphinx-mathjax-offline", "sphinx-mathjax-offline/static/mathjax/tex-svg.js"),
    ]
    own = (TEMPLATES / "slides" / "slides.css").read_text(encoding="utf-8")
    return {
        "title": title,
        "css": [re.sub(r"@import url\([^)]*\);", "", css) for css in [*reveal, own]],
        "js": [re.sub(r"</(script)", r"<\\/\1", js, flags=re.IGNORECASE) for js in scripts],
    }


def _file(distribution: str, name: str) -> str:
    found = Path(str(importlib.metadata.distribution(distribution).locate_file(name)))
    return found.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
