"""Every way of going wrong gets its own message, and costs only its own points."""

import sys

import pytest
import torch

from autograder import refusals
from autograder.engine import grade
from autograder.results import PASSED, ExerciseResult
from autograder.student import load_module
from autograder.workspace import load_chapter


def loops(x):
    while True:
        pass


def changes_its_input(x):
    x *= 2
    return x.mean(1) / 2


def raises_deep_inside(x):
    return x.reshape(7, 7)


CASES = [
    (lambda x: None, refusals.RETURNED_NONE, "return statement missing"),
    (lambda x: x.mean(1).tolist(), refusals.WRONG_TYPE, "expected a tensor, got a list"),
    (lambda x: x.mean(2), refusals.WRONG_SHAPE, "expected (2, 4), got (2, 3)"),
    (lambda x: x.mean(1).double(), refusals.WRONG_DTYPE, "expected torch.float32, got torch.f"),
    (lambda x: x.mean(1) + 1, refusals.WRONG_VALUE, "off by the same amount, +1"),
    (lambda x: -x.mean(1), refusals.WRONG_VALUE, "opposite sign"),
    (lambda x: x.mean(1) / 0, refusals.WRONG_VALUE, "infinite"),
    (changes_its_input, refusals.MUTATED, "argument 1"),
    (loops, refusals.TOO_SLOW, "mean_pool was still running after 0.5 s"),
    (raises_deep_inside, refusals.RAISED, "in raises_deep_inside: `return x.reshape(7, 7)`"),
    (lambda x: sys.exit(0), refusals.RAISED, "called exit()"),
    (7, refusals.MISSING, "should be a function"),
]


@pytest.mark.parametrize("function, kind, message", CASES)
def test_each_failure_has_its_own_message(grade_function, function, kind, message):
    result = grade_function(function)
    assert result.earned == 0
    assert result.checks[0].status == kind
    assert message in result.checks[0].message


def test_right_answer_earns_all(grade_function):
    result = grade_function(lambda x: x.mean(1))
    assert (result.status, result.earned, result.points) == (PASSED, 3, 3)


def test_partial_answer_earns_its_checks(grade_function):
    result = grade_function(lambda x: x[:, -1])
    assert [c.status for c in result.checks] == [refusals.WRONG_VALUE, PASSED]
    assert result.earned == 1


def test_prints_are_kept_back_and_shown_bounded(grade_function, capsys):
    def prints_a_lot(x):
        for i in range(10_000):
            print("line", i)
        return x.mean(1)

    result = grade_function(prints_a_lot)
    assert result.status == PASSED
    assert capsys.readouterr().out == ""
    assert "line 0" in result.printed and "more characters" in result.printed
    assert len(result.printed) < 500


def test_missing_function_is_named_with_its_remedy(course):
    (course / "exercises/toy.py").write_text("def other(): pass")
    chapter = load_chapter(course, "toy")
    module = load_module(course / "exercises/toy.py", "exercises/toy.py")
    result = grade(chapter, chapter.exercises[0], module, source="exercises/toy.py")
    assert result.checks[0].status == refusals.MISSING
    assert "exercises/toy.py has no mean_pool" in result.checks[0].message
    assert result.checks[1].status == refusals.NOT_RUN


def test_answers_cannot_redefine_equality(grade_function):
    class Agreeable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func in (torch.allclose, torch.equal):
                return True
            return super().__torch_function__(func, types, args, kwargs or {})

    class Equal:
        shape, dtype = torch.Size([2, 4]), torch.float32

        def __eq__(self, other):
            return True

    wrong = torch.zeros(2, 4)
    for forged in (wrong.as_subclass(Agreeable), Equal()):
        assert grade_function(lambda x, forged=forged: forged).earned == 0


def test_results_survive_json(grade_function):
    result = grade_function(lambda x: x.sum(1))
    assert result.diagnosis is not None
    assert ExerciseResult.from_dict(result.to_dict()) == result


def test_seed_changes_the_inputs(grade_function, course):
    seen = []

    def spy(x):
        seen.append(x.clone())
        return x.mean(1)

    chapter = load_chapter(course, "toy")
    from autograder.engine import grade_namespace

    for seed in (0, 0, 1):
        grade_namespace(
            chapter, chapter.exercises[0], {"mean_pool": spy}, None, source="", seed=seed
        )
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[4])


def test_a_measurement_earns_nothing_without_a_right_value(course):
    """Who returns nothing allocates nothing."""
    grader = course / "tests/exercises/test_toy.py"
    grader.write_text(
        grader.read_text().replace(
            '@exercise("num_bytes"',
            '''
@exercise("mean_pool_small", **FACTS)
class TestSmall:
    def test_values(self, student, rng):
        """equals torch's mean"""
        x = torch.randn(2, 3, 4, generator=rng)
        expect.close(student.mean_pool_small(x), x.mean(1))

    def test_memory(self, student, rng):
        """makes nothing large"""
        x = torch.randn(2, 3, 4, generator=rng)
        with largest_new_tensor() as spy:
            student.mean_pool_small(x)
        expect.true(spy.bytes <= 2 * 4 * 4, f"made {spy.bytes} bytes")

@exercise("num_bytes"''',
        )
    )
    text = grader.read_text()
    grader.write_text("from autograder.spies import largest_new_tensor\n" + text)
    chapter = load_chapter(course, "toy")
    exercise = next(e for e in chapter.exercises if e.name == "mean_pool_small")
    for body, earned in (("x.mean(1)", 2), ("0", 0), ("x.mean(1) * 2", 0)):
        answers = course / "answers.py"
        answers.write_text(f"def mean_pool_small(x):\n    return {body}\n")
        module = load_module(answers, "answers.py")
        result = grade(chapter, exercise, module, source="answers.py")
        assert result.earned == earned, body
    assert "counts once a check of values passes" in result.checks[1].message


def test_messages_have_an_end(course):
    module = load_module(course / "exercises/toy.py", "exercises/toy.py")

    def fails(rows, columns):
        raise ValueError("7" * 10**6)

    module.num_bytes = fails
    chapter = load_chapter(course, "toy")
    exercise = next(e for e in chapter.exercises if e.name == "num_bytes")
    result = grade(chapter, exercise, module, source="a test")
    assert all(len(check.message) < 5000 for check in result.checks)
