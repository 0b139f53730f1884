"""`check()` in a notebook."""

import pytest

from autograder.notebook import check
from autograder.workspace import UnknownName


def test_grades_the_file_by_name(course):
    assert repr(check("mean_pool")).startswith("mean_pool: 3 of 3 points")


def test_grades_a_function_from_a_cell(course):
    def mean_pool(x):
        return x.sum(1)

    verdict = check(mean_pool)
    assert "Diagnosis: sums the steps. You added the steps up" in repr(verdict)
    page = verdict._repr_html_()
    assert "Diagnosis: sums the steps." in page
    assert page.count("<details>") == 3 and "a nudge" in page


def test_grades_a_function_of_another_name(course):
    assert check(lambda x: x.mean(1), "mean_pool").result.status == "passed"


def test_grades_a_class_from_a_cell(course):
    class Counter:
        def step(self, x):
            return x.sum()

    assert check(Counter).result.diagnosis.name == "forgets"


def test_works_from_a_folder_below(course, monkeypatch):
    monkeypatch.chdir(course / "notebooks")
    assert check("num_bytes").result.status == "passed"


def test_output_is_escaped(course, answer):
    answer("""
        def mean_pool(x):
            print("<script>alert(1)</script>")
            raise ValueError("<b>bold</b>")
    """)
    page = check("mean_pool")._repr_html_()
    assert "<script>" not in page and "<b>bold" not in page


def test_rejects_unknown_exercise(course):
    with pytest.raises(UnknownName, match="Did you mean mean_pool"):
        check("mean_pol")


def test_verdict_follows_the_file(course, answer):
    answer("def mean_pool(x): return x.mean(2)")
    assert check("mean_pool").result.status == "wrong shape"
    answer("def mean_pool(x): return x.mean(1)")
    assert check("mean_pool").result.status == "passed"
