"""An answer may kill its process or hang for ever: it loses its exercise, the rest is graded."""

import pytest

from autograder import refusals, worker
from autograder.worker import grade_file_safely
from autograder.workspace import load_chapter


def _statuses(course):
    chapter = load_chapter(course, "toy")
    results = grade_file_safely(course, "exercises", chapter, list(chapter.exercises))
    return [r.status for r in results]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(worker, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(worker, "IMPORT_SECONDS", 1.0)


def test_all_right(course):
    assert _statuses(course) == ["passed"] * 3


def test_exit_in_a_function_costs_one_exercise(course, answer):
    answer("""
        import os
        def mean_pool(x):
            os._exit(0)
    """)
    assert _statuses(course) == [refusals.CRASHED, "passed", "passed"]


def test_loop_that_swallows_its_time_limit_costs_one_exercise(course, answer, impatient):
    answer("""
        def num_bytes(rows, columns):
            while True:
                try:
                    while True:
                        pass
                except BaseException:
                    pass
    """)
    assert _statuses(course) == ["passed", refusals.TOO_SLOW, "passed"]


def test_exit_at_import_is_reported_for_each(course, answer):
    answer("import os; os._exit(3)")
    assert _statuses(course) == [refusals.CRASHED] * 3


def test_recursion_is_an_ordinary_error(course, answer):
    answer("""
        def mean_pool(x):
            return mean_pool(x)
    """)
    assert _statuses(course) == [refusals.RAISED, "passed", "passed"]
