"""What leaves the authors' repository: complete, without answers, and it works where it goes."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import yaml

from autograder.isolation import sandbox
from autograder.publishing import gradescope_run
from autograder.publishing.gradescope import main as gradescope
from autograder.publishing.gradescope import write_archive
from autograder.publishing.release import (
    CannotPublish,
    main,
    release,
    without_alternatives,
    write_files,
)
from autograder.workspace import chapter_stems, find_root, load_chapter

ROOT = find_root(Path(__file__).parent)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "course"
    release(ROOT, folder)
    return folder


def _python(folder, *arguments, **more):
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=environment,
                          capture_output=True, text=True, **more)  # fmt: skip


def _grades(folder, *arguments):
    done = _python(folder, "-m", "autograder", *arguments, "--json")
    return json.loads(done.stdout), done


def _answers():
    """Of each function or class to write: the blocks of its solution."""
    for path in sorted((ROOT / "solutions").glob("*.py")):
        text = path.read_text()
        for node in ast.parse(text).body:
            lines = "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
            parts = lines.split("# BEGIN SOLUTION\n")[1:]
            blocks = [re.split(r" *# (?:STARTER|END SOLUTION)", part)[0] for part in parts]
            if sum(block.count("\n") for block in blocks) > 2:
                yield f"{path.stem}: {getattr(node, 'name', '')}", blocks


def test_no_answer_is_in_a_release(released):
    texts = [
        path.read_text(errors="replace")
        for path in released.rglob("*")
        if path.is_file() and ".git" not in path.parts
    ]
    answers = dict(_answers())
    assert len(answers) > 100
    for name, blocks in answers.items():
        assert not any(all(block in text for block in blocks) for text in texts), name
    assert not (released / "solutions").exists()
    assert not any("# BEGIN SOLUTION" in text for text in texts)
    catalogues = (released / "misconceptions").glob("*.py")
    assert not any("@alternative(" in path.read_text() for path in catalogues)


def test_a_release_has_one_commit_and_is_the_same_each_time(released, tmp_path):
    def git(folder, *words):
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True).stdout

    assert git(released, "rev-list", "--all", "--count").strip() == "1"
    assert git(released, "status", "--short") == ""
    release(ROOT, tmp_path / "again")
    assert git(released, "rev-parse", "HEAD") == git(tmp_path / "again", "rev-parse", "HEAD")


def test_students_work_in_a_release(released, tmp_path):
    """Untouched: nothing. Solved: everything. A known mistake: its name."""
    course = tmp_path / "course"
    shutil.copytree(released, course)
    untouched, _ = _grades(course, "normalization")
    assert untouched["earned"] == 0 and untouched["points"] == 55
    solution = (ROOT / "solutions/normalization.py").read_text()
    (course / "exercises/normalization.py").write_text(solution)
    solved, _ = _grades(course, "normalization")
    assert solved["earned"] == solved["points"] == 55
    mistake = next(m for m in load_chapter(ROOT, "normalization").misconceptions
                   if m.exercise == "rms_norm")  # fmt: skip
    catalogue = (ROOT / "misconceptions/normalization.py").read_text()
    name = mistake.implementation.__name__
    text = f"{solution}\n{catalogue}\nrms_norm = {name}\n"
    (course / "exercises/normalization.py").write_text(text)
    wrong, _ = _grades(course, "rms_norm")
    assert wrong["exercises"][0]["diagnosis"]["name"] == mistake.name
    by_pytest = _python(course, "-m", "pytest", "-q", "tests/exercises/test_start_here.py")
    assert "not written yet" in by_pytest.stdout
    assert not (course / "autograder/classroom").exists()


def test_github_classroom_gets_the_points(released):
    """Workflow and job have the names that it looks for; the reporter finds the grader's result."""
    workflow = yaml.safe_load((released / ".github/workflows/classroom.yml").read_text())
    assert workflow["name"] == "Autograding Tests"
    steps = workflow["jobs"]["run-autograding-tests"]["steps"]
    grading = next(step for step in steps if step.get("id"))
    assert '--classroom "$GITHUB_OUTPUT"' in grading["run"]
    reporter = next(s for s in steps if "autograding-grading-reporter" in s.get("uses", ""))
    runner = reporter["with"]["runners"]
    assert runner == grading["id"]
    result = reporter["env"][f"{runner.upper()}_RESULTS"]
    assert result == f"${{{{ steps.{runner}.outputs.result }}}}"


def test_catalogues_keep_every_misconception(released):
    for stem in chapter_stems(ROOT):
        ours, theirs = load_chapter(ROOT, stem), load_chapter(released, stem)
        assert [m.name for m in theirs.misconceptions] == [m.name for m in ours.misconceptions]
        assert not theirs.alternatives


def test_helpers_of_alternatives_go_with_them():
    source = (
        "from autograder import alternative, misconception\n\n"
        "def _both(x):\n    return x\n\ndef _right(x):\n    return _deeper(x)\n\n"
        "def _deeper(x):\n    return x\n\n"
        '@misconception("f", "wrong", see="1")\ndef wrong(x):\n    return _both(x)\n\n'
        '@alternative("f")\ndef right(x):\n    return _both(_right(x))\n'
    )
    left = without_alternatives(source)
    names = [n.name for n in ast.parse(left).body if isinstance(n, ast.FunctionDef)]
    assert names == ["_both", "wrong"]


def test_rejects_a_folder_in_use_and_a_course_outside_of_git(tmp_path, course, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(CannotPublish, match="new or an empty folder"):
        release(ROOT, tmp_path / "full")
    assert (tmp_path / "full/mine.txt").read_text() == "mine"
    assert main([str(tmp_path / "new")]) == 2
    assert "expected a git repository" in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".release-*"))


def test_gradescopes_harness(tmp_path_factory):
    """/autograder as the harness lays it out, in a folder of its own."""
    home = tmp_path_factory.mktemp("autograder")
    archive = tmp_path_factory.mktemp("upload") / "normalization.zip"
    write_archive(ROOT, archive, ["normalization"])
    again = archive.with_name("again.zip")
    write_archive(ROOT, again, ["normalization"])
    assert archive.read_bytes() == again.read_bytes()
    (home / "source").mkdir()
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(home / "source")
        assert packed.getinfo("run_autograder").external_attr >> 16 == 0o100755
        assert not [n for n in packed.namelist() if "solutions/" in n]
    runner = home / "run_autograder"
    shutil.copy(home / "source/run_autograder", runner)
    runner.chmod(0o755)
    (home / "submission").mkdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def graded():
        environment = {**os.environ, "AUTOGRADER_HOME": str(home), "PATH": path}
        done = subprocess.run([runner], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads((home / "results/results.json").read_text())

    nothing = graded()
    assert nothing["score"] == 0 and "was not handed in" in nothing["output"]
    answers = home / "submission/normalization.py"
    shutil.copy(ROOT / "solutions/normalization.py", answers)
    right = graded()
    assert right["score"] == 55 == sum(t["max_score"] for t in right["tests"])
    answers.write_text("import os\nos._exit(0)\n")
    assert graded()["score"] == 0


@pytest.mark.skipif(not sandbox.can_change_user(), reason="needs root")
def test_where_gradescopes_kernel_closes_nothing_answers_run_as_nobody(monkeypatch):
    """They can compute, but read no grader and write no results."""
    monkeypatch.setattr(sandbox, "layers", lambda: sandbox.Layers(False, False))
    reads = (ROOT / "solutions/start_here.py").read_text() + (
        "\nimport pathlib\n"
        "def mean_pool(hidden, is_real):\n"
        "    raise ValueError(pathlib.Path({path!r}).read_text()[:60])\n"
    )
    with tempfile.TemporaryDirectory() as home:
        course = Path(home) / "source"
        course.mkdir()
        os.chmod(home, 0o755)
        write_files(ROOT, course)
        with gradescope_run.grader_of(course) as grader:
            right = grader.grade("start_here", (ROOT / "solutions/start_here.py").read_bytes())
            assert all(r.earned == r.points for r in right)
            for path, told in (
                ("tests/exercises/test_start_here.py", "PermissionError"),
                ("misconceptions/start_here.py", "PermissionError"),
                ("README.md", "# LLM systems"),
            ):
                text = reads.format(path=str(course / path)).encode()
                (result,) = grader.grade("start_here", text)
                assert result.earned == 0 and told in repr(result), path
    monkeypatch.setattr(sandbox, "can_change_user", lambda: False)
    with pytest.raises(sandbox.NoSandbox, match="this is not root"):
        gradescope_run.grader_of(ROOT)


def test_gradescope_rejects_an_unknown_chapter(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    assert gradescope([str(tmp_path / "a.zip"), "--chapter", "normalisation"]) == 2
    assert "Did you mean normalization" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
