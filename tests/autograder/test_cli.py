"""`python -m autograder`: exit statuses, names, reports."""

import base64
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from junitparser import JUnitXml

from autograder.__main__ import main

UNTOUCHED = """
    def mean_pool(x):
        raise NotImplementedError("mean_pool: not written yet")
"""


def test_full_points_exit_0(course, capsys):
    assert main([]) == 0
    assert "5 / 5" in capsys.readouterr().out


def test_untouched_exits_1_and_stays_friendly(course, answer, capsys):
    answer(UNTOUCHED)
    assert main(["toy", "mean_pool"]) == 1
    out = capsys.readouterr().out
    assert "not written" in out and "0 / 3" in out and "Traceback" not in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tyo"], "unknown chapter or exercise 'tyo'. Did you mean toy?"),
        (["toy", "mean_pol"], "Did you mean mean_pool?"),
        (["nothing", "mean_pool"], "unknown chapter 'nothing'"),
        (["--answers", "nowhere"], "no folder nowhere"),
    ],
)
def test_rejects_unknown_names_with_the_nearest(course, capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_rejects_a_folder_without_course(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    assert "inside the course's folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, count", [([], 3), (["toy"], 3), (["num_bytes"], 1)])
def test_selects_all_a_chapter_or_an_exercise(course, capsys, arguments, count):
    assert main([*arguments, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["exercises"]) == count


def test_diagnosis_is_in_terminal_and_json(course, answer, capsys):
    answer("def mean_pool(x): return x.sum(1)")
    assert main(["toy"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "Diagnosis: sums the steps." in out
    assert "a nudge" not in out and "--hint 1" in out
    main(["toy", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (document["earned"], document["points"]) == (3, 5)
    assert document["exercises"][0]["diagnosis"]["name"] == "sums the steps"


def test_hints_unfold_one_by_one(course, answer, capsys):
    answer(UNTOUCHED)
    main(["toy", "mean_pool", "--hint", "2"])
    out = capsys.readouterr().out
    assert "a nudge" in out and "a reason" in out and "a program" not in out


def test_junit_counts_every_check(course, answer, capsys, tmp_path):
    answer("def mean_pool(x): return x.sum(1)")
    main(["--junit", str(tmp_path / "out.xml")])
    suite = next(iter(JUnitXml.fromfile(str(tmp_path / "out.xml"))))
    assert (suite.tests, suite.failures) == (4, 1)


def test_file_that_does_not_import_costs_only_its_chapter(course, answer, capsys):
    for kind in ("misconceptions", "exercises"):
        (course / kind / "other.py").write_text((course / kind / "toy.py").read_text())
    grader = (course / "tests/exercises/test_toy.py").read_text()
    (course / "tests/exercises/test_other.py").write_text(grader)
    answer("def broken(:")
    assert main(["--json"]) == 1
    exercises = json.loads(capsys.readouterr().out)["exercises"]
    by_chapter = {e["chapter"]: e["status"] for e in exercises}
    assert by_chapter == {"toy": "import failed", "other": "passed"}


def test_watch_grades_on_save(course):
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "autograder", "watch"],
        cwd=course,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert "Watching" in process.stdout.readline()
        path = course / "exercises/toy.py"
        deadline = time.monotonic() + 30
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: [lines.put(x) for x in process.stdout], daemon=True).start()
        seen = ""
        while "5 / 5" not in seen and time.monotonic() < deadline:
            path.write_text(path.read_text() + "\n")
            with contextlib.suppress(queue.Empty):
                while True:
                    seen += lines.get(timeout=1)
        assert "5 / 5" in seen
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_untouched_repair_is_not_reported_as_a_mistake(course, answer, capsys):
    grader, catalogue = course / "tests/exercises/test_toy.py", course / "misconceptions/toy.py"
    text = grader.read_text().replace('"mean_pool", **FACTS', '"mean_pool", **REPAIR')
    facts = 'REPAIR = {**FACTS, "kind": "repair"}\n\n@exercise("mean_pool"'
    grader.write_text(text.replace('@exercise("mean_pool"', facts))
    text = catalogue.read_text().replace("their number.", "their number, untouched.")
    catalogue.write_text(text.replace('see="1. Pooling")\ndef sums',
                                      'see="1. Pooling", is_starter=True)\ndef sums'))  # fmt: skip
    answer("def mean_pool(x): return x.sum(1)")
    assert main([]) == 1
    everything = capsys.readouterr().out
    assert "not repaired" in everything and "untouched" not in everything
    main(["mean_pool"])
    assert "untouched" in capsys.readouterr().out


def test_tells_github_classrooms_reporter_the_points(course, answer, tmp_path):
    """In the form that its action reads: $GITHUB_OUTPUT has result=, base64 of JSON."""
    answer("def mean_pool(x):\n    return x.sum(1)")
    output = tmp_path / "github_output"
    output.write_text("earlier=1\n")
    assert main(["--classroom", str(output)]) == 1
    earlier, line = output.read_text().splitlines()
    assert earlier == "earlier=1" and line.startswith("result=")
    told = json.loads(base64.b64decode(line.removeprefix("result=")))
    assert told["status"] == "fail" and told["max_score"] == 5
    assert sum(test["score"] for test in told["tests"]) == 3
    assert [test["status"] for test in told["tests"]] == ["fail", "pass", "pass"]
    assert "You added the steps up" in told["tests"][0]["message"]
