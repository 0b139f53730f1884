"""Every catalogue keeps its promises: wrong answers are refused and named, right ones accepted."""

import os
import types
from pathlib import Path

import pytest

from autograder import refusals
from autograder.diagnosis import Memory
from autograder.engine import grade, grade_namespace
from autograder.student import load_module, with_replacement
from autograder.workspace import chapter_stems, load_chapter

ROOT = Path(__file__).parents[2]
CHAPTERS = {stem: load_chapter(ROOT, stem) for stem in chapter_stems(ROOT)}
SOLUTIONS = {stem: load_module(ROOT / f"solutions/{stem}.py", stem) for stem in CHAPTERS}


# On simulated ranks a seed takes up to a second: 20 of them with THOROUGH=1, as elsewhere always.
IS_THOROUGH = bool(os.environ.get("THOROUGH"))
SEEDS = {
    stem: range(20 if chapter.number <= 10 or IS_THOROUGH else 5)
    for stem, chapter in CHAPTERS.items()
}

# Each misconception runs once on each input, however many are compared with it.
MEMORY = {(stem, e.name): Memory() for stem, chapter in CHAPTERS.items() for e in chapter.exercises}


def _exercise(stem, name):
    return next(e for e in CHAPTERS[stem].exercises if e.name == name)


def _graded(stem, declared, seed):
    exercise = _exercise(stem, declared.exercise)
    namespace = with_replacement(
        SOLUTIONS[stem], exercise.entry, exercise.name, declared.implementation
    )
    return grade_namespace(
        CHAPTERS[stem],
        exercise,
        namespace,
        SOLUTIONS[stem],
        source="answers",
        seed=seed,
        memory=MEMORY[stem, exercise.name],
    )


def _cases(kind):
    return [
        pytest.param(stem, declared, id=f"{stem}-{declared.exercise}-{declared.name}")
        for stem, chapter in CHAPTERS.items()
        for declared in getattr(chapter, kind)
    ]


def _exercises():
    return [
        pytest.param(stem, exercise, id=f"{stem}-{exercise.name}")
        for stem, chapter in CHAPTERS.items()
        for exercise in chapter.exercises
    ]


@pytest.mark.parametrize("stem, declared", _cases("misconceptions"))
def test_misconception_is_refused_and_diagnosed_as_itself(stem, declared):
    for seed in SEEDS[stem]:
        result = _graded(stem, declared, seed)
        assert result.earned < result.points, f"seed {seed}: accepted"
        assert result.diagnosis is not None, f"seed {seed}: {[c.message for c in result.checks]}"
        assert result.diagnosis.name == declared.name, f"seed {seed}"


@pytest.mark.parametrize("stem, declared", _cases("alternatives"))
def test_alternative_is_accepted(stem, declared):
    for seed in SEEDS[stem]:
        result = _graded(stem, declared, seed)
        assert result.earned == result.points, [c.message for c in result.checks if c.message]


@pytest.mark.parametrize("stem, exercise", _exercises())
def test_solution_earns_full_points(stem, exercise):
    for seed in SEEDS[stem]:
        result = grade(CHAPTERS[stem], exercise, SOLUTIONS[stem], source="solutions", seed=seed)
        assert result.earned == result.points > 0, [c.message for c in result.checks if c.message]


@pytest.mark.parametrize("stem, exercise", _exercises())
def test_untouched_exercise_earns_nothing_and_says_why(stem, exercise):
    from tools.build_exercises import strip

    module = types.ModuleType("untouched")
    code = strip((ROOT / f"solutions/{stem}.py").read_text(), f"{stem}.py")
    exec(compile(code, f"exercises/{stem}.py", "exec"), module.__dict__)
    result = grade(CHAPTERS[stem], exercise, module, source=f"exercises/{stem}.py")
    assert result.earned == 0
    if exercise.kind == "repair":
        assert result.diagnosis is not None, "the starter of a repair equals a misconception"
    else:
        assert result.checks[0].status == refusals.NOT_WRITTEN
        assert "not written yet" in result.checks[0].message


@pytest.mark.parametrize("stem, exercise", _exercises())
def test_exercise_has_wrong_and_right_variants(stem, exercise):
    chapter = CHAPTERS[stem]
    assert any(m.exercise == exercise.name for m in chapter.misconceptions)
    assert sum(a.exercise == exercise.name for a in chapter.alternatives) >= 2


@pytest.mark.parametrize("stem", CHAPTERS)
def test_catalogue_names_real_exercises_and_sections(stem):
    chapter = CHAPTERS[stem]
    names = {e.name for e in chapter.exercises}
    declared = [*chapter.misconceptions, *chapter.alternatives]
    assert {d.exercise for d in declared} <= names
    labels = [(d.exercise, d.name) for d in declared]
    assert len(labels) == len(set(labels))
    source = (ROOT / f"notebooks/src/{chapter.number:02d}_{stem}.py").read_text()
    headings = {line.lstrip("# ").strip() for line in source.splitlines() if line.startswith("# #")}
    for item in [*chapter.exercises, *chapter.misconceptions]:
        assert item.see in headings, f"{item.name}: no heading {item.see!r} in the notebook"
    for exercise in chapter.exercises:
        assert f'check("{exercise.name}")' in source, f"{exercise.name}: not in the notebook"
