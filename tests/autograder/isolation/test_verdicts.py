"""In a confined process an answer gets the verdict that it gets in this one."""

import os
import random
from pathlib import Path

import pytest

from autograder.diagnosis import Memory
from autograder.engine import grade_namespace, grade_student
from autograder.isolation import sandbox
from autograder.isolation.grading import IsolatedGrader
from autograder.isolation.remote import RemoteSubmission
from autograder.student import load_module, with_replacement
from autograder.workspace import chapter_stems, find_root, load_chapter

ROOT = find_root(Path(__file__).parent)
# Of each chapter's catalogue; with THOROUGH=1 all of it, in minutes.
SAMPLE = 1000 if os.environ.get("THOROUGH") else 6
pytestmark = pytest.mark.skipif(bool(sandbox.unavailable()), reason=sandbox.unavailable())


@pytest.fixture(scope="module")
def grader():
    with IsolatedGrader(ROOT) as grader:
        yield grader


@pytest.mark.parametrize("stem", chapter_stems(ROOT))
def test_solutions_score_full_marks(grader, stem):
    results = grader.grade(stem, (ROOT / "solutions" / f"{stem}.py").read_bytes(), seed=7)
    assert [(c.name, c.message) for r in results for c in r.checks if c.status != "passed"] == []


@pytest.mark.parametrize("stem", chapter_stems(ROOT))
def test_untouched_exercises_score_nothing(grader, stem):
    results = grader.grade(stem, (ROOT / "exercises" / f"{stem}.py").read_bytes())
    assert sum(r.earned for r in results) == 0
    assert {r.status for r in results} <= {"not written", "not repaired"}


@pytest.mark.parametrize("stem", chapter_stems(ROOT))
def test_the_catalogue_gets_the_same_verdicts(grader, stem):
    chapter, prepared = load_chapter(ROOT, stem), grader._prepare(stem)
    solved = load_module(ROOT / "solutions" / f"{stem}.py", "solutions")
    written = (ROOT / "solutions" / f"{stem}.py").read_text()
    written += "\n\n" + (ROOT / "misconceptions" / f"{stem}.py").read_text()
    entries = [*chapter.misconceptions, *chapter.alternatives]
    entries = random.Random(stem).sample(entries, min(SAMPLE, len(entries)))
    memory: dict[str, Memory] = {}
    for entry in entries:
        exercise = next(e for e in chapter.exercises if e.name == entry.exercise)
        kept = memory.setdefault(exercise.name, Memory())
        here = grade_namespace(
            chapter, exercise,
            with_replacement(solved, exercise.entry, exercise.name, entry.implementation),
            solved, source="exercises/x.py", memory=kept,
        )  # fmt: skip
        text = f"{written}\n\n{exercise.name} = {entry.implementation.__name__}\n"
        shown = f"exercises/{stem}.py"
        submission = RemoteSubmission(
            grader.workers, text.encode(), shown, prepared.given, prepared.adapters
        )
        there = grade_student(
            chapter, exercise, submission.student(exercise), prepared.adapters, memory=kept
        )
        submission.close()
        assert _verdict(there) == _verdict(here), entry.name


def _verdict(result):
    # An error that names a line of the answer's file differs in the line.
    named = result.diagnosis.name if result.diagnosis else None
    is_by_error = any(c.status == "raised" for c in result.checks)
    return [(c.name, c.status) for c in result.checks], None if is_by_error else named
