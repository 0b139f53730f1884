"""Grades one answer file whose code runs in confined workers: the verdict is decided here."""

import ast
import types
from dataclasses import dataclass, field, replace
from pathlib import Path

from autograder import refusals
from autograder.diagnosis import Memory
from autograder.engine import grade_student, refuse_all
from autograder.isolation.remote import GRACE_SECONDS, RemoteSubmission
from autograder.isolation.sandbox import Layers
from autograder.isolation.tampering import suspicions
from autograder.isolation.workers import Workers
from autograder.limits import OutOfTime, time_limit
from autograder.refusals import Refusal
from autograder.results import PASSED, CheckResult, ExerciseResult
from autograder.student import IMPORT_SECONDS, load_module
from autograder.workspace import Chapter, load_chapter

MAX_FILE_BYTES = 2**20


@dataclass
class _Prepared:
    chapter: Chapter
    given: str
    adapters: types.ModuleType
    memories: dict[str, Memory] = field(default_factory=dict)


class IsolatedGrader:
    """Grades answer files of a course, one after another, from one host of workers.

    Use as a context manager. Raises: NoSandbox, where answers cannot be confined.
    """

    def __init__(
        self, root: Path, *, is_trusted: bool = False, layers: Layers | None = None
    ) -> None:
        self.root = root
        self.workers = Workers(root, is_trusted=is_trusted, layers=layers)
        self._prepared: dict[str, _Prepared] = {}

    def __enter__(self) -> "IsolatedGrader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.workers.close()

    def grade(self, stem: str, text: bytes, *, seed: int = 0) -> list[ExerciseResult]:
        """Grade an answer file, given its bytes; `seed` draws the checks' inputs."""
        prepared = self._prepare(stem)
        shown = f"exercises/{stem}.py"
        if len(text) > MAX_FILE_BYTES:
            refusal = Refusal(
                refusals.IMPORT_FAILED,
                f"{shown} has {len(text):,} bytes; a submission has at most {MAX_FILE_BYTES:,}.",
            )
            return [refuse_all(prepared.chapter, e, refusal) for e in prepared.chapter.exercises]
        submission = RemoteSubmission(self.workers, text, shown, prepared.given, prepared.adapters)
        try:
            return self._graded(prepared, submission, text, seed)
        finally:
            submission.close()

    def _graded(
        self, prepared: _Prepared, submission: RemoteSubmission, text: bytes, seed: int
    ) -> list[ExerciseResult]:
        results: list[ExerciseResult] = []
        doubts: list[str] | None = None
        failed: Refusal | None = None
        for exercise in prepared.chapter.exercises:
            if failed is None:
                try:
                    with time_limit(IMPORT_SECONDS + GRACE_SECONDS):
                        student = submission.student(exercise)
                except Refusal as refusal:
                    failed = refusal
                except OutOfTime:
                    failed = Refusal(
                        refusals.IMPORT_FAILED,
                        f"The file was still running after {IMPORT_SECONDS:.0f} s of import.",
                    )
            if failed is not None:
                results.append(refuse_all(prepared.chapter, exercise, failed))
                continue
            memory = prepared.memories.setdefault(exercise.name, Memory())
            if len(memory.outcomes) > 2000:
                memory.outcomes.clear()
            result = grade_student(
                prepared.chapter, exercise, student, prepared.adapters, seed=seed, memory=memory
            )
            if any(c.status == PASSED and c.is_measured for c in result.checks):
                doubts = _doubts(text) if doubts is None else doubts
                result = _without_unverified(result, doubts)
            results.append(result)
        return results

    def _prepare(self, stem: str) -> _Prepared:
        if stem not in self._prepared:
            path = self.root / "exercises" / f"{stem}.py"
            given = path.read_text(encoding="utf-8")
            self.workers.prepare(_imports(given))
            self._prepared[stem] = _Prepared(
                load_chapter(self.root, stem), given, load_module(path, f"exercises/{stem}.py")
            )
        return self._prepared[stem]


def _doubts(text: bytes) -> list[str]:
    try:
        with time_limit(IMPORT_SECONDS):
            return suspicions(text)
    except (OutOfTime, MemoryError):
        return ["it takes too long to read"]


def _without_unverified(result: ExerciseResult, doubts: list[str]) -> ExerciseResult:
    """Take back what passed on measurements that the answer's own file could have changed."""
    if not doubts:
        return result

    def doubted(check: CheckResult) -> CheckResult:
        if check.status != PASSED or not check.is_measured:
            return check
        message = (
            "This check measures memory or time in the process of the answer, and the file "
            f"reaches for what could change the measurement: {'; '.join(doubts[:3])}. "
            "Grade it by hand."
        )
        return replace(check, status=refusals.UNVERIFIED, message=message)

    return replace(result, checks=tuple(doubted(check) for check in result.checks))


def _imports(source: str) -> list[str]:
    """The modules that a file imports."""
    names: dict[str, None] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= dict.fromkeys(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names[node.module] = None
    return list(names)
