"""`python -m autograder release DIR`: the course as students get it.

Left out are solutions, the authors' sources, tests and tools, other right answers, and history.
Graders and misconceptions stay: `check()` needs both to grade and to explain on the student's own
machine. For marks, `python -m autograder class` uses its own copies, and inputs nobody has seen.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from autograder.workspace import find_root

LEFT_OUT = (
    "solutions/", "notebooks/src/", "benchmarks/", "docs/", ".ci/", ".github/", "tools/slides/",
    "autograder/publishing/", "autograder/classroom/", ".pre-commit-config.yaml",
    "CONTRIBUTING.md", "tests/exercises/test_catalogue.py",
)  # fmt: skip
KEPT_TOOLS = ("tools/__init__.py", "tools/fetch_model.py")
AUTHORS = "## For instructors and authors"
DATE = "2000-01-01T00:00:00+00:00"

WORKFLOW = """\
# GitHub Classroom: grade each push, show the points to the student and on the teacher's page. The
# names of this workflow and its job are those that GitHub Classroom looks for. Graders lie in the
# student's own repository: for marks, run `python -m autograder class` on what was handed in.
name: Autograding Tests
on: [push, workflow_dispatch]
permissions:
  checks: write
  actions: read
  contents: read
jobs:
  run-autograding-tests:
    runs-on: ubuntu-latest
    if: github.actor != 'github-classroom[bot]'
    timeout-minutes: 60
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with: {python-version: "3.11", cache: pip, cache-dependency-path: constraints.txt}
      - run: python -m pip install --quiet -c constraints.txt -e .
      - id: course
        run: python -m autograder --classroom "$GITHUB_OUTPUT" --junit points.xml || test $? = 1
      - if: always()
        uses: actions/upload-artifact@v4
        with: {name: points, path: points.xml}
      - uses: classroom-resources/autograding-grading-reporter@v1
        env:
          COURSE_RESULTS: "${{ steps.course.outputs.result }}"
        with:
          runners: course
"""

MAKEFILE = """\
# `make lab` opens the course; the rest of the commands is in README.md.

PYTHON ?= python3
VENV   ?= .venv
LAB    ?=
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
MODEL  := .cache/smollm2-135m/model.safetensors

.PHONY: lab model grade

$(READY): pyproject.toml constraints.txt
\ttest -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
\t$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
\t@touch $@

$(MODEL): | $(READY)
\t$(BIN)/python -m tools.fetch_model

model: $(MODEL)

lab: $(READY)
\t@test -f $(MODEL) || $(MAKE) --no-print-directory model || true
\t$(BIN)/jupyter lab $(LAB) notebooks/00_start_here.ipynb

grade: $(READY)
\t$(BIN)/python -m autograder
"""


class CannotPublish(RuntimeError):
    """What stands in the way, and what to do about it."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m autograder release", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="new or empty")
    options = parser.parse_args(argv)
    try:
        release(find_root(), options.folder)
    except (CannotPublish, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.folder}: a repository of one commit, ready to push")
    return 0


def release(root: Path, folder: Path) -> None:
    """Write the students' repository to `folder`; it appears whole or not at all.

    Raises: CannotPublish for a folder with something in it, a course that is not in git, or one
    whose exercises a student has begun to fill in.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CannotPublish(f"{folder}: expected a new or an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".release-", dir=folder.parent))
    try:
        write_files(root, draft)
        _commit(draft)
        if folder.exists():
            folder.rmdir()
        os.chmod(draft, 0o755)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_files(root: Path, folder: Path) -> None:
    """The students' files, without a repository around them."""
    for name in students_files(root):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target)
        shutil.copymode(root / name, target)
    for catalogue in sorted((folder / "misconceptions").glob("*.py")):
        catalogue.write_text(without_alternatives(catalogue.read_text(encoding="utf-8")),
                             encoding="utf-8")  # fmt: skip
    readme = folder / "README.md"
    if readme.exists():
        readme.write_text(for_students(readme.read_text(encoding="utf-8")), encoding="utf-8")
    (folder / "Makefile").write_text(MAKEFILE)
    workflow = folder / ".github" / "workflows" / "classroom.yml"
    workflow.parent.mkdir(parents=True)
    workflow.write_text(WORKFLOW)


def students_files(root: Path) -> Iterator[str]:
    """The tracked files that students get. Raises: CannotPublish."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if listed.returncode:
        raise CannotPublish(f"{root}: expected a git repository, to know which files belong to it")
    changed = subprocess.run(
        ["git", "diff", "--name-only", "HEAD", "--", "exercises"],
        cwd=root, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    if changed:
        raise CannotPublish(
            f"{', '.join(changed)}: filled in or changed since the last commit; commit, or take "
            "the changes back, so that students get exercises as they should"
        )
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith(LEFT_OUT) or not (root / name).is_file():
            continue
        parts = PurePosixPath(name).parts
        if parts[0] == "tests" and parts[1:2] != ("exercises",):
            continue
        if parts[0] == "tools" and name not in KEPT_TOOLS:
            continue
        yield name


def without_alternatives(source: str) -> str:
    """A catalogue without its other right answers, and without helpers that only they use."""
    lines = source.splitlines(keepends=True)
    while cut := _unneeded("".join(lines)):
        for first, last in sorted(cut, reverse=True):
            del lines[first:last]
    return "".join(lines)


def _unneeded(source: str) -> list[tuple[int, int]]:
    """Lines of alternatives, or else of private functions that nothing names."""
    tree = ast.parse(source)
    functions = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    rights = [n for n in functions if any(_is_alternative(d) for d in n.decorator_list)]
    named = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    unused = [n for n in functions if n.name not in named and not n.decorator_list]
    spans = []
    for node in rights or unused:
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        assert node.end_lineno is not None
        spans.append((first - 1, node.end_lineno))
    return spans


def _is_alternative(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(called, ast.Name) and called.id == "alternative"


def for_students(readme: str) -> str:
    """The README without what is about the authors' files."""
    before, _, rest = readme.partition(AUTHORS)
    start, end = before.find("## Layout"), before.find("The real inputs are")
    if 0 <= start < end:
        before = before[:start] + "## Real inputs\n\n" + before[end:]
    licence = rest[rest.find("Code and text are under") :] if "Code and text" in rest else ""
    lines = [line for line in before.splitlines() if not line.startswith("make test ")]
    return "\n".join(lines).rstrip() + "\n\n" + licence


def _commit(folder: Path) -> None:
    """One commit, the same for the same files."""
    author = {
        "GIT_AUTHOR_NAME": "course", "GIT_AUTHOR_EMAIL": "course@example.org",
        "GIT_COMMITTER_NAME": "course", "GIT_COMMITTER_EMAIL": "course@example.org",
        "GIT_AUTHOR_DATE": DATE, "GIT_COMMITTER_DATE": DATE, "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
    }  # fmt: skip
    for command in (["init", "--quiet", "--initial-branch=main"], ["add", "--all", "--force"],
                    ["commit", "--quiet", "--message=The course"]):  # fmt: skip
        subprocess.run(["git", *command], cwd=folder, check=True, env={**os.environ, **author})
