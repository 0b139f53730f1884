"""The walk through a deck finds what a room would see wrong, and nothing in a sound deck."""

import re

import pytest

from tools import browser, build_handouts, check_slides
from tools.browser import find_browser, open_browser
from tools.build_notebooks import unexecuted
from tools.build_slides import slides

needs_browser = pytest.mark.skipif(find_browser() is None, reason="needs Chromium or Chrome")

SLIDE = """# %% [markdown] slideshow={"slide_type": "slide"}
# ## Title
#
# Words, and $x^2$.
#
# <!-- notes: Say it. -->
"""
FAULTS = {
    "cut off": "<p style='white-space: nowrap'>" + "wide " * 90 + "</p>",
    "overlap": "<p style='margin-top: -75px'>on top of other words</p>",
    "letters 9 px high": "<p style='font-size: 8px'>small print</p>",
    "formula with an error": r"$\left( x$",
    "formula with an unknown": r"$\nosuchmacro x$",
    "formula not drawn": "<span class='tex2jax_ignore mathjax_ignore'>$x$</span>",
    "hidden by its box": "<p style='overflow: hidden; white-space: nowrap; width: 200px'>"
    + "too long for its box</p>",
    "asks for http://127.0.0.1:9/picture.png": "<img src='http://127.0.0.1:9/picture.png'>",
    "picture not loaded": "<img src='data:image/png;base64,AAAA' alt='a chart'>",
}


def _deck(folder, *bodies):
    path = folder / "01_deck.html"
    text = "\n".join(f"{SLIDE}#\n# {body}\n" for body in bodies)
    path.write_text(slides(unexecuted(text)), encoding="utf-8")
    return path


@needs_browser
def test_finds_each_fault_on_its_slide(tmp_path):
    deck = _deck(tmp_path, "", *FAULTS.values())
    with open_browser() as chromium:
        problems, num_slides = check_slides.check_deck(chromium, deck, tmp_path / "sheets")
    assert num_slides == 1 + len(FAULTS)
    assert not [p for p in problems if p.startswith("slide 1:")]
    for number, fault in enumerate(FAULTS, 2):
        told = [p for p in problems if p.startswith((f"slide {number}:", "asks for"))]
        assert any(fault in p for p in told), (fault, problems)
    assert len(list((tmp_path / "sheets").glob("01_deck-*.png"))) == 2


@needs_browser
def test_a_handout_has_a_landscape_page_for_each_slide(tmp_path):
    _deck(tmp_path, "", "Second.\n\n# %% [markdown] slideshow={'slide_type': 'fragment'}\n# Third.")
    assert build_handouts.main([], folder=tmp_path) == 0
    assert build_handouts.main(["01_deck", "--notes"], folder=tmp_path) == 0
    plain, noted = (
        re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", (tmp_path / name).read_bytes())
        for name in ("01_deck.pdf", "01_deck-notes.pdf")
    )
    assert len(plain) == 2 and len(noted) == 4
    assert all(float(width) > 1.7 * float(height) for width, height in plain)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("tool", [build_handouts, check_slides])
def test_rejects_a_missing_browser_and_missing_decks(tool, tmp_path, capsys, monkeypatch):
    assert tool.main(["02_none"], folder=tmp_path) == 2
    assert "no 02_none.html" in capsys.readouterr().err
    assert tool.main([], folder=tmp_path) == 2
    assert "`make slides` builds them" in capsys.readouterr().err
    (tmp_path / "01_deck.html").write_text("")
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    assert tool.main([], folder=tmp_path) == 2
    assert "install one of: chromium" in capsys.readouterr().err
