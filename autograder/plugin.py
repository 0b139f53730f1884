"""The pytest side: `pytest tests/exercises` grades the answers in exercises/ (or --answers DIR)."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ANSWERS = pytest.StashKey[dict[str, Any]]()
RESULTS = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("autograder")
    group.addoption("--answers", default="exercises", help="folder of the answers to grade")
    group.addoption("--seed", type=int, default=0, help="seed of the graders' random inputs")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ANSWERS], config.stash[RESULTS] = {}, {}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a grader's check through the engine, so that pytest and `python -m autograder` agree."""
    spec = getattr(pyfuncitem.cls, "exercise", None)
    if spec is None:
        return None
    result = _graded(pyfuncitem, spec)
    check = next(c for c in result.checks if c.name == pyfuncitem.name)
    if check.status != "passed":
        pytest.fail(_report(spec, result, check), pytrace=False)
    return True


@pytest.fixture
def student() -> None:
    """Named by the graders' signatures; the engine supplies the recorded answers."""


@pytest.fixture
def rng() -> None:
    """Named by the graders' signatures; the engine supplies the seeded generator."""


def _graded(item: pytest.Function, spec: Any) -> Any:
    from autograder.engine import grade
    from autograder.refusals import Refusal
    from autograder.student import load_module
    from autograder.workspace import find_root, load_chapter

    config = item.config
    stem = item.path.stem.removeprefix("test_")
    key = f"{stem}.{spec.name}"
    if key not in config.stash[RESULTS]:
        root = find_root(item.path.parent)
        source = os.path.join(config.getoption("--answers"), f"{stem}.py")
        if stem not in config.stash[ANSWERS]:
            try:
                config.stash[ANSWERS][stem] = load_module(root / source, source)
            except Refusal as refusal:
                config.stash[ANSWERS][stem] = refusal
        chapter = load_chapter(root, stem)
        exercise = next(e for e in chapter.exercises if e.name == spec.name)
        config.stash[RESULTS][key] = grade(
            chapter,
            exercise,
            config.stash[ANSWERS][stem],
            source=source,
            seed=config.getoption("--seed"),
        )
    return config.stash[RESULTS][key]


def _report(spec: Any, result: Any, check: Any) -> str:
    lines = [f"{spec.name}: {check.says}", check.message or check.status]
    if result.diagnosis:
        lines.append(f"Diagnosis: {result.diagnosis.name}. {result.diagnosis.says}")
        lines.append(f"Read {result.diagnosis.see}.")
    lines.append(f"Hint: {result.hints[0]}")
    return "\n".join(lines)


@pytest.hookimpl(hookwrapper=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Iterator[None]:
    yield
    results = config.stash[RESULTS].values()
    if results:
        earned, points = sum(r.earned for r in results), sum(r.points for r in results)
        terminalreporter.write_line(f"Points: {earned:g} of {points:g}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Graders are for students' answers: `pytest tests` leaves them out, naming them runs them."""
    grader = collection_path.parent.name == "exercises" and collection_path.name.startswith("test_")
    if not grader or collection_path.name == "test_catalogue.py":
        return None
    asked = [str(a) for a in config.args]
    return None if any("exercises" in a for a in asked) else True
