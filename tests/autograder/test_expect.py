"""Comparisons refuse by kind and say how values differ."""

import pytest
import torch

from autograder import expect, refusals
from autograder.declarations import exercise
from autograder.difference import describe_difference
from autograder.refusals import Refusal

E = torch.arange(1.0, 10.0).reshape(3, 3) ** 2


@pytest.mark.parametrize(
    "actual, words",
    [
        (E * 3, "3 times the expected"),
        (E - 2, "off by the same amount, -2"),
        (-E, "opposite sign"),
        (E.T.contiguous(), "dimensions 0 and 1 swapped"),
        (E + 1e-6, "The error is tiny"),
        (E * 1.001 + torch.eye(3) * 0.01, "right in the main"),
        (E + torch.tensor([[0.0], [0.0], [70.0]]) * torch.rand(3, 3), "Only indices 2 of dim"),
        (E.masked_fill(E > 50, torch.nan), "2 of 9 elements are NaN"),
    ],
)  # fmt: skip
def test_difference_names_the_simple_relation(actual, words):
    assert words in describe_difference(actual, E)


def test_difference_names_an_order_of_dimensions():
    e = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert "permute(1, 2, 0)" in describe_difference(e.permute(1, 2, 0), e)
    assert "got 2, expected 1" in describe_difference(torch.tensor(2.0), torch.tensor(1.0))


def test_difference_shows_digits_that_differ():
    e = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert "got 2.00000001, expected 2." in describe_difference(e + torch.tensor([0, 1e-8]), e)


def test_difference_of_integers_counts():
    assert "1 of 3" in describe_difference(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]))


@pytest.mark.parametrize(
    "actual, expected",
    [
        (E.clone(), E),
        (torch.tensor([True, False]), torch.tensor([True, False])),
        ([E, 1.0, "a"], [E, 1.0 + 1e-9, "a"]),
        ({"a": (1, E)}, {"a": (1, E)}),
        (torch.empty(0, 3), torch.empty(0, 3)),
        (torch.tensor([torch.nan, -torch.inf]), torch.tensor([torch.nan, -torch.inf])),
    ],
)
def test_close_accepts(actual, expected):
    expect.close(actual, expected)


@pytest.mark.parametrize(
    "actual, expected, kind",
    [
        (E + 1, E, refusals.WRONG_VALUE),
        (E[:2], E, refusals.WRONG_SHAPE),
        (E.double(), E, refusals.WRONG_DTYPE),
        (None, E, refusals.WRONG_TYPE),
        (E.numpy(), E, refusals.WRONG_TYPE),
        ((E,), [E], refusals.WRONG_TYPE),
        ([E], [E, E], refusals.WRONG_VALUE),
        ({"a": 1}, {"b": 1}, refusals.WRONG_VALUE),
        (torch.tensor([True]), torch.tensor([False]), refusals.WRONG_VALUE),
        (True, 1, refusals.WRONG_TYPE),
    ],
)
def test_close_refuses(actual, expected, kind):
    with pytest.raises(Refusal) as refused:
        expect.close(actual, expected)
    assert refused.value.kind == kind


def test_number_asks_for_a_number():
    expect.number(3, 3.0)
    with pytest.raises(Refusal, match=r"use .item\(\)"):
        expect.number(torch.tensor(3.0), 3.0)
    with pytest.raises(Refusal, match="2 times it"):
        expect.number(6, 3.0)


@pytest.mark.parametrize("facts", [{"kind": "buidl"}, {"hints": ("one",)}, {"difficulty": 4}])
def test_exercise_rejects_incomplete_facts(facts):
    class Grader:
        def test_it(self, student, rng):
            """works"""

    good = dict(kind="build", minutes=1, difficulty=1, see="1. A", hints=("a", "b", "c"))
    exercise("f", **good)(Grader)
    with pytest.raises(ValueError, match="expected"):
        exercise("f", **{**good, **facts})(Grader)
