"""The terminal: `python -m autograder [chapter [exercise]]`, `... watch`; for teachers `... class
SUBMISSIONS --out DIR`, `... release DIR`, `... gradescope ZIP`."""

import argparse
import importlib
import importlib.util
import pdb
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from autograder.declarations import RUNGS, Exercise
from autograder.results import PASSED, ExerciseResult
from autograder.workspace import (
    Chapter,
    UnknownName,
    chapter_stems,
    find_exercise,
    find_root,
    load_chapter,
    unknown,
)

FOR_TEACHERS = {
    "class": "autograder.classroom.command",
    "release": "autograder.publishing.release",
    "gradescope": "autograder.publishing.gradescope",
}
Work = list[tuple[Chapter, list[Exercise]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Grade and report. 0: all points; 1: not all; 2: a name or option that does not exist."""
    words = list(sys.argv[1:] if argv is None else argv)
    for name, module in FOR_TEACHERS.items():
        if words[:1] == [name]:
            if importlib.util.find_spec(module.rpartition(".")[0]) is None:
                print(f"{name}: for teachers, not part of this copy of the course", file=sys.stderr)
                return 2
            status: int = importlib.import_module(module).main(words[1:])
            return status
    options = _parser().parse_args(argv)
    console = Console(stderr=False)
    try:
        root = find_root()
        if options.chapter == "watch":
            from autograder.watch import watch

            return watch(root, options.answers, console, hint=options.hint)
        work = select(root, options.chapter, options.exercise)
    except (UnknownName, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    if not (root / options.answers).is_dir():
        print(f"--answers: no folder {options.answers} in {root}", file=sys.stderr)
        return 2
    results = _grade(root, options, work)
    _report(results, options, console)
    return 0 if all(r.status == PASSED for r in results) else 1


def select(root: Path, chapter: str | None, exercise: str | None) -> Work:
    """The exercises meant by 'nothing', 'chapter', 'exercise' or 'chapter exercise'.

    Raises: UnknownName, with the nearest names.
    """
    if chapter is None:
        chapters = [load_chapter(root, stem) for stem in chapter_stems(root)]
        return [(c, list(c.exercises)) for c in chapters]
    if exercise is not None:
        load_chapter(root, chapter)
        found, one = find_exercise(root, f"{chapter}.{exercise}")
        return [(found, [one])]
    if chapter in chapter_stems(root):
        whole = load_chapter(root, chapter)
        return [(whole, list(whole.exercises))]
    try:
        found, one = find_exercise(root, chapter)
    except UnknownName:
        names = [e.name for s in chapter_stems(root) for e in load_chapter(root, s).exercises]
        raise UnknownName(
            unknown("chapter or exercise", chapter, chapter_stems(root) + names)
        ) from None
    return [(found, [one])]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m autograder", description=__doc__)
    parser.add_argument("chapter", nargs="?", help="a chapter, an exercise, or 'watch'")
    parser.add_argument("exercise", nargs="?", help="one exercise of the chapter")
    parser.add_argument("--hint", type=int, default=0, choices=range(len(RUNGS) + 1),
                        help="unfold so many hints")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML as well")
    parser.add_argument("--classroom", type=Path, metavar="FILE",
                        help="append the points for GitHub Classroom ($GITHUB_OUTPUT)")  # fmt: skip
    parser.add_argument("--answers", default="exercises", help="folder to grade (exercises)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs")
    parser.add_argument("--pdb", action="store_true", help="debug the first failure")
    return parser


def _grade(root: Path, options: argparse.Namespace, work: Work) -> list[ExerciseResult]:
    from autograder.worker import grade_file, grade_file_safely

    results: list[ExerciseResult] = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
                  or options.pdb) as progress:  # fmt: skip
        task = progress.add_task("grading", total=sum(len(exercises) for _, exercises in work))
        for chapter, exercises in work:
            if options.pdb:
                graded = grade_file(root, options.answers, chapter, exercises,
                                    seed=options.seed, on_failure=_debug)  # fmt: skip
            else:
                graded = grade_file_safely(
                    root, options.answers, chapter, exercises, seed=options.seed
                )
            for result in graded:
                results.append(result)
                progress.update(task, advance=1, description=f"{result.exercise}")
    return results


def _debug(error: BaseException) -> None:
    traceback.print_exception(error)
    pdb.post_mortem(error.__traceback__)


def _report(results: list[ExerciseResult], options: argparse.Namespace, console: Console) -> None:
    from autograder.reports import as_json, classroom_output, write_junit
    from autograder.terminal import print_results

    if options.junit:
        write_junit(results, options.junit)
    if options.classroom:
        with options.classroom.open("a", encoding="utf-8") as file:
            file.write(classroom_output(results))
    if options.json:
        print(as_json(results))
    else:
        print_results(console, results, options.hint)


if __name__ == "__main__":
    sys.exit(main())
