"""Runs an exercise's checks on an answer and, where they fail, looks for the misconception."""

import traceback
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from autograder import refusals
from autograder.declarations import Check, Exercise, Misconception
from autograder.diagnosis import Memory, diagnose
from autograder.limits import OutOfTime, captured_output, time_limit
from autograder.refusals import Refusal
from autograder.results import PASSED, CheckResult, Diagnosis, ExerciseResult
from autograder.spies import num_entered
from autograder.student import Student, StudentError, with_replacement
from autograder.workspace import Chapter

Failure = Callable[[BaseException], None]
MAX_MESSAGE = 4000


def grade(
    chapter: Chapter,
    exercise: Exercise,
    answers: types.ModuleType | Refusal,
    *,
    source: str,
    seed: int = 0,
    on_failure: Failure | None = None,
) -> ExerciseResult:
    """Grade one exercise of an answer file, or of the Refusal that its import ended in.

    `source` is how messages name the file. `on_failure` sees the first failed check's exception
    (for a debugger).
    """
    if isinstance(answers, Refusal):
        return refuse_all(chapter, exercise, answers)
    return grade_namespace(
        chapter, exercise, vars(answers), answers, source=source, seed=seed, on_failure=on_failure
    )


def grade_namespace(
    chapter: Chapter,
    exercise: Exercise,
    namespace: dict[str, Any],
    adapters: types.ModuleType | None,
    *,
    source: str,
    seed: int = 0,
    on_failure: Failure | None = None,
    memory: Memory | None = None,
) -> ExerciseResult:
    """Grade functions given by name; `adapters` is the module whose adapter wraps a class.

    Whoever grades many answers to it passes one `memory`: misconceptions then run once an input.
    """
    student = Student(namespace, source)
    return grade_student(chapter, exercise, student, adapters, seed=seed, on_failure=on_failure,
                         memory=memory)  # fmt: skip


def grade_student(
    chapter: Chapter,
    exercise: Exercise,
    student: Student,
    adapters: types.ModuleType | None,
    *,
    seed: int = 0,
    on_failure: Failure | None = None,
    memory: Memory | None = None,
) -> ExerciseResult:
    """Grade answers wherever they run: `student` calls them."""
    results = run_checks(chapter, exercise, student, seed, on_failure)
    diagnosis = None
    if any(r.status in (refusals.WRONG_VALUE, refusals.RAISED, refusals.WRONG_SHAPE,
                        refusals.WRONG_DTYPE, refusals.MUTATED) for r in results):  # fmt: skip
        diagnosis = _diagnosis(chapter, exercise, student, results, adapters, seed, memory)
    return ExerciseResult(
        chapter.stem,
        exercise.name,
        tuple(_with_values(results)),
        tuple(exercise.hints),
        f"{chapter.notebook}, {exercise.see}",
        "\n".join(dict.fromkeys(student.printed)),
        diagnosis,
        exercise.kind == "repair",
    )


def _with_values(results: list[CheckResult]) -> list[CheckResult]:
    """A measurement counts only beside a right value: returning nothing allocates nothing."""
    values = [r for r in results if not r.is_measured]
    if not values or any(r.status == PASSED for r in values):
        return results
    message = "What this check measures counts once a check of values passes."
    return [
        replace(r, status=refusals.WRONG_VALUE, message=message) if r.status == PASSED else r
        for r in results
    ]


def run_checks(
    chapter: Chapter,
    exercise: Exercise,
    student: Student,
    seed: int,
    on_failure: Failure | None = None,
) -> list[CheckResult]:
    """Run the checks in order; after a final refusal the rest is 'not run'."""
    grader = chapter.grader_of(exercise)
    results: list[CheckResult] = []
    for check in exercise.checks:
        if results and results[-1].status in (*refusals.FINAL, refusals.NOT_RUN):
            results.append(CheckResult(check.name, check.says, refusals.NOT_RUN, check.points))
            continue
        num_calls, num_spies = len(student.calls), num_entered()
        student.begin(exercise.seconds)
        status, message = _run(grader, exercise, check, student, seed, on_failure)
        message = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + " ..."
        student.refused += student.calls[num_calls:] if status != PASSED else []
        is_measured = exercise.is_measured or num_entered() > num_spies
        results.append(
            CheckResult(check.name, check.says, status, check.points, message, is_measured)
        )
    return results


def _run(
    grader: type,
    exercise: Exercise,
    check: Check,
    student: Student,
    seed: int,
    on_failure: Failure | None,
) -> tuple[str, str]:
    rng = torch.Generator().manual_seed(seed)
    try:
        with time_limit(exercise.seconds + student.grace_seconds):
            check.function(grader(), student, rng)
    except OutOfTime:
        return refusals.TOO_SLOW, (
            f"{exercise.name} was still running after {exercise.seconds:g} s. "
            "A loop that never ends, or a loop over elements where one tensor operation would do?"
        )
    except Refusal as refusal:
        if on_failure:
            on_failure(refusal)
        return refusal.kind, refusal.message
    except StudentError as error:
        if on_failure:
            on_failure(error.original)
        return refusals.RAISED, error.message
    except AssertionError as error:
        return refusals.WRONG_VALUE, str(error) or check.says
    except SystemExit:
        return refusals.RAISED, f"{exercise.name} called exit(). A function returns its result."
    except Exception as error:
        return _odd_result(error)
    return PASSED, ""


def _odd_result(error: Exception) -> tuple[str, str]:
    """A check tripped over what the answer returned (say, None in place of a pair)."""
    where = "".join(traceback.format_exception_only(error)).strip()
    return refusals.WRONG_TYPE, (
        f"The check could not use what came back: {where}. Compare the types that the function "
        "returns with its docstring."
    )


def _diagnosis(
    chapter: Chapter,
    exercise: Exercise,
    student: Student,
    results: list[CheckResult],
    adapters: types.ModuleType | None,
    seed: int,
    memory: Memory | None,
) -> Diagnosis | None:
    verdicts = {} if memory is None else memory.verdicts

    def namespace_of(implementation: Any) -> dict[str, Any]:
        if adapters is None:
            return {exercise.name: implementation}
        return with_replacement(adapters, exercise.entry, exercise.name, implementation)

    def likeness(candidate: Misconception, namespace: dict[str, Any]) -> int | None:
        key = (candidate.name, seed)
        if key not in verdicts:
            with captured_output():
                verdicts[key] = run_checks(chapter, exercise, Student(namespace, ""), seed)
        again = verdicts[key]
        pairs = list(zip(results, again, strict=True))
        told = [(a, b) for a, b in pairs if a.status != refusals.RAISED or a.status == b.status]
        failed = [(a, b) for a, b in told if a.status != PASSED]
        if not failed or any(a.status != b.status for a, b in told):
            return None
        return sum(a.message == b.message for a, b in failed)

    candidates = [
        (m, namespace_of(m.implementation))
        for m in chapter.misconceptions
        if m.exercise == exercise.name
    ]
    # Refused calls tell candidates apart: replaying them first saves most of the work.
    refused = {id(call) for call in student.refused}
    ordered = sorted(student.calls, key=lambda call: id(call) not in refused)
    calls = [call for call in ordered if call.function == exercise.entry]
    is_sure = not any(r.status in (refusals.RAISED, refusals.MUTATED) for r in results)
    found = diagnose(calls, candidates, likeness, is_sure=is_sure, memory=memory)
    if found is None:
        return None
    see = f"{chapter.notebook}, {found.see}"
    return Diagnosis(found.name, found.says, see, found.is_starter)


def refuse_all(chapter: Chapter, exercise: Exercise, refusal: Refusal) -> ExerciseResult:
    """The result of an exercise whose checks could not run at all."""
    first, *rest = exercise.checks
    checks = [CheckResult(first.name, first.says, refusal.kind, first.points, refusal.message)]
    checks += [CheckResult(c.name, c.says, refusals.NOT_RUN, c.points) for c in rest]
    return ExerciseResult(
        chapter.stem,
        exercise.name,
        tuple(checks),
        tuple(exercise.hints),
        f"{chapter.notebook}, {exercise.see}",
    )
