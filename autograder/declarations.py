"""What graders and catalogues declare: exercises, checks, misconceptions, alternatives."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

KINDS = ("build", "derive", "repair", "estimate", "challenge")
RUNGS = ("nudge", "why am I seeing this error", "pseudocode")


@dataclass(frozen=True)
class Check:
    """One test method of a grader: a claim about the answer, worth some points."""

    name: str
    says: str
    points: float
    function: Callable[..., None]


@dataclass(frozen=True)
class Exercise:
    """One function or class that a student writes, with the checks that grade it.

    `through` names the adapter function that calls a class exercise; `seconds` limits one check.
    `on_ranks`: the adapter runs the answer on ranks; for a class, each is a process of its own, and
    the adapter and its network are the grader's. `is_measured`: the checks rest on memory or time
    measured where the answer runs.
    """

    name: str
    kind: str
    minutes: int
    difficulty: int
    see: str
    hints: tuple[str, str, str]
    through: str | None = None
    seconds: float = 10.0
    on_ranks: bool = False
    is_measured: bool = False
    checks: tuple[Check, ...] = field(default=())

    @property
    def points(self) -> float:
        return sum(check.points for check in self.checks)

    @property
    def entry(self) -> str:
        """The function that the grader calls."""
        return self.through or self.name


def exercise(name: str, **facts: Any) -> Callable[[type], type]:
    """Declare a test class as the grader of exercise `name`; `facts` are the fields of Exercise.

    Raises: ValueError where a fact would leave the student without help.
    """

    def decorate(cls: type) -> type:
        spec = Exercise(name=name, checks=tuple(_checks_of(cls)), **facts)
        if spec.kind not in KINDS:
            raise ValueError(f"{name}: kind: expected one of {', '.join(KINDS)}, got {spec.kind!r}")
        if len(spec.hints) != len(RUNGS) or not all(spec.hints):
            raise ValueError(f"{name}: hints: expected {len(RUNGS)} texts ({', '.join(RUNGS)})")
        if spec.difficulty not in (1, 2, 3):
            raise ValueError(f"{name}: difficulty: expected 1, 2 or 3, got {spec.difficulty}")
        cls.exercise = spec  # type: ignore[attr-defined]
        return cls

    return decorate


def points(value: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare what a check is worth (1 where nothing is declared)."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        function.points = value  # type: ignore[attr-defined]
        return function

    return decorate


def _checks_of(cls: type) -> list[Check]:
    checks = []
    for name, function in vars(cls).items():
        if not name.startswith("test_"):
            continue
        if list(inspect.signature(function).parameters) != ["self", "student", "rng"]:
            raise ValueError(f"{cls.__name__}.{name}: expected the parameters (self, student, rng)")
        if not function.__doc__:
            raise ValueError(f"{cls.__name__}.{name}: a check needs a docstring, students read it")
        says = inspect.cleandoc(function.__doc__).splitlines()[0]
        checks.append(Check(name, says, getattr(function, "points", 1), function))
    if not checks:
        raise ValueError(f"{cls.__name__}: an exercise needs at least one test_* method")
    return checks


@dataclass(frozen=True)
class Misconception:
    """A wrong answer that people give, with the sentence that clears it up.

    `is_starter` marks the program that a repair starts from: not repaired yet is no mistake.
    """

    exercise: str
    name: str
    says: str
    see: str
    implementation: Any
    is_starter: bool = False


@dataclass(frozen=True)
class Alternative:
    """A right answer in another form, which graders must accept."""

    exercise: str
    name: str
    implementation: Any


def misconception(
    exercise_name: str, says: str, *, see: str, is_starter: bool = False
) -> Callable[[Any], Any]:
    """Declare a function or class as a wrong answer to an exercise; students read its name."""

    def decorate(implementation: Any) -> Any:
        name = implementation.__name__.replace("_", " ")
        implementation.misconception = Misconception(
            exercise_name, name, says, see, implementation, is_starter
        )
        return implementation

    return decorate


def alternative(exercise_name: str) -> Callable[[Any], Any]:
    """Declare a function or class as another right answer to an exercise."""

    def decorate(implementation: Any) -> Any:
        name = implementation.__name__.replace("_", " ")
        implementation.alternative = Alternative(exercise_name, name, implementation)
        return implementation

    return decorate
