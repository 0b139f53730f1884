"""Who has what: the verdicts of a class as rows, and the files that other systems take in."""

import csv
import hashlib
import io
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autograder import refusals
from autograder.classroom.submissions import Submission
from autograder.reports import write_junit
from autograder.results import ExerciseResult

FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass
class Row:
    """One student and one chapter; `problem` says why there is no verdict."""

    student: str
    student_id: str
    chapter: str
    results: list[ExerciseResult] = field(default_factory=list)
    problem: str = ""
    digest: str = ""

    @property
    def earned(self) -> float:
        return sum(r.earned for r in self.results)

    @property
    def points(self) -> float:
        return sum(r.points for r in self.results)

    @property
    def unverified(self) -> float:
        """Points that hang on checks which a person must look at."""
        return sum(
            c.points for r in self.results for c in r.checks if c.status == refusals.UNVERIFIED
        )


class Gradebook:
    """The rows of a class, with the points that each chapter has."""

    def __init__(self, rows: list[Row], points: dict[str, float]) -> None:
        self.rows, self.points = rows, points
        self.chapters = [c for c in points if any(r.chapter == c for r in rows)]
        self.of_student: dict[str, list[Row]] = {}
        for row in rows:
            self.of_student.setdefault(row.student, []).append(row)
        self.students = list(self.of_student)

    def earned(self, student: str, chapter: str) -> float | None:
        """Points of a student; None where nothing was handed in."""
        rows = [r for r in self.of_student[student] if r.chapter == chapter]
        return rows[0].earned if rows else None

    def copies(self) -> list[list[str]]:
        """Groups of students whose answers to a chapter are the same, byte for byte."""
        same: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.digest:
                same.setdefault((row.chapter, row.digest), []).append(row.student)
        return [
            [chapter, *students] for (chapter, _), students in same.items() if len(students) > 1
        ]


def gradebook(
    submissions: list[Submission],
    verdicts: dict[tuple[str, str], dict[str, Any]],
    points: dict[str, float],
) -> Gradebook:
    """Join submissions with their verdicts. `points`: of each chapter, in the course's order."""
    rows = []
    for s in submissions:
        verdict = verdicts.get((s.student, s.chapter))
        problem = s.problem or ("" if verdict else "not graded: the grader failed, run it again")
        results = [ExerciseResult.from_dict(r) for r in verdict["results"]] if verdict else []
        digest = s.digest if s.text else ""
        rows.append(Row(s.student, s.student_id, s.chapter, results, problem, digest))
    return Gradebook(rows, points)


def write_all(book: Gradebook, out: Path) -> list[Path]:
    """Write every format; each file appears whole or not at all. Returns their paths."""
    texts = {
        "scores.csv": scores_csv(book),
        "exercises.csv": exercises_csv(book),
        "canvas.csv": canvas_csv(book),
        "moodle.csv": moodle_csv(book),
        "results.json": results_json(book),
    }
    for student in book.students:
        name = safe_name(student)
        texts[f"gradescope/{name}.json"] = gradescope_json(book, student)
    written = [write_whole(out / name, text) for name, text in texts.items()]
    for student in book.students:
        results = [r for row in book.of_student[student] for r in row.results]
        if results:
            path = out / "junit" / f"{safe_name(student)}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".tmp")
            write_junit(results, draft)
            os.replace(draft, path)
            written.append(path)
    return written


def write_whole(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8", errors="replace", newline="")
    os.replace(draft, path)
    return path


def scores_csv(book: Gradebook) -> str:
    """A line a student, a column a chapter: points, empty where nothing was handed in."""
    lines: list[list[Any]] = [["student", "id", *book.chapters, "total", "of", "to look at"]]
    for student in book.students:
        rows = book.of_student[student]
        scores = [book.earned(student, chapter) for chapter in book.chapters]
        notes = [f"{r.chapter or 'file'}: {r.problem}" for r in rows if r.problem]
        notes += [
            f"{r.chapter}: {r.unverified:g} points not verified" for r in rows if r.unverified
        ]
        lines.append([
            student, _id(rows), *("" if s is None else f"{s:g}" for s in scores),
            f"{sum(s or 0 for s in scores):g}", f"{sum(book.points[c] for c in book.chapters):g}",
            "; ".join(notes),
        ])  # fmt: skip
    return _csv(lines)


def exercises_csv(book: Gradebook) -> str:
    """A line a student and exercise, with the diagnosis."""
    lines: list[list[Any]] = [
        ["student", "id", "chapter", "exercise", "points", "of", "status", "diagnosis"]
    ]
    for row in book.rows:
        for r in row.results:
            named = r.diagnosis.name if r.diagnosis else ""
            lines.append([row.student, row.student_id, row.chapter, r.exercise, f"{r.earned:g}",
                          f"{r.points:g}", r.status, named])  # fmt: skip
    return _csv(lines)


def canvas_csv(book: Gradebook) -> str:
    """What Canvas imports: a column a chapter, the points possible in the second line."""
    columns = [f"{c.replace('_', ' ').capitalize()}" for c in book.chapters]
    lines: list[list[Any]] = [["Student", "ID", "SIS Login ID", "Section", *columns]]
    possible = [f"{book.points[c]:g}" for c in book.chapters]
    lines.append(["    Points Possible", "", "", "", *possible])
    for student in book.students:
        rows = book.of_student[student]
        scores = [book.earned(student, c) for c in book.chapters]
        shown = ["" if s is None else f"{s:g}" for s in scores]
        lines.append([student, _id(rows), "", "", *shown])
    return _csv(lines)


def moodle_csv(book: Gradebook) -> str:
    """What Moodle's grading worksheet imports, a line a student and chapter."""
    lines: list[list[Any]] = [
        ["Identifier", "Full name", "Assignment", "Grade", "Maximum grade", "Feedback comments"]
    ]
    for row in book.rows:
        number = f"Participant {row.student_id}" if row.student_id else ""
        said = row.problem or "; ".join(
            f"{r.exercise}: {r.earned:g} of {r.points:g}"
            + (f" ({r.diagnosis.name})" if r.diagnosis else "")
            for r in row.results
        )
        lines.append([number, row.student, row.chapter, f"{row.earned:g}",
                      f"{book.points.get(row.chapter, 0):g}", said])  # fmt: skip
    return _csv(lines)


def results_json(book: Gradebook) -> str:
    """Everything, for programs."""
    students = [
        {
            "student": row.student, "id": row.student_id, "chapter": row.chapter,
            "earned": row.earned, "points": book.points.get(row.chapter, 0.0),
            "unverified": row.unverified, "problem": row.problem,
            "exercises": [r.to_dict() for r in row.results],
        }
        for row in book.rows
    ]  # fmt: skip
    return json.dumps({"points": book.points, "submissions": students}, indent=1)


def gradescope_json(book: Gradebook, student: str) -> str:
    """A student's results.json as Gradescope's harness reads it."""
    rows = book.of_student[student]
    results = [r for row in rows for r in row.results]
    problems = [row.problem for row in rows if row.problem]
    return json.dumps(gradescope_results(results, problems), indent=1)


def gradescope_results(results: list[ExerciseResult], problems: list[str]) -> dict[str, Any]:
    """One test a check; what a student reads is what the terminal says."""
    tests = []
    for result in results:
        is_void = result.all_or_nothing and not result.earned
        for check, message in result.told():
            said = message
            if result.diagnosis and message:
                said = f"{result.diagnosis.says} Read {result.diagnosis.see}.\n{message}"
            tests.append({
                "name": f"{result.exercise}: {check.says}", "max_score": check.points,
                "score": 0.0 if is_void else check.earned, "output": said or check.status,
                "status": "passed" if check.status == "passed" else "failed",
                "visibility": "visible",
            })  # fmt: skip
    return {
        "score": sum(r.earned for r in results),
        "output": "\n".join(problems),
        "visibility": "visible",
        "tests": tests,
    }


def safe_name(student: str) -> str:
    """A file name for a student that no other has and that stays in its folder."""
    plain = re.sub(r"[^A-Za-z0-9-]+", "-", student).strip("-")[:60]
    if plain and plain == student:
        return plain
    return f"{plain or 'student'}-{hashlib.sha256(student.encode()).hexdigest()[:8]}"


def _id(rows: list[Row]) -> str:
    return next((r.student_id for r in rows if r.student_id), "")


def _csv(lines: list[list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerows([[_cell(cell) for cell in line] for line in lines])
    return text.getvalue()


def _cell(cell: Any) -> str:
    """A text that a spreadsheet will not take for a formula."""
    text = str(cell)
    is_number = re.fullmatch(r"-?\d+(\.\d+)?", text) is not None
    return f"'{text}" if text.startswith(FORMULA) and not is_number else text
