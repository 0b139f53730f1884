"""A grader in a process of its own, for whoever schedules the work: a thread, or a dask worker.

`python -m autograder.classroom.grader_process FOLDER [trusted]` reads one JSON job a line and
writes one verdict a line. It runs no answer itself (see autograder.isolation).
"""

import base64
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

JOB_SECONDS = 600.0
RECYCLE_AFTER = 500


class GraderProcess:
    """Grades jobs in a subprocess, which is replaced when it dies, hangs or has done many."""

    def __init__(self, root: Path, *, is_trusted: bool = False) -> None:
        self._root, self._is_trusted = root, is_trusted
        self._process: subprocess.Popen[bytes] | None = None
        self._num_done = 0

    def grade(self, stem: str, text: bytes, seed: int) -> dict[str, Any]:
        """A verdict: {"results": [...], "seconds": s}, or {"error": why} where the grader failed.

        A grader that dies is tried once more.
        """
        job = {"stem": stem, "text": base64.b85encode(text).decode(), "seed": seed}
        verdict: dict[str, Any] = {}
        for _ in range(2):
            verdict = self._tried(job)
            if "error" not in verdict:
                return verdict
        return verdict

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _tried(self, job: dict[str, Any]) -> dict[str, Any]:
        if self._process is None or self._num_done >= RECYCLE_AFTER:
            self.close()
            self._start()
        assert self._process is not None and self._process.stdin is not None
        self._num_done += 1
        start = time.monotonic()
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line(start + JOB_SECONDS)
        except (OSError, TimeoutError) as error:
            self.close()
            return {"error": f"{type(error).__name__}: {error}"}
        if not line.endswith(b"\n"):
            status = self._process.wait()
            self.close()
            return {"error": f"the grader ended with status {status}"}
        return {**json.loads(line), "seconds": round(time.monotonic() - start, 3)}

    def _line(self, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        parts = bytearray()
        while not parts.endswith(b"\n"):
            left = deadline - time.monotonic()
            pipe = self._process.stdout.fileno()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise TimeoutError(f"no verdict after {JOB_SECONDS:.0f} s")
            part = os.read(pipe, 2**20)
            if not part:
                break
            parts += part
        return bytes(parts)

    def _start(self) -> None:
        self._num_done = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "autograder.classroom.grader_process", str(self._root)]
            + ["trusted"] * self._is_trusted,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                 "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip


_of_this_thread = threading.local()
_all: list[GraderProcess] = []


def grade_job(root: str, is_trusted: bool, stem: str, text: bytes, seed: int) -> dict[str, Any]:
    """Grade with this thread's own grader process: what an executor is given to run."""
    key = (root, is_trusted)
    if getattr(_of_this_thread, "key", None) != key:
        _of_this_thread.key = key
        _of_this_thread.grader = GraderProcess(Path(root), is_trusted=is_trusted)
        _all.append(_of_this_thread.grader)
    verdict: dict[str, Any] = _of_this_thread.grader.grade(stem, text, seed)
    return verdict


def close_all() -> None:
    """End the grader processes of all threads."""
    while _all:
        _all.pop().close()


def main() -> None:
    import torch

    from autograder.isolation.grading import IsolatedGrader
    from autograder.isolation.sandbox import die_with_parent

    die_with_parent()
    torch.set_num_threads(1)
    verdicts = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with IsolatedGrader(Path(sys.argv[1]), is_trusted=sys.argv[2:] == ["trusted"]) as grader:
        for line in sys.stdin.buffer:
            job = json.loads(line)
            text = base64.b85decode(job["text"])
            results = grader.grade(job["stem"], text, seed=job["seed"])
            verdicts.write(json.dumps({"results": [r.to_dict() for r in results]}).encode() + b"\n")
            verdicts.flush()


if __name__ == "__main__":
    main()
