"""A tiny course in a folder of its own: two functions and a class to write."""

import textwrap

import pytest

from autograder.engine import grade_namespace
from autograder.student import load_module
from autograder.workspace import load_chapter

ANSWERS = '''
import torch

def mean_pool(x):
    """Mean over T of x (B, T, D)."""
    return x.mean(1)

def num_bytes(rows, columns):
    return 4 * rows * columns

class Counter:
    def __init__(self):
        self.total = 0

    def step(self, x):
        self.total = self.total + x.sum()
        return self.total

def run_counter(xs):
    counter = Counter()
    return [counter.step(x) for x in xs]
'''

GRADER = '''
import torch
from autograder import exercise, expect, points

FACTS = dict(kind="build", minutes=1, difficulty=1, see="1. Pooling", seconds=0.5,
             hints=("a nudge", "a reason", "a program"))

@exercise("mean_pool", **FACTS)
class TestMeanPool:
    @points(2)
    def test_values(self, student, rng):
        """equals torch's mean"""
        x = torch.randn(2, 3, 4, generator=rng)
        expect.close(student.mean_pool(x), x.double().mean(1).float())

    def test_one_step(self, student, rng):
        """a single step is its own mean"""
        x = torch.randn(2, 1, 4, generator=rng)
        expect.close(student.mean_pool(x), x[:, 0])

@exercise("num_bytes", **FACTS)
class TestNumBytes:
    def test_values(self, student, rng):
        """counts four bytes an element"""
        expect.number(student.num_bytes(3, 5), 60)

@exercise("Counter", through="run_counter", **FACTS)
class TestCounter:
    def test_values(self, student, rng):
        """adds up what came before"""
        x = torch.randn(3, 4, generator=rng)
        expect.close(student.run_counter(list(x)), list(x.sum(1).cumsum(0)))
'''

CATALOGUE = """
from autograder import alternative, misconception

@misconception("mean_pool", "You added the steps up: divide by their number.", see="1. Pooling")
def sums_the_steps(x):
    return x.sum(1)

@misconception("mean_pool", "You took the mean over the batch.", see="1. Pooling")
def pools_over_the_batch(x):
    return x.mean(0, keepdim=True).mean(1).expand(x.shape[0], -1)

@misconception("num_bytes", "A float32 has 4 bytes, not 8.", see="1. Pooling")
def counts_eight_bytes(rows, columns):
    return 8 * rows * columns

@misconception("Counter", "Nothing is carried over from step to step.", see="1. Pooling")
class forgets:
    def step(self, x):
        return x.sum()

@alternative("mean_pool")
def by_sum(x):
    return x.sum(1) / x.shape[1]
"""


@pytest.fixture
def course(tmp_path, monkeypatch):
    """The tiny course's root, made the current folder; its answers are right as they come."""
    for folder in ("exercises", "misconceptions", "tests/exercises", "notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "exercises/toy.py").write_text(ANSWERS)
    (tmp_path / "misconceptions/toy.py").write_text(CATALOGUE)
    (tmp_path / "tests/exercises/test_toy.py").write_text(GRADER)
    (tmp_path / "notebooks/07_toy.ipynb").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def answer(course):
    """Write new answers: answer('def mean_pool(x): ...') replaces that function in the file."""

    def write(code, keep=True):
        text = (ANSWERS if keep else "") + "\n" + textwrap.dedent(code)
        (course / "exercises/toy.py").write_text(text)

    return write


@pytest.fixture
def grade_function(course):
    """grade_function(function) grades it as the exercise 'mean_pool' (or another name)."""

    def grade(function, name="mean_pool"):
        chapter = load_chapter(course, "toy")
        exercise = next(e for e in chapter.exercises if e.name == name)
        module = load_module(course / "exercises/toy.py", "exercises/toy.py")
        return grade_namespace(chapter, exercise, {name: function}, module, source="a test")

    return grade
