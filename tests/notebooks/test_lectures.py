"""A notebook can be lectured from: a title, a summary, notes for the speaker on every slide."""

import re
from pathlib import Path

import jupytext
import pytest

from tools.build_notebooks import ROOT, stems


def _slides(stem: str):
    """The markdown cells with which slides begin, and the cells that stay on each."""
    text = Path(ROOT / "notebooks" / "src" / f"{stem}.py").read_text(encoding="utf-8")
    found = []
    for cell in jupytext.reads(text, fmt="py:percent").cells:
        kind = cell.metadata.get("slideshow", {}).get("slide_type")
        if kind == "slide":
            found.append([cell])
        elif found and kind in ("fragment", "subslide"):
            found[-1].append(cell)
    return found


@pytest.mark.parametrize("stem", stems(ROOT))
def test_begins_with_a_title_and_ends_with_a_summary(stem):
    slides = _slides(stem)
    assert re.match(rf"# {stem[:2]} \w", slides[0][0].source)
    assert any(re.match(r"## \d+\. Summary", cells[0].source) for cells in slides[-2:])


@pytest.mark.parametrize("stem", stems(ROOT))
def test_every_slide_has_notes_for_the_speaker(stem):
    for cells in _slides(stem):
        notes = re.findall(r"<!-- notes: (.*?)-->", "".join(c.source for c in cells), re.DOTALL)
        heading = cells[0].source.splitlines()[0]
        assert sum(len(note.split()) for note in notes) >= 12, f"{heading}: no notes to speak of"
