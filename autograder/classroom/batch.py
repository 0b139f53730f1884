"""Grades what has no verdict yet, in parallel, and keeps each verdict as it comes."""

import hashlib
import importlib.metadata
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from autograder.classroom.grader_process import close_all, grade_job
from autograder.classroom.records import Records
from autograder.classroom.submissions import Submission

VERDICTS = "verdicts.jsonl"
Progress = Callable[[Submission, dict[str, Any]], None]


def grade_class(
    root: Path,
    submissions: list[Submission],
    out: Path,
    *,
    executor: Executor | None = None,
    num_jobs: int = 1,
    is_trusted: bool = False,
    seed: int | None = None,
    again: Iterable[str] = (),
    progress: Progress = lambda submission, verdict: None,
) -> dict[tuple[str, str], dict[str, Any]]:
    """Verdicts by (student, chapter); those that `out` already holds are taken from there.

    The same answer is graded once, whoever hands it in. Of students named in `again` all is graded
    anew. `executor` has the shape of concurrent.futures; by default `num_jobs` threads, each with a
    grader process. `seed` draws the inputs: by default a secret of this folder's, kept in it.

    Raises: InUse; what the executor raises.
    """
    again = set(again)
    with Records(out / VERDICTS) as records:
        seed = _seed_of(out) if seed is None else seed
        gradable = [s for s in submissions if not s.problem]
        versions = {stem: versions_of(root, stem) for stem in {s.chapter for s in gradable}}
        keys = {s: verdict_key(s, seed, versions[s.chapter]) for s in gradable}
        todo: dict[str, Submission] = {}
        for submission, key in keys.items():
            if key not in records or submission.student in again:
                todo.setdefault(key, submission)
        own = executor is None
        pool: Executor = executor or ThreadPoolExecutor(max(1, num_jobs))
        try:
            _run(pool, root, todo, records, is_trusted, seed, progress, 4 * max(1, num_jobs))
        finally:
            if own:
                pool.shutdown(wait=False, cancel_futures=True)
                close_all()
        return {(s.student, s.chapter): records[key] for s, key in keys.items() if key in records}


def _run(
    pool: Executor,
    root: Path,
    todo: dict[str, Submission],
    records: Records,
    is_trusted: bool,
    seed: int,
    progress: Progress,
    window: int,
) -> None:
    """Keep `window` jobs under way, so that memory does not grow with the class."""
    waiting = iter(todo.items())
    running: dict[Future[dict[str, Any]], tuple[str, Submission]] = {}
    while True:
        for key, submission in waiting:
            future = pool.submit(
                grade_job, str(root), is_trusted, submission.chapter, submission.text, seed
            )
            running[future] = key, submission
            if len(running) >= window:
                break
        if not running:
            return
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            key, submission = running.pop(future)
            verdict = {"chapter": submission.chapter, **future.result()}
            if "error" not in verdict:
                records.add(key, verdict)
            progress(submission, verdict)


def verdict_key(submission: Submission, seed: int, versions: str) -> str:
    """What a verdict depends on: the answer, the inputs, and what `versions_of` covers."""
    digest = hashlib.sha256()
    for part in (submission.chapter, submission.digest, str(seed), versions):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def versions_of(root: Path, stem: str) -> str:
    """A chapter's grader, catalogue and exercise, the autograder, and the versions below them."""
    digest = hashlib.sha256()
    files = [root / "tests" / "exercises" / f"test_{stem}.py",
             root / "misconceptions" / f"{stem}.py", root / "exercises" / f"{stem}.py",
             *sorted(Path(__file__).parents[1].rglob("*.py"))]  # fmt: skip
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    digest.update(f"{sys.version_info[:3]}{importlib.metadata.version('torch')}".encode())
    return digest.hexdigest()


def _seed_of(out: Path) -> int:
    """The folder's own seed, which no student can know; drawn once."""
    path = out / "batch.json"
    if not path.exists():
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps({"seed": secrets.randbelow(2**31)}))
        os.replace(draft, path)
    seed: int = json.loads(path.read_text())["seed"]
    return seed
