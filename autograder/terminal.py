"""Verdicts in a terminal: a status table, and the details of what was attempted and refused."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from autograder import refusals
from autograder.declarations import RUNGS
from autograder.results import PASSED, ExerciseResult

UNATTEMPTED = (refusals.NOT_WRITTEN, refusals.NOT_REPAIRED, refusals.NOT_RUN)


def print_results(console: Console, results: Sequence[ExerciseResult], hint: int = 0) -> None:
    """Print the details of refused attempts, then the table. `hint` rungs of each ladder unfold.

    An exercise asked for alone shows its details even where nobody has begun it.
    """
    for result in results:
        is_asked = len(results) == 1 or bool(hint) or result.status not in UNATTEMPTED
        if result.status != PASSED and is_asked:
            print_details(console, result, hint)
    console.print(status_table(results))


def print_details(console: Console, result: ExerciseResult, hint: int = 0) -> None:
    """Print one exercise's checks, messages, diagnosis and the first `hint` hints."""
    console.print(
        f"\n[bold]{escape(result.exercise)}[/]  {result.earned:g} of {result.points:g} points"
        f"  ({escape(result.chapter)})"
    )
    for check, message in result.told():
        mark = "[green]ok[/]" if check.status == PASSED else "[red]no[/]"
        console.print(
            f"  {mark}  {escape(check.says)}  [dim]{check.points:g} p[/]", highlight=False
        )
        if message:
            console.print(Padding(escape(message), (0, 0, 0, 6)), highlight=False)
    if result.diagnosis:
        console.print(
            Padding(
                f"[bold yellow]Diagnosis: {escape(result.diagnosis.name)}.[/] "
                f"{escape(result.diagnosis.says)}\nRead {escape(result.diagnosis.see)}.",
                (0, 0, 0, 2),
            ),
            highlight=False,
        )
    if result.printed:
        console.print(Padding(f"[dim]It printed:\n{escape(result.printed)}[/]", (0, 0, 0, 2)))
    if result.status != PASSED:
        _print_hints(console, result, hint)


def _print_hints(console: Console, result: ExerciseResult, hint: int) -> None:
    for rung, text in list(zip(RUNGS, result.hints, strict=True))[:hint]:
        console.print(Padding(f"[bold]{rung}:[/] {escape(text)}", (0, 0, 0, 2)), highlight=False)
    if hint < len(RUNGS):
        console.print(
            f"  [dim]Next hint: python -m autograder {escape(result.chapter)} "
            f"{escape(result.exercise)} --hint {hint + 1}  ({RUNGS[hint]})[/]",
            highlight=False,
            soft_wrap=True,
        )


def status_table(results: Sequence[ExerciseResult]) -> Table:
    """One row an exercise, a total below."""
    table = Table(show_footer=True)
    earned, points = sum(r.earned for r in results), sum(r.points for r in results)
    table.add_column("chapter", footer="total")
    table.add_column("exercise")
    table.add_column("points", justify="right", footer=f"{earned:g} / {points:g}")
    table.add_column("status")
    chapter = ""
    for result in results:
        status = result.status
        colour = "green" if status == PASSED else "dim" if status in UNATTEMPTED else "red"
        named = ""
        if result.diagnosis and status not in UNATTEMPTED:
            named = f": {result.diagnosis.name}"
        table.add_row(
            escape(result.chapter) if result.chapter != chapter else "",
            escape(result.exercise),
            f"{result.earned:g} / {result.points:g}",
            f"[{colour}]{escape(status + named)}[/]",
        )
        chapter = result.chapter
    return table
