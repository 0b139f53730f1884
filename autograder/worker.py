"""Grades in a forked child, so that nothing an answer does can end or stop the run."""

import json
import multiprocessing
import multiprocessing.connection
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from autograder import refusals
from autograder.declarations import Exercise
from autograder.engine import grade, refuse_all
from autograder.refusals import Refusal
from autograder.results import ExerciseResult
from autograder.student import IMPORT_SECONDS, load_module
from autograder.workspace import Chapter

GRACE_SECONDS = 5.0
CAN_FORK = "fork" in multiprocessing.get_all_start_methods()


def grade_file(
    root: Path,
    answers: str,
    chapter: Chapter,
    exercises: list[Exercise],
    *,
    seed: int = 0,
    on_failure: Callable[[BaseException], None] | None = None,
) -> Iterator[ExerciseResult]:
    """Grade exercises of one answer file, one result at a time, in this process."""
    source = f"{answers}/{chapter.stem}.py"
    try:
        module: Any = load_module(root / source, source)
    except Refusal as refusal:
        module = refusal
    for exercise in exercises:
        yield grade(chapter, exercise, module, source=source, seed=seed, on_failure=on_failure)


def grade_file_safely(
    root: Path, answers: str, chapter: Chapter, exercises: list[Exercise], *, seed: int = 0
) -> Iterator[ExerciseResult]:
    """`grade_file` in a forked child that is replaced when it dies or hangs.

    An answer that kills its process or ignores its time limit loses that exercise; the next one is
    graded in a fresh child. Where the system cannot fork, grades in this process.
    """
    if not CAN_FORK:
        yield from grade_file(root, answers, chapter, exercises, seed=seed)
        return
    left = list(exercises)
    while left:
        for result in _until_trouble(root, answers, chapter, left, seed):
            yield result
            left = left[1:]


def _until_trouble(
    root: Path, answers: str, chapter: Chapter, exercises: list[Exercise], seed: int
) -> Iterator[ExerciseResult]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(
        target=_child, args=(sender, root, answers, chapter, exercises, seed), daemon=True
    )
    child.start()
    sender.close()
    extra = IMPORT_SECONDS
    try:
        for exercise in exercises:
            limit = exercise.seconds * len(exercise.checks) + GRACE_SECONDS + extra
            extra = 0.0
            try:
                if not receiver.poll(limit):
                    yield _lost(chapter, exercise, refusals.TOO_SLOW, f"after {limit:.0f} s")
                    return
                yield ExerciseResult.from_dict(json.loads(receiver.recv_bytes()))
            except (EOFError, OSError):
                child.join(1)
                how = f"with exit status {child.exitcode}"
                yield _lost(chapter, exercise, refusals.CRASHED, how)
                return
    finally:
        child.kill()
        child.join()
        receiver.close()


def _child(
    sender: multiprocessing.connection.Connection,
    root: Path,
    answers: str,
    chapter: Chapter,
    exercises: list[Exercise],
    seed: int,
) -> None:
    # OpenMP threads do not survive a fork; one thread needs none.
    torch.set_num_threads(1)
    for result in grade_file(root, answers, chapter, exercises, seed=seed):
        sender.send_bytes(json.dumps(result.to_dict()).encode())


def _lost(chapter: Chapter, exercise: Exercise, kind: str, how: str) -> ExerciseResult:
    what = {
        refusals.TOO_SLOW: f"{exercise.name} did not stop at its time limit and was ended {how}.",
        refusals.CRASHED: f"{exercise.name} ended the Python process {how}. "
        "Does the answer call os._exit, or crash in native code?",
    }[kind]
    return refuse_all(chapter, exercise, Refusal(kind, what))
