"""The site: every topic has a page, every term one line; built without a warning, offline."""

import os
import re
from pathlib import Path

import pytest

from tools import build_site, check_site
from tools.browser import find_browser

ROOT = Path(__file__).parents[2]


def test_every_module_of_the_library_has_a_place():
    listed = {module for _, modules in build_site.topics() for module in modules}
    files = (p.relative_to(ROOT).with_suffix("") for p in (ROOT / "reference").rglob("*.py"))
    modules = {".".join(f.parts).removesuffix(".__init__") for f in files}
    assert modules - listed == {"reference", "reference.parallel"}


def test_the_glossary_has_each_term_once_in_both_languages():
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (\d\d) \| (.+?) \|$",
                      (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)  # fmt: skip
    assert len(rows) >= 100
    terms = [row[0].lower() for row in rows]
    assert len(terms) == len(set(terms)) and terms == sorted(terms)
    assert all(re.search(r"[\u4e00-\u9fff]", row[1]) or row[1].isascii() for row in rows)
    chapters = {p.name[:2] for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    assert {row[2] for row in rows} <= chapters


@pytest.mark.skipif(not os.environ.get("THOROUGH"), reason="takes minutes; THOROUGH=1 runs it")
def test_builds_without_a_warning_and_reads_well_at_desk_and_phone():
    assert build_site.main() == 0
    assert check_site.main() == 0


PAGE = """<!doctype html><meta charset="utf-8"><title>a page</title>
<article><p id="here">{words} <a href="{link}">on</a></p>{body}</article>"""
FAULTS = {
    "no missing.html": ("missing.html", ""),
    "no place index.html#nowhere": ("index.html#nowhere", ""),
    "px wide on a screen of 390": ("index.html", "<div style='width: 600px'>wide</div>"),
    "asks for http://127.0.0.1:9/a.js": ("", "<script src='http://127.0.0.1:9/a.js'></script>"),
    "went wrong": ("index.html#here", "<script>console.error('went wrong')</script>"),
    "none of 1 formulas is drawn": ("", "<span class='math'>\\(x\\)</span>"),
    "no picture": ("", "<img src='data:image/png;base64,AAAA'>"),
}


@pytest.mark.skipif(find_browser() is None, reason="needs Chromium or Chrome")
def test_each_fault_of_a_site_is_found_on_its_page(tmp_path, capsys):
    words = "words " * 30
    (tmp_path / "index.html").write_text(PAGE.format(words=words, link="page0.html#here", body=""))
    for number, (link, body) in enumerate(FAULTS.values()):
        page = PAGE.format(words=words, link=link, body=body)
        (tmp_path / f"page{number}.html").write_text(page)
    (tmp_path / "search.html").write_text(PAGE.format(words="", link="", body=""))
    assert check_site.main(tmp_path) == 1
    told = capsys.readouterr().out.splitlines()
    for number, fault in enumerate(FAULTS):
        assert any(line.startswith(f"page{number}.html") and fault in line for line in told), fault
    assert not [line for line in told if line.startswith("index.html")]
    assert "search: nothing found for softmax" in told


def test_rejects_a_site_that_is_not_built(tmp_path, capsys):
    assert check_site.main(tmp_path) == 2
    assert "`make site` builds it" in capsys.readouterr().err
