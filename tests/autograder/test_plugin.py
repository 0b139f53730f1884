"""`pytest tests/exercises` gives the engine's verdicts."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _pytest(course, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "autograder.plugin", "-p", "no:cacheprovider",
         "--import-mode=importlib", "tests/exercises", *arguments],
        cwd=course,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip


def test_right_answers_pass(course):
    done = _pytest(course)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout and "Points: 5 of 5" in done.stdout


def test_wrong_answers_fail_with_diagnosis_and_without_traceback(course, answer):
    answer("def mean_pool(x): return x.sum(1)")
    done = _pytest(course)
    assert done.returncode == 1
    assert "1 failed, 3 passed" in done.stdout and "Points: 3 of 5" in done.stdout
    assert "Diagnosis: sums the steps." in done.stdout
    assert "engine.py" not in done.stdout


def test_answers_come_from_another_folder(course):
    (course / "mine").mkdir()
    (course / "mine/toy.py").write_text("def broken(:")
    done = _pytest(course, "--answers", "mine")
    assert done.returncode == 1 and "4 failed" in done.stdout
