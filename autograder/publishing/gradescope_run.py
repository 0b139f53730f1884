"""What run_autograder calls: grade /autograder/submission, write results.json whatever happens.

The answer's code runs in processes of its own, confined where the container's kernel allows it; the
verdict is decided outside of them in any case.
"""

import json
import secrets
import sys
import traceback
from pathlib import Path

from autograder.classroom.gradebook import gradescope_results, write_whole
from autograder.classroom.submissions import find_submissions
from autograder.isolation import sandbox
from autograder.isolation.grading import IsolatedGrader
from autograder.publishing.gradescope import results_of_problem
from autograder.workspace import find_root


def main(submission: Path, results: Path, stems: list[str]) -> None:
    """Grade one student's files for the chapters `stems`."""
    try:
        text = graded(submission, stems)
    except Exception:
        print(traceback.format_exc(), file=sys.stderr)
        text = results_of_problem("The autograder failed, not your answer. Tell your instructor.")
    write_whole(results, text)


def graded(submission: Path, stems: list[str]) -> str:
    """The text of results.json."""
    found = {s.chapter: s for s in find_submissions(submission.parent, stems)
             if s.student == submission.name}  # fmt: skip
    problems = [f"{s.problem}" for s in found.values() if s.problem]
    problems += [f"{stem}.py was not handed in" for stem in stems if stem not in found]
    results = []
    with IsolatedGrader(find_root(), is_trusted=bool(sandbox.unavailable())) as grader:
        for stem, one in found.items():
            if not one.problem:
                results += grader.grade(stem, one.text, seed=secrets.randbelow(2**31))
    return json.dumps(gradescope_results(results, problems), indent=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
