"""A class is graded: found, resumed after any kill, told to every system, nothing doubled."""

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from autograder.classroom import command
from autograder.classroom.batch import VERDICTS, grade_class
from autograder.classroom.gradebook import safe_name
from autograder.classroom.grader_process import GraderProcess, close_all
from autograder.classroom.records import InUse, Records
from autograder.classroom.submissions import find_submissions
from autograder.isolation import sandbox
from tests.autograder.conftest import ANSWERS, CATALOGUE

HOUSE = Path(__file__).parents[2]
IS_THOROUGH = bool(os.environ.get("THOROUGH"))  # all kills, in minutes
pytestmark = pytest.mark.skipif(bool(sandbox.unavailable()), reason=sandbox.unavailable())

SUMS = ANSWERS.replace("x.mean(1)", "x.sum(1)")
ALTERNATIVE = ANSWERS.replace("x.mean(1)", "x.sum(1) / x.shape[1]")
UNTOUCHED = """
def mean_pool(x):
    raise NotImplementedError("mean_pool: not written yet")
def num_bytes(rows, columns):
    raise NotImplementedError("num_bytes: not written yet")
class Counter:
    def __init__(self):
        raise NotImplementedError("Counter: not written yet")
"""
# Of every kind that a class hands in: the text, the points of 5, the status of each exercise.
KINDS = {
    "right": (ANSWERS.encode(), 5, ["passed"] * 3),
    "alternative": (ALTERNATIVE.encode(), 5, ["passed"] * 3),
    "sums": (SUMS.encode(), 3, ["wrong value", "passed", "passed"]),
    "untouched": (UNTOUCHED.encode(), 0, ["not written"] * 3),
    "syntax": (b"def mean_pool(x:\n", 0, ["import failed"] * 3),
    "empty": (b"", 0, ["missing"] * 3),
    "utf16": (ANSWERS.encode("utf-16"), 0, ["import failed"] * 3),
    "latin1": (b"# -*- coding: latin-1 -*-\n# \xe9t\xe9\n" + ANSWERS.encode(), 5, ["passed"] * 3),
    "not utf8": (b'season = "\xe9t\xe9"\n' + ANSWERS.encode(), 0, ["import failed"] * 3),
    "windows": (b"\xef\xbb\xbf" + ANSWERS.replace("\n", "\r\n").encode(), 5, ["passed"] * 3),
    "nulls": (b"\0" * 100, 0, ["import failed"] * 3),
    "huge": (b"#" * (2**20 + 1), 0, []),
    "missing one": (ANSWERS.replace("num_bytes", "bytes_of").encode(), 4,
                    ["passed", "missing", "passed"]),
    "exits": (ANSWERS.encode() + b"\nimport os\nos._exit(0)\n", 0, ["ended the process"] * 3),
    "raises": (ANSWERS.replace("x.mean(1)", "1 / 0").encode(), 2, ["raised", "passed", "passed"]),
    "never ends": (ANSWERS.replace("return x.mean(1)", "while True: pass").encode(), 2,
                   ["out of time", "passed", "passed"]),
}  # fmt: skip


def _hand_in(folder, counts):
    """`counts` students of each kind, all files different: {name: kind}."""
    made = {}
    for kind, (text, *_) in KINDS.items():
        for i in range(counts if kind != "never ends" else min(counts, 4)):
            name = f"{kind.replace(' ', '-')}-{i}"
            (folder / name).mkdir(parents=True)
            unlike = text if kind in ("empty", "utf16", "huge", "nulls") else text + b"\n# %d" % i
            (folder / name / "toy.py").write_bytes(unlike)
            made[name] = kind
    return made


def _run(*arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "autograder", "class", *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HOUSE)}, **more,
    )  # fmt: skip


def _in_process(*arguments):
    return command.main([str(a) for a in arguments])


def _verdicts(out):
    data = json.loads((out / "results.json").read_text())
    return {s["student"]: s for s in data["submissions"]}


def test_every_kind_gets_the_expected_verdicts(course, tmp_path_factory):
    """Two hundred, of real chapters: test_class_of_chapters.py."""
    folder, out = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out")
    handed_in = _hand_in(folder, 3)
    done = _run(folder, "--out", out)
    assert done.returncode == 1 and "bytes, at most" in done.stdout, done.stdout + done.stderr
    found = _verdicts(out)
    assert found.keys() == handed_in.keys()
    for name, kind in handed_in.items():
        _, earned, statuses = KINDS[kind]
        got = found[name]
        assert [e["status"] for e in got["exercises"]] == statuses, name
        assert got["earned"] == earned, name
        assert bool(got["problem"]) == (kind == "huge")
        if kind == "sums":
            assert got["exercises"][0]["diagnosis"]["name"] == "sums the steps"
    lines = (out / VERDICTS).read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines)


def test_each_misconception_of_a_class_is_named(course, tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out")
    entries = {"sums_the_steps": "mean_pool", "pools_over_the_batch": "mean_pool",
               "counts_eight_bytes": "num_bytes", "forgets": "Counter"}  # fmt: skip
    for entry, exercise in entries.items():
        (folder / entry).mkdir()
        text = f"{ANSWERS}\n{CATALOGUE}\n{exercise} = {entry}\n"
        (folder / entry / "toy.py").write_text(text)
    assert _in_process(folder, "--out", out) == 0
    for entry, exercise in entries.items():
        result = next(e for e in _verdicts(out)[entry]["exercises"] if e["exercise"] == exercise)
        assert result["diagnosis"]["name"] == entry.replace("_", " ")


def test_killed_at_any_moment_nothing_is_lost_or_doubled(course, tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out")
    handed_in = _hand_in(folder, 3)
    rng = random.Random(11)
    kept: list[str] = []
    for _ in range(20 if IS_THOROUGH else 5):
        process = subprocess.Popen(
            [sys.executable, "-m", "autograder", "class", folder, "--out", out, "--jobs", "2"],
            env={**os.environ, "PYTHONPATH": str(HOUSE)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            process.wait(timeout=rng.uniform(0.2, 4.5))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        text = (out / VERDICTS).read_text() if (out / VERDICTS).exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        assert whole[: len(kept)] == kept, "a verdict was lost"
        kept = whole
    last = _run(folder, "--out", out)
    assert last.returncode == 1  # the huge ones
    keys = [json.loads(line)["key"] for line in (out / VERDICTS).read_text().splitlines()]
    assert len(keys) == len(set(keys))
    found = _verdicts(out)
    assert {n: found[n]["earned"] for n in found} == {n: KINDS[k][1] for n, k in handed_in.items()}
    assert not _graders_of(course), "a grader outlived its class"


def _graders_of(course):
    """Processes of graders at work on this course."""
    deadline = time.monotonic() + 5
    while True:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"autograder" in words and str(course).encode() in words:
                found.append(words)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def test_what_is_graded_is_not_graded_again(course, tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out")
    for name, text in (("ann", ANSWERS), ("ben", SUMS), ("cleo", ANSWERS)):
        (folder / name).mkdir()
        (folder / name / "toy.py").write_text(text)
    assert _in_process(folder, "--out", out) == 0
    first = (out / VERDICTS).read_text()
    assert len(first.splitlines()) == 2  # ann and cleo handed in the same
    assert "the same file from ann, cleo" in (out / "report.html").read_text()
    assert _in_process(folder, "--out", out) == 0
    assert (out / VERDICTS).read_text() == first
    (folder / "ben" / "toy.py").write_text(ALTERNATIVE)
    assert _in_process(folder, "--out", out) == 0
    assert len((out / VERDICTS).read_text().splitlines()) == 3
    assert _verdicts(out)["ben"]["earned"] == 5
    assert _in_process(folder, "--out", out, "--student", "ann") == 0
    assert len((out / VERDICTS).read_text().splitlines()) == 4
    grader = course / "tests/exercises/test_toy.py"
    grader.write_text(grader.read_text().replace("@points(2)", "@points(3)"))
    assert _in_process(folder, "--out", out) == 0
    assert _verdicts(out)["ann"]["earned"] == 6


def test_a_torn_line_is_cut_off_and_a_foreign_file_refused(tmp_path):
    path = tmp_path / VERDICTS
    with Records(path) as records:
        records.add("a", {"results": []})
    path.write_bytes(path.read_bytes() + b'{"key": "b", "resul')
    with Records(path) as records:
        assert "a" in records and "b" not in records
        records.add("c", {"results": [1]})
        with pytest.raises(InUse), Records(path):
            pass
    with Records(path) as records:
        assert len(records) == 2 and records["c"] == {"results": [1]}
    path.write_text("not a verdict\n")
    with pytest.raises(ValueError, match="line 1 is no verdict"), Records(path):
        pass


def test_finds_what_systems_hand_over(tmp_path):
    def put(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    put("ann/deep/er/toy.py", "ann")
    put("ben/exercises/toy.py", "ben")
    put("Carl Smith_4711_assignsubmission_file_/toy.py", "carl")
    put("smithdora_LATE_4712_90210_toy-2.py", "dora")
    put("ann/other.py", "nothing of ours")
    put("eve/too/deep/for/this/toy.py", "out of reach")
    with zipfile.ZipFile(tmp_path / "fred.zip", "w") as archive:
        archive.writestr("../../toy.py", "fred")
        archive.writestr("__MACOSX/toy.py", "mac")
    (tmp_path / "gus.zip").write_bytes(b"PK but no archive")
    (tmp_path / "hal").mkdir()
    (tmp_path / "hal" / "toy.py").symlink_to("/etc/hostname")
    (tmp_path / "ida").symlink_to(tmp_path / "ann")
    found = {s.student: s for s in find_submissions(tmp_path, ["toy"])}
    assert {n: s.text.decode() for n, s in found.items() if not s.problem} == {
        "ann": "ann", "ben": "ben", "Carl Smith": "carl", "smithdora": "dora", "fred": "fred",
    }  # fmt: skip
    assert found["Carl Smith"].student_id == "4711" and found["smithdora"].student_id == "4712"
    assert {n for n, s in found.items() if s.problem} == {"gus", "hal", "ida"}
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        find_submissions(tmp_path / "nowhere", ["toy"])


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("toy.py", b"#" * 2**27)
    (found,) = find_submissions(tmp_path, ["toy"])
    assert "more than" in found.problem and not found.text


def test_a_damaged_archive_is_that_students_problem_alone(tmp_path):
    for name in ("ann", "ben"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("toy.py", ANSWERS)
    data = bytearray((tmp_path / "ann.zip").read_bytes())
    begin = 30 + len("toy.py")
    data[begin : begin + 8] = b"\xff" * 8
    (tmp_path / "ann.zip").write_bytes(data)
    ann, ben = find_submissions(tmp_path, ["toy"])
    assert "ann.zip" in ann.problem and not ann.text
    assert ben.text == ANSWERS.encode() and not ben.problem


def test_nothing_of_a_students_is_taken_for_code(course, tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out")
    evil = "=cmd|' <script src=x>"
    (folder / evil).mkdir()
    text = ANSWERS.replace("x.mean(1)", "int('<img src=x onerror=alert(2)>')")
    (folder / evil / "toy.py").write_text(text)
    assert _in_process(folder, "--out", out) == 0
    page = (out / "report.html").read_text()
    assert "<script" not in page and "<img" not in page and "&lt;script src=x&gt;" in page
    for name in ("scores.csv", "exercises.csv", "canvas.csv", "moodle.csv"):
        for line in csv.reader(io.StringIO((out / name).read_text())):
            assert not any(cell.startswith("=") for cell in line)
    written = [p for p in out.rglob("*") if p.is_file()]
    assert all(p.resolve().is_relative_to(out) and "<" not in p.name for p in written)


def test_names_of_files_stay_apart_and_inside():
    names = ["ann", "../ann", "a/nn", "ANN", "änn", "ann ", ".", "", "x" * 300, "a\nb"]
    safe = [safe_name(n) for n in names]
    assert len(set(safe)) == len(names)
    assert all(s and "/" not in s and not s.startswith(".") and len(s) < 90 for s in safe)


def test_every_format_agrees(course, tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out")
    for name, text in (("ann", ANSWERS), ("ben", SUMS)):
        (folder / name).mkdir()
        (folder / name / "toy.py").write_text(text)
    assert _in_process(folder, "--out", out) == 0
    scores = list(csv.DictReader(io.StringIO((out / "scores.csv").read_text())))
    assert {s["student"]: s["toy"] for s in scores} == {"ann": "5", "ben": "3"}
    canvas = list(csv.reader(io.StringIO((out / "canvas.csv").read_text())))
    assert canvas[1][-1] == "5" and [row[-1] for row in canvas[2:]] == ["5", "3"]
    moodle = list(csv.DictReader(io.StringIO((out / "moodle.csv").read_text())))
    assert [row["Grade"] for row in moodle] == ["5", "3"]
    assert "sums the steps" in moodle[1]["Feedback comments"]
    scope = json.loads((out / "gradescope/ben.json").read_text())
    assert scope["score"] == 3 == sum(t["score"] for t in scope["tests"])
    assert sum(t["max_score"] for t in scope["tests"]) == 5
    from junitparser import JUnitXml

    suite = JUnitXml.fromfile(str(out / "junit/ben.xml"))
    assert (suite.tests, suite.failures) == (4, 1)


def test_a_grader_that_dies_is_replaced(course, monkeypatch):
    grader = GraderProcess(course)
    try:
        assert len(grader.grade("toy", ANSWERS.encode(), 0)["results"]) == 3
        grader._process.kill()
        grader._process.wait()
        assert len(grader.grade("toy", SUMS.encode(), 0)["results"]) == 3
        assert "error" in grader.grade("no_such_chapter", b"", 0)
        assert len(grader.grade("toy", ANSWERS.encode(), 0)["results"]) == 3
    finally:
        grader.close()


def test_any_executor_of_that_shape_will_do(course, tmp_path):
    folder = tmp_path / "in"
    _hand_in(folder, 1)
    submissions = find_submissions(folder, ["toy"])
    try:
        with ThreadPoolExecutor(2) as pool:
            found = grade_class(course, submissions, tmp_path / "out", executor=pool, seed=3)
    finally:
        close_all()
    graded = {s for s, _ in found}
    assert graded == {s.student for s in submissions if not s.problem}


def test_refuses_where_no_sandbox_is_possible(course, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sandbox, "unavailable", lambda: "the kernel has no Landlock")
    for flag in ([], ["--untrusted"]):
        assert command.main([str(tmp_path), "--out", str(tmp_path / "out"), *flag]) == 2
        assert "the kernel has no Landlock" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rejects_wrong_options(course, tmp_path, capsys):
    for options, said in (
        ([tmp_path / "no", "--out", tmp_path / "o"], "expected a folder"),
        ([tmp_path, "--out", tmp_path / "o", "--chapter", "toi"], "Did you mean toy?"),
        ([tmp_path, "--out", tmp_path / "o", "--student", "nobody"], "unknown student"),
    ):
        assert _in_process(*options) == 2
        assert said in capsys.readouterr().err
