"""Grades again at each save, from a process that has everything imported before."""

import time
from pathlib import Path

from rich.console import Console
from watchfiles import watch as watch_files

from autograder.results import PASSED, ExerciseResult
from autograder.terminal import UNATTEMPTED, print_details, status_table
from autograder.worker import grade_file_safely
from autograder.workspace import chapter_stems, load_chapter


def watch(root: Path, answers: str, console: Console, hint: int = 0) -> int:
    """Grade a chapter whenever its answer file is saved, until Ctrl-C.

    Shows the first exercise that was attempted and refused in full, and the chapter's table.
    """
    stems = chapter_stems(root)
    for stem in stems:
        load_chapter(root, stem)
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
