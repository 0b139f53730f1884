"""Grades again at each save, from a process that has everything imported before."""

import time
from pathlib import Path

import torch
from rich.console import Console
from watchfiles import watch as watch_files

from autograder.engine import grade_namespace
from autograder.results import PASSED, ExerciseResult
from autograder.terminal import UNATTEMPTED, print_details, status_table
from autograder.worker import grade_file_safely
from autograder.workspace import Chapter, chapter_stems, load_chapter


def watch(root: Path, answers: str, console: Console, hint: int = 0) -> int:
    """Grade a chapter whenever its answer file is saved, until Ctrl-C.

    Shows the first exercise that was attempted and refused in full, and the chapter's table.
    """
    stems = chapter_stems(root)
    for stem in stems:
        warm_up(load_chapter(root, stem))
    console.print(f"Watching {answers}/ for {', '.join(stems)}. Ctrl-C ends.")
    try:
        for changes in watch_files(root / answers, debounce=100, step=10, recursive=False):
            saved = {Path(path).stem for _, path in changes if path.endswith(".py")}
            for stem in sorted(saved.intersection(stems)):
                started = time.perf_counter()
                show(console, regrade(root, answers, stem), hint)
                console.print(f"[dim]{time.perf_counter() - started:.2f} s[/]")
    except KeyboardInterrupt:
        pass
    return 0


def warm_up(chapter: Chapter) -> None:
    """Grade one right answer of the catalogue for each exercise, here in the parent.

    A forked child inherits what torch and the graders set up at their first use; without it, each
    save would pay for that again.
    """
    torch.set_num_threads(1)
    answers = {a.exercise: a.implementation for a in chapter.alternatives}
    for exercise in chapter.exercises:
        if exercise.name in answers and not exercise.through:
            namespace = {exercise.name: answers[exercise.name]}
            grade_namespace(chapter, exercise, namespace, None, source="the catalogue")


def regrade(root: Path, answers: str, stem: str) -> list[ExerciseResult]:
    """Grade one chapter's answer file as it is now."""
    chapter = load_chapter(root, stem)
    return list(grade_file_safely(root, answers, chapter, list(chapter.exercises)))


def show(console: Console, results: list[ExerciseResult], hint: int = 0) -> None:
    console.rule(f"{results[0].chapter}  {time.strftime('%H:%M:%S')}")
    console.print(status_table(results))
    attempted = [r for r in results if r.status not in (PASSED, *UNATTEMPTED)]
    if attempted:
        print_details(console, attempted[0], hint)
