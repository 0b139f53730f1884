"""Slides: self-contained, with notes for the speaker and without the cells that are skipped."""

import re

import pytest

from tools.build_notebooks import unexecuted
from tools.build_slides import main, slides

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


def test_slides_are_paginated_in_the_browser(page):
    """Cells that do not fit move on; what draws, or is long, shows its output and hides its code."""
    assert '<body class="measuring">' in page  # laid out, measured, then shown
    assert page.index("foldCode();") < page.index("paginate();") < page.index("Reveal.initialize(")
