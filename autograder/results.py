"""Verdicts as plain data, which travel between processes and into reports as JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from autograder.refusals import NOT_REPAIRED

PASSED = "passed"


@dataclass(frozen=True)
class CheckResult:
    """One check: `status` is 'passed' or the kind of refusal (autograder.refusals).

    `is_measured`: it rests on bytes or time measured in the process in which the answer ran.
    """

    name: str
    says: str
    status: str
    points: float
    message: str = ""
    is_measured: bool = False

    @property
    def earned(self) -> float:
        return self.points if self.status == PASSED else 0.0


@dataclass(frozen=True)
class Diagnosis:
    """The misconception that an answer equals."""

    name: str
    says: str
    see: str
    is_starter: bool = False


@dataclass(frozen=True)
class ExerciseResult:
    """All checks of one exercise, what the answer printed, and the diagnosis if there is one.

    `all_or_nothing`: a program to repair passes some checks as it comes and earns nothing by it.
    """

    chapter: str
    exercise: str
    checks: tuple[CheckResult, ...]
    hints: tuple[str, ...]
    see: str
    printed: str = ""
    diagnosis: Diagnosis | None = None
    all_or_nothing: bool = False

    @property
    def earned(self) -> float:
        if self.all_or_nothing and self.status != PASSED:
            return 0.0
        return sum(check.earned for check in self.checks)

    @property
    def points(self) -> float:
        return sum(check.points for check in self.checks)

    @property
    def status(self) -> str:
        """'passed', else the kind of the first refusal."""
        if self.diagnosis and self.diagnosis.is_starter:
            return NOT_REPAIRED
        return next((c.status for c in self.checks if c.status != PASSED), PASSED)

    def told(self) -> list[tuple[CheckResult, str]]:
        """Each check with its message, or '' where an earlier check said the same."""
        said: set[str] = set()
        rows = []
        for check in self.checks:
            rows.append((check, "" if check.message in said else check.message))
            said.add(check.message)
        return rows

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "status": self.status,
            "earned": self.earned,
            "points": self.points,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "ExerciseResult":
        fields = {k: v for k, v in data.items() if k not in ("status", "earned", "points")}
        fields["checks"] = tuple(CheckResult(**check) for check in data["checks"])
        fields["hints"] = tuple(data["hints"])
        fields["diagnosis"] = Diagnosis(**data["diagnosis"]) if data["diagnosis"] else None
        return ExerciseResult(**fields)
