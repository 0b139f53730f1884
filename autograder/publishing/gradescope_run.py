"""What run_autograder calls: grade /autograder/submission, write results.json whatever happens.

The answer's code runs in confined processes, and the verdict is decided outside of them. Where the
container's kernel can close nothing, but the harness is root, as on Gradescope, graders and results
are closed to all others and the answer runs as nobody.
"""

import json
import os
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
    except BaseException:
        print(traceback.format_exc(), file=sys.stderr)
        text = results_of_problem("The autograder failed, not your answer. Tell your instructor.")
    write_whole(results, text)


def grader_of(root: Path) -> IsolatedGrader:
    """A grader that confines answers as well as this container can. Raises: NoSandbox."""
    if not sandbox.unavailable():
        return IsolatedGrader(root)
    if not sandbox.can_change_user():
        raise sandbox.NoSandbox(f"{sandbox.unavailable()}; and this is not root")
    for name in ("tests", "misconceptions", "autograder"):
        os.chmod(root / name, 0o700)
    return IsolatedGrader(root, layers=sandbox.Layers(False, False, other_user=True))


def graded(submission: Path, stems: list[str]) -> str:
    """The text of results.json."""
    found = {s.chapter: s for s in find_submissions(submission.parent, stems)
             if s.student == submission.name}  # fmt: skip
    problems = [f"{s.problem}" for s in found.values() if s.problem]
    problems += [f"{stem}.py was not handed in" for stem in stems if stem not in found]
    results = []
    with grader_of(find_root()) as grader:
        for stem, one in found.items():
            if not one.problem:
                results += grader.grade(stem, one.text, seed=secrets.randbelow(2**31))
    return json.dumps(gradescope_results(results, problems), indent=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
