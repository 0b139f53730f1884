"""The examination's numbers come out; the plan names all exercises, with their minutes."""

import re
from pathlib import Path

import pytest

from autograder.workspace import chapter_stems, find_root, load_chapter

ROOT = find_root(Path(__file__).parent)
EXAM = (ROOT / "docs/exam_questions.md").read_text()
PLAN = (ROOT / "docs/teaching_plan.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", EXAM, re.DOTALL)
CHAPTERS = [load_chapter(ROOT, stem) for stem in chapter_stems(ROOT)]


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_answers_come_out(code):
    assert "assert" in code
    exec(compile(code, "exam", "exec"), {})


def test_every_chapter_has_five_questions_with_answers():
    parts = re.split(r"^## ", EXAM, flags=re.MULTILINE)[1:]
    numbers = {int(part[:2]) for part in parts}
    assert numbers == {c.number for c in CHAPTERS} - {0}
    for part in parts:
        assert len(re.findall(r"^\*\*\d\. (Compute|Explain|Debug)\.\*\*", part, re.MULTILINE)) == 5
        assert part.count("**Answer.**") == 5


def test_the_plan_names_every_exercise_with_its_minutes():
    named = dict(re.findall(r"`(\w+)` (\d+)", PLAN))
    minutes = {e.name: e.minutes for c in CHAPTERS for e in c.exercises if c.number > 0}
    assert {name: int(n) for name, n in named.items()} == minutes


def test_the_plan_has_fifteen_weeks():
    weeks = re.findall(r"^## Week (\d+)", PLAN, flags=re.MULTILINE)
    assert [int(w) for w in weeks] == list(range(1, 16))
    assert PLAN.count("Discuss") == 15
