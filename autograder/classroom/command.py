"""`python -m autograder class SUBMISSIONS --out DIR`: grade a class."""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from autograder.classroom.batch import grade_class
from autograder.classroom.gradebook import gradebook, write_all
from autograder.classroom.records import InUse
from autograder.classroom.report import write_report
from autograder.classroom.submissions import Submission, find_submissions
from autograder.isolation import sandbox
from autograder.workspace import UnknownName, chapter_stems, find_root, load_chapter, unknown

REFUSED = """Cannot grade untrusted answers on this machine: {reason}.
Use a Linux machine or container with these; or, if you have read the answers, --trusted, which runs
them in plain processes that can read and write what you can."""


def main(argv: Sequence[str] | None = None) -> int:
    """0: all graded; 1: some could not be; 2: a wrong option, or no sandbox."""
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except (UnknownName, NotADirectoryError, FileNotFoundError, InUse, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what is graded is kept, the same command goes on from there",
              file=sys.stderr)  # fmt: skip
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m autograder class", description=__doc__)
    parser.add_argument("submissions", type=Path, help="folder with what students handed in")
    parser.add_argument("--out", type=Path, required=True, help="folder for verdicts and reports")
    parser.add_argument("--chapter", action="append", default=[], metavar="STEM",
                        help="only this chapter (again for more)")  # fmt: skip
    parser.add_argument("--student", action="append", default=[], metavar="NAME",
                        help="grade this student anew (again for more)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, help="how many at the same time (2)")
    parser.add_argument("--seed", type=int, help="of the inputs; by default a secret of --out's")
    parser.add_argument("--scheduler", metavar="tcp://HOST:PORT",
                        help="let the workers of a dask cluster grade")  # fmt: skip
    trust = parser.add_mutually_exclusive_group()
    trust.add_argument("--untrusted", action="store_true",
                       help="confine each answer, or refuse (the default)")  # fmt: skip
    trust.add_argument("--trusted", action="store_true",
                       help="no sandbox: for answers that you have read")  # fmt: skip
    return parser


def _run(options: argparse.Namespace) -> int:
    if not options.trusted and (reason := sandbox.unavailable()):
        print(REFUSED.format(reason=reason), file=sys.stderr)
        return 2
    root = find_root()
    stems = chapter_stems(root)
    for stem in options.chapter:
        if stem not in stems:
            raise UnknownName(unknown("chapter", stem, stems))
    submissions = find_submissions(options.submissions, options.chapter or stems)
    _check_students(options.student, submissions)
    console = Console(stderr=True)
    with _executor(options) as executor, _progress(console) as progress:
        task = progress.add_task("grading", total=len(submissions))

        def tell(submission: Submission, verdict: dict[str, Any]) -> None:
            progress.update(task, advance=1, description=f"{submission.student}"[:24])
            if "error" in verdict:
                progress.console.print(f"{submission.student}: {verdict['error']}", markup=False)

        verdicts = grade_class(
            root, submissions, options.out, executor=executor, num_jobs=options.jobs,
            is_trusted=options.trusted, seed=options.seed, again=options.student, progress=tell,
        )  # fmt: skip
    return _report(root, options.out, submissions, verdicts)


def _report(
    root: Path, out: Path, submissions: list[Submission], verdicts: dict[tuple[str, str], Any]
) -> int:
    chapters = [s for s in chapter_stems(root) if any(x.chapter == s for x in submissions)]
    points = {s: sum(e.points for e in load_chapter(root, s).exercises) for s in chapters}
    book = gradebook(submissions, verdicts, points)
    write_all(book, out)
    page = write_report(book, out)
    missing = [row for row in book.rows if row.problem]
    print(f"{len(book.students)} students, {len(verdicts)} of {len(submissions)} submissions "
          f"graded; {page}")  # fmt: skip
    for row in missing[:20]:
        print(f"  {row.student}: {row.chapter} {row.problem}")
    return 1 if missing else 0


def _check_students(wanted: list[str], submissions: list[Submission]) -> None:
    names = sorted({s.student for s in submissions})
    for name in wanted:
        if name not in names:
            raise UnknownName(unknown("student", name, names))


def _executor(options: argparse.Namespace) -> AbstractContextManager[Executor | None]:
    if options.scheduler is None:
        return nullcontext(None)
    try:
        from distributed import Client
    except ImportError:
        raise ValueError("--scheduler needs dask: pip install -e '.[cluster]'") from None
    client = Client(options.scheduler, timeout=20)
    executor: AbstractContextManager[Executor | None] = client.get_executor(pure=False, retries=3)
    return executor


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    return Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
