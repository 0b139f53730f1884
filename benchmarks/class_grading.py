"""A class, graded in isolation: throughput, scaling, memory; the same class by pytest start-ups.

Every submission is a whole chapter (normalization: eight exercises, 37 checks), each another file:
right answers, and right ones but for one misconception. Graders are warm: each has graded one.
pytest grades the same files one start after another, in a plain process, without isolation.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from autograder.classroom.grader_process import close_all, grade_job
from autograder.workspace import find_root, load_chapter
from benchmarks.measure import Row

STEM, SEED = "normalization", 0
NUM_TIMED, NUM_BY_PYTEST, NUM_LONG = 40, 4, 1000
LEAST_PER_SECOND = 3.0
ROOT = find_root(Path(__file__).parent)


def rows() -> list[Row]:
    rates = [_per_second(num_workers) for num_workers in (1, 2, 1, 2)]
    one, two = max(rates[::2]), max(rates[1::2])
    pytest = _per_second_by_pytest()
    early, late = _memory()
    return [
        Row("submissions a second on 2 cores, 3", two, LEAST_PER_SECOND, "/s"),
        Row("2 workers, 1 worker", two, one, "/s"),
        Row("isolated (2 workers), pytest starts (2 at a time)", two, pytest, "/s"),
        Row("memory of a grader after 1,000, after 100", late, early, "MB"),
    ]


def _submissions(count: int) -> list[bytes]:
    solution = (ROOT / "solutions" / f"{STEM}.py").read_text()
    catalogue = (ROOT / "misconceptions" / f"{STEM}.py").read_text()
    mistakes = load_chapter(ROOT, STEM).misconceptions
    texts = []
    for i in range(count):
        text = f"{solution}\n# {i}\n"
        if i % 2:
            mistake = mistakes[i % len(mistakes)]
            text += f"{catalogue}\n{mistake.exercise} = {mistake.implementation.__name__}\n"
        texts.append(text.encode())
    return texts


def _graded(text: bytes) -> None:
    verdict = grade_job(str(ROOT), False, STEM, text, SEED)
    assert len(verdict["results"]) == 8, verdict


def _per_second(num_workers: int) -> float:
    texts = _submissions(NUM_TIMED + num_workers)
    everybody = threading.Barrier(num_workers)

    def warm(text: bytes) -> None:
        everybody.wait()
        _graded(text)

    try:
        with ThreadPoolExecutor(num_workers) as pool:
            list(pool.map(warm, texts[:num_workers]))
            start = time.perf_counter()
            list(pool.map(_graded, texts[num_workers:]))
            return NUM_TIMED / (time.perf_counter() - start)
    finally:
        close_all()


def _per_second_by_pytest() -> float:
    def start(text: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / f"{STEM}.py").write_bytes(text)
            command = [sys.executable, "-m", "pytest", "-q", f"tests/exercises/test_{STEM}.py",
                       "--answers", folder]  # fmt: skip
            subprocess.run(command, cwd=ROOT, capture_output=True, env=os.environ)

    texts = _submissions(NUM_BY_PYTEST + 2)[2:]
    with ThreadPoolExecutor(2) as pool:
        begin = time.perf_counter()
        list(pool.map(start, texts))
        return NUM_BY_PYTEST / (time.perf_counter() - begin)


def _memory() -> tuple[float, float]:
    """Megabytes of a grader and its host of workers, after a hundred submissions and at the end."""
    from autograder.classroom import grader_process

    held = []
    texts = _submissions(NUM_LONG)
    grader_process.RECYCLE_AFTER = NUM_LONG + 1
    try:
        for i, text in enumerate(texts, 1):
            _graded(text)
            if i in (100, NUM_LONG):
                (grader,) = grader_process._all
                assert grader._process is not None
                held.append(_megabytes(grader._process.pid))
    finally:
        close_all()
    return held[0], held[1]


def _megabytes(pid: int) -> float:
    """Resident memory of a process and all that descend from it."""
    parents, held = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "stat").read_text().rpartition(")")[2].split()
            pages = int((entry / "statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
        parents[int(entry.name)], held[int(entry.name)] = int(words[1]), pages * 4096 / 1e6
    family = {pid}
    while more := {p for p, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(held.get(p, 0.0) for p in family)
