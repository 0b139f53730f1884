"""`check("rms_norm")` in a notebook: grade the answer file, or a function defined in a cell."""

import html
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# autograd.grad imports it when it is first called: half a second of some later check.
import torch.fx.experimental.symbolic_shapes  # noqa: F401

from autograder.declarations import RUNGS
from autograder.engine import grade, grade_namespace
from autograder.refusals import Refusal
from autograder.results import PASSED, CheckResult, ExerciseResult
from autograder.student import load_module, with_replacement
from autograder.workspace import find_exercise, find_root

ANSWERS = "exercises"


def check(answer: str | Callable[..., Any], name: str | None = None, *, seed: int = 0) -> "Verdict":
    """Grade the exercise called `answer` in exercises/, or a function (or class) given itself.

    A function defined in a cell is graded as the exercise `name` (by default its own name), for
    trying out; what is handed in is the file.

    Raises: UnknownName for an exercise that does not exist; the message lists those that do.
    """
    root = find_root(Path.cwd())
    chapter, exercise = find_exercise(root, name or _name_of(answer))
    source = f"{ANSWERS}/{chapter.stem}.py"
    try:
        module: Any = load_module(root / source, source)
    except Refusal as refusal:
        module = refusal
    if isinstance(answer, str):
        return Verdict(grade(chapter, exercise, module, source=source, seed=seed), source)
    adapters = None if isinstance(module, Refusal) else module
    namespace = {exercise.name: answer}
    if exercise.through and adapters is not None:
        namespace = with_replacement(adapters, exercise.through, exercise.name, answer)
    result = grade_namespace(
        chapter, exercise, namespace, adapters, source="this notebook", seed=seed
    )
    return Verdict(result, "this notebook")


def _name_of(answer: str | Callable[..., Any]) -> str:
    return answer if isinstance(answer, str) else getattr(answer, "__name__", repr(answer))


@dataclass(frozen=True)
class Verdict:
    """A result that shows itself: text in a terminal, HTML with foldable hints in a notebook."""

    result: ExerciseResult
    source: str

    def __repr__(self) -> str:
        result = self.result
        lines = [f"{result.exercise}: {result.earned:g} of {result.points:g} points"]
        for item, message in result.told():
            lines.append(f"  {'ok' if item.status == PASSED else 'no'}  {item.says}")
            lines += [f"      {message}"] if message else []
        if result.diagnosis:
            lines.append(f"  Diagnosis: {result.diagnosis.name}. {result.diagnosis.says}")
            lines.append(f"  Read {result.diagnosis.see}.")
        if result.printed:
            lines += ["  It printed:", *(f"    {line}" for line in result.printed.splitlines())]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        result = self.result
        rows = "".join(_row(item, message) for item, message in result.told())
        parts = [
            f"<div><b>{html.escape(result.exercise)}</b>: {result.earned:g} of "
            f"{result.points:g} points <small>({html.escape(self.source)})</small></div>",
            f'<table style="text-align:left">{rows}</table>',
        ]
        if result.diagnosis:
            parts.append(
                '<div style="border-left:4px solid #d55e00;padding-left:8px;margin:6px 0">'
                f"<b>Diagnosis: {html.escape(result.diagnosis.name)}.</b> "
                f"{html.escape(result.diagnosis.says)}<br>"
                f"Read {html.escape(result.diagnosis.see)}.</div>"
            )
        if result.printed:
            parts.append(f"<div>It printed:</div><pre>{html.escape(result.printed)}</pre>")
        if result.status != PASSED:
            parts += [
                f"<details><summary>Hint {i}: {rung}</summary>{html.escape(text)}</details>"
                for i, (rung, text) in enumerate(zip(RUNGS, result.hints, strict=True), 1)
            ]
        return "\n".join(parts)


def _row(item: CheckResult, message: str) -> str:
    colour, mark = ("#00795a", "ok") if item.status == PASSED else ("#b34700", "no")
    below = f"<br><small>{html.escape(message)}</small>" if message else ""
    return (
        f'<tr><td style="color:{colour};vertical-align:top"><b>{mark}</b></td>'
        f'<td style="text-align:left">{html.escape(item.says)}{below}</td></tr>'
    )
