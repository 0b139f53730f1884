"""The site: every topic has a page, every term one line; built without a warning, offline."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import build_site

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
def test_builds_without_a_warning_and_fetches_nothing():
    done = subprocess.run([sys.executable, "-m", "tools.build_site"], cwd=ROOT)
    assert done.returncode == 0
    fetched = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(https?:)?//[^\"]+")
    for page in (ROOT / "site").rglob("*.html"):
        found = [m.group(0) for m in fetched.finditer(page.read_text())]
        assert not [f for f in found if 'rel="canonical"' not in f], page
