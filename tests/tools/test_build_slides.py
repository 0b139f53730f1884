"""Slides: self-contained, with notes for the speaker and without the cells that are skipped."""

import re

import nbformat
import pytest

from tools.browser import find_browser, open_browser, open_tab
from tools.build_notebooks import unexecuted
from tools.build_slides import main, slides
from tools.check_slides import check_deck

needs_browser = pytest.mark.skipif(find_browser() is None, reason="needs Chromium or Chrome")

SOURCE = """# %% [markdown] slideshow={"slide_type": "slide"}
# # 01 Norms & friends
#
# The mean is $\\bar x = \\frac{1}{n} \\sum_i x_i$.
#
# <!-- notes: Ask *first*, then show. -->

# %% slideshow={"slide_type": "skip"}
print("skipped")

# %% slideshow={"slide_type": "fragment"}
print("shown")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. Next
"""


@pytest.fixture(scope="module")
def page():
    return slides(unexecuted(SOURCE))


def test_page_asks_nothing_of_the_network(page):
    assert not re.findall(
        r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(?:https?:)?//", page
    )
    assert "@import url(http" not in page


def test_slides_follow_the_metadata(page):
    body = page[page.index('<div class="slides">') :]
    assert body.count("<section") == 4  # two slides, each a stack of one
    assert "shown" in body and "skipped" not in body
    assert body.count('class="fragment"') == 1


def test_notes_are_for_the_speaker(page):
    (notes,) = re.findall(r'<aside class="notes">(.*?)</aside>', page, re.DOTALL)
    assert "Ask <em>first</em>, then show." in notes
    assert "<!-- notes" not in page


def test_mathematics_is_left_to_mathjax(page):
    assert r"$\bar x = \frac{1}{n} \sum_i x_i$" in page
    assert "<title>01 Norms &amp; friends</title>" in page


def test_rejects_unknown_stems(tmp_path, capsys):
    (tmp_path / "notebooks" / "src").mkdir(parents=True)
    assert main(["02_other"], tmp_path) == 2
    assert "no notebooks/src/ of: 02_other" in capsys.readouterr().err


@needs_browser
def test_cells_that_do_not_fit_go_to_the_next_slide(tmp_path):
    tall = "# %% [markdown]\n" + "# line\n#\n" * 8 + "\n"
    notebook = unexecuted(
        SOURCE.replace("# %% [markdown] slideshow", tall * 4 + "# %% [markdown] slideshow")
    )
    code = next(cell for cell in notebook.cells if cell.source == 'print("shown")')
    code.source = "\n".join(f"x = {i}" for i in range(40))
    code.outputs = [nbformat.v4.new_output("stream", text="shown\n")]
    path = tmp_path / "slides.html"
    path.write_text(slides(notebook), encoding="utf-8")
    with open_browser() as browser:
        tab = open_tab(browser, 1280, 720)
        tab.page.goto(path.as_uri())
        tab.page.wait_for_function("window.Reveal?.isReady()")
        body = tab.page.content()
        problems, _ = check_deck(browser, path)
    body = body[body.index('<div class="slides"') :]
    assert 'class="measuring"' not in body
    assert body.count("<section") > 4 + 4  # the tall cells have slides of their own
    assert "40 lines of code (C)" in body
    assert "running-head" in body
    assert problems == []
