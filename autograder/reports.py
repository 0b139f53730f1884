"""Verdicts for machines: JSON, JUnit XML, and what GitHub Classroom's reporter takes."""

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autograder import refusals
from autograder.results import PASSED, ExerciseResult


def as_json(results: Sequence[ExerciseResult]) -> str:
    """All results, with totals, as one JSON document."""
    document: dict[str, Any] = {
        "earned": sum(r.earned for r in results),
        "points": sum(r.points for r in results),
        "exercises": [r.to_dict() for r in results],
    }
    return json.dumps(document, indent=2)


def write_junit(results: Sequence[ExerciseResult], path: Path) -> None:
    """Write one test suite a chapter, one test case a check."""
    from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

    document = JUnitXml()
    for chapter in dict.fromkeys(r.chapter for r in results):
        suite = TestSuite(chapter)
        for result in (r for r in results if r.chapter == chapter):
            for check in result.checks:
                case = TestCase(_xml(check.says), f"{chapter}.{result.exercise}")
                if check.status == refusals.NOT_RUN:
                    case.result = [Skipped(check.status)]
                elif check.status != PASSED:
                    named = f"Diagnosis: {result.diagnosis.name}. " if result.diagnosis else ""
                    case.result = [Failure(_xml(named + check.message), check.status)]
                suite.add_testcase(case)
        document.add_testsuite(suite)
    document.update_statistics()
    document.write(str(path), pretty=True)


def _xml(text: str) -> str:
    """Text without the characters that XML 1.0 has no way to write."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def classroom_output(results: Sequence[ExerciseResult]) -> str:
    """A step's output `result=...` for the action classroom-resources/autograding-grading-reporter:
    base64 of a JSON document with a test for each exercise."""
    tests = [
        {
            "name": f"{r.chapter}: {r.exercise}",
            "status": "pass" if r.status == PASSED else "fail",
            "score": r.earned,
            "message": (f"{r.status}. {r.diagnosis.says}" if r.diagnosis else r.status)[:1000],
        }
        for r in results
    ]
    document = {
        "version": 3,
        "status": "pass" if all(r.status == PASSED for r in results) else "fail",
        "max_score": sum(r.points for r in results),
        "tests": tests,
    }
    return f"result={base64.b64encode(json.dumps(document).encode()).decode()}\n"
