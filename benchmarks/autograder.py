"""How long a student waits for the grader, beside a limit for each way and beside plain pytest.

Everything runs on a copy of the course with the solutions as answers. Times are medians of fresh
processes; "later" calls are medians within one.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Row

ROOT = Path(__file__).parents[1]
CHAPTER, EXERCISE = "normalization", "rms_norm"
CHECK = f"""
import time
import torch
from autograder.notebook import check
for _ in range(6):
    start = time.perf_counter()
    repr(check("{EXERCISE}"))
    print(time.perf_counter() - start)
"""
REPEATS = 3


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        course = Path(folder)
        for part in ("tests/exercises", "misconceptions", "notebooks/src"):
            shutil.copytree(ROOT / part, course / part)
        shutil.copytree(ROOT / "solutions", course / "exercises")
        first, later = _check(course)
        cold = _command(course, "autograder", CHAPTER)
        peer = _command(
            course, "pytest", "-q", "-p", "autograder.plugin", f"tests/exercises/test_{CHAPTER}.py"
        )
        saved = _watch(course)
    return [
        Row("check() in a notebook, first call / limit 1.5 s", first, 1.5e3, "ms"),
        Row("check() in a notebook, later / limit 0.4 s", later, 0.4e3, "ms"),
        Row("terminal, one chapter, cold / limit 4 s", cold, 4e3, "ms"),
        Row("watch, from save to verdict / limit 0.3 s", saved, 0.3e3, "ms"),
        Row("terminal, one chapter / pytest on its grader", cold, peer, "ms"),
        Row("watch / pytest on the same grader", saved, peer, "ms"),
    ]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def _run(course: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=course,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)[:60]}: exit {done.returncode}\n{done.stderr}")
    return done.stdout


def _check(course: Path) -> tuple[float, float]:
    firsts, later = [], []
    for _ in range(REPEATS):
        first, *rest = (1e3 * float(line) for line in _run(course, "-c", CHECK).split())
        firsts.append(first)
        later += rest
    return statistics.median(firsts), statistics.median(later)


def _command(course: Path, module: str, *arguments: str) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        _run(course, "-m", module, *arguments)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _watch(course: Path) -> float:
    """From the moment that an editor has replaced the file to the printed verdict."""
    answers, times = course / "exercises" / f"{CHAPTER}.py", []
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "autograder", "watch"],
        cwd=course,
        env=_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        while "Ctrl-C" not in process.stdout.readline():
            pass
        time.sleep(1)
        for i in range(REPEATS + 1):
            text = answers.read_text() + f"\n# saved {i}\n"
            start = time.perf_counter()
            answers.write_text(text)
            while not process.stdout.readline().rstrip().endswith(" s"):
                pass
            times.append(1e3 * (time.perf_counter() - start))
            time.sleep(0.5)
    finally:
        process.terminate()
        process.wait()
    return statistics.median(times[1:])
