"""Wrong answers are recognised by what they compute, however they are written."""

from dataclasses import replace

import pytest
import torch

from autograder.diagnosis import Memory, replay
from autograder.engine import grade_namespace
from autograder.recording import Call, Raised, Returned, distance, fingerprint, snapshot
from autograder.workspace import load_chapter


def test_function_is_diagnosed_in_another_form(grade_function):
    def unforeseen(x):
        total = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            total += x[:, t]
        return total

    result = grade_function(unforeseen)
    assert result.diagnosis.name == "sums the steps"
    assert "divide by their number" in result.diagnosis.says
    assert result.diagnosis.see == "notebooks/07_toy.ipynb, 1. Pooling"


def test_number_is_diagnosed(grade_function):
    result = grade_function(lambda rows, columns: rows * columns * 8, "num_bytes")
    assert result.diagnosis.name == "counts eight bytes"


def test_class_is_diagnosed_through_its_adapter(course, answer):
    from autograder.notebook import check

    answer("""
        class Counter:
            def step(self, x):
                return x.sum(0)
    """)
    assert check("Counter").result.diagnosis.name == "forgets"


def test_unknown_mistake_is_not_given_a_name(grade_function):
    assert grade_function(lambda x: x.mean(1) * 1.5).diagnosis is None


def test_right_answer_is_not_diagnosed(grade_function):
    assert grade_function(lambda x: x.mean(1)).diagnosis is None


def test_dtype_tells_misconceptions_apart(grade_function):
    assert grade_function(lambda x: x.sum(1).double()).diagnosis is None


def test_agreeing_where_it_is_right_is_no_diagnosis(grade_function):
    def raises_in_batches(x):
        if x.shape[1] > 1:
            raise ValueError("more than one step")
        return x[:, 0].clone()

    assert grade_function(raises_in_batches).diagnosis is None


def test_changed_input_is_not_taken_for_a_mistake(grade_function):
    def right_but_in_place(x):
        out = x.mean(1)
        x.zero_()
        return out

    assert grade_function(right_but_in_place).diagnosis is None


def test_memory_runs_a_candidate_once_an_input(course):
    chapter = load_chapter(course, "toy")
    exercise, runs = chapter.exercises[0], []

    def counts(x):
        runs.append(x)
        return x.sum(1)

    counted = replace(chapter.misconceptions[0], implementation=counts)
    chapter = replace(chapter, misconceptions=(counted, *chapter.misconceptions[1:]))
    memory = Memory()
    for _ in range(3):
        result = grade_namespace(
            chapter, exercise, {exercise.name: lambda x: x.sum(1)}, None, source="", memory=memory
        )
        assert result.diagnosis.name == "sums the steps"
    assert len(runs) == len(exercise.checks)


def test_fingerprint_tells_arguments_apart():
    x = torch.arange(6.0)
    same = fingerprint(((x,), {"eps": 1e-6}))
    assert fingerprint(((x.clone(),), {"eps": 1e-6})) == same
    others = [x.view(2, 3), x.double(), x + 1, x.bfloat16(), torch.empty(0)]
    prints = {fingerprint(((other,), {"eps": 1e-6})) for other in others}
    assert len(prints) == len(others) and same not in prints


def test_replay_needs_a_call_that_agrees():
    call = Call("f", (torch.ones(2),), {}, Raised("ValueError: no"))
    assert replay([call], {"f": lambda x: x}) is None
    assert replay([], {"f": lambda x: x}) is None

    def refuses(x):
        raise ValueError("no")

    assert replay([call], {"f": refuses}) == 0.0


def test_replay_takes_another_error_for_another_mistake():
    """Both crash, and both are right where there is nothing to do: that is no likeness."""

    def crashes(x):
        if len(x):
            raise IndexError("no")
        return x

    trivial = Call("f", (torch.ones(0),), {}, Returned(torch.ones(0)))
    for error, expected in (("IndexError: other words", 0.0), ("ValueError: no", None)):
        calls = [trivial, Call("f", (torch.ones(2),), {}, Raised(error))]
        assert replay(calls, {"f": crashes}) == expected


def test_replay_gives_each_candidate_fresh_inputs():
    x = torch.ones(2)
    call = Call("f", (x,), {}, Returned(torch.full((2,), 2.0)))
    for _ in range(2):
        assert replay([call], {"f": lambda x: x.add_(1)}) == 0.0


@pytest.mark.parametrize(
    "a, b, near",
    [
        (torch.ones(3), torch.ones(3) + 1e-6, True),
        (torch.ones(3), torch.ones(3) + 1e-2, False),
        (torch.ones(3), torch.ones(3, dtype=torch.float64), False),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), True),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), True),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([0.0, 1.0]), False),
        ({"a": 1.0}, {"a": 1.0 + 1e-9}, True),
        ({"a": 1.0}, {"b": 1.0}, False),
        ([1, "x", None], [1, "x", None], True),
        ((1, 2), (1, 2, 3), False),
        (1, 1.0, False),
        (0.0, 1e-3, False),
    ],
)
def test_distance_is_none_where_outcomes_differ(a, b, near):
    assert (distance(a, b) is not None) == near


def test_snapshot_is_out_of_reach_of_later_changes():
    x, generator = torch.ones(2), torch.Generator().manual_seed(3)
    copy = snapshot(([x], {"g": generator}))
    x.zero_()
    first = torch.randn(1, generator=generator)
    assert copy[0][0].tolist() == [1.0, 1.0]
    assert torch.equal(torch.randn(1, generator=copy[1]["g"]), first)
