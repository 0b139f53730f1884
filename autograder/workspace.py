"""Where graders, catalogues and answers lie, and what they declare."""

import difflib
import functools
import importlib.util
import types
from dataclasses import dataclass
from pathlib import Path

from autograder.declarations import Alternative, Exercise, Misconception

GRADERS = Path("tests/exercises")


class UnknownName(ValueError):
    """A chapter or exercise that does not exist; the message lists the names that do."""


@dataclass(frozen=True)
class Chapter:
    """A chapter's exercises in the grader's order, its catalogue, and its number in the course."""

    stem: str
    number: int
    exercises: tuple[Exercise, ...]
    misconceptions: tuple[Misconception, ...]
    alternatives: tuple[Alternative, ...]
    graders: tuple[type, ...]

    @property
    def notebook(self) -> str:
        return f"notebooks/{self.number:02d}_{self.stem}.ipynb"

    def grader_of(self, exercise: Exercise) -> type:
        return self.graders[self.exercises.index(exercise)]


def find_root(start: Path | None = None) -> Path:
    """The course's folder: the nearest one at or above `start` that holds tests/exercises.

    Raises: FileNotFoundError, with the remedy.
    """
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / GRADERS).is_dir() and (folder / "misconceptions").is_dir():
            return folder
    raise FileNotFoundError(
        f"no course found at or above {here}: run this inside the course's folder"
    )


def chapter_stems(root: Path) -> list[str]:
    """The chapters that have both a grader and a catalogue, in the order of their notebooks."""
    stems = [p.stem for p in (root / "misconceptions").glob("*.py")]
    stems = [s for s in stems if (root / GRADERS / f"test_{s}.py").is_file()]
    return sorted(stems, key=lambda stem: (_number(root, stem), stem))


def load_chapter(root: Path, stem: str) -> Chapter:
    """Read a chapter's grader and catalogue.

    Raises: UnknownName, with the nearest names.
    """
    stems = chapter_stems(root)
    if stem not in stems:
        raise UnknownName(unknown("chapter", stem, stems))
    grader, catalogue = root / GRADERS / f"test_{stem}.py", root / "misconceptions" / f"{stem}.py"
    return _load(root, stem, grader.stat().st_mtime_ns, catalogue.stat().st_mtime_ns)


def find_exercise(root: Path, name: str) -> tuple[Chapter, Exercise]:
    """The exercise called `name`, or `chapter.name`.

    Raises: UnknownName, with the nearest names.
    """
    stem, _, short = name.rpartition(".")
    chapters = [load_chapter(root, s) for s in ([stem] if stem else chapter_stems(root))]
    for chapter in chapters:
        for exercise in chapter.exercises:
            if exercise.name == short:
                return chapter, exercise
    raise UnknownName(
        unknown("exercise", name, [e.name for chapter in chapters for e in chapter.exercises])
    )


def unknown(what: str, name: str, known: list[str]) -> str:
    """'unknown exercise 'rms_nrom'. Did you mean rms_norm? There are: ...'."""
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    guess = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"unknown {what} {name!r}.{guess} There are: {', '.join(known) or 'none'}."


def _number(root: Path, stem: str) -> int:
    for folder in ("notebooks", "notebooks/src"):
        for path in (root / folder).glob(f"[0-9][0-9]_{stem}.*"):
            return int(path.name[:2])
    return 99


@functools.lru_cache(maxsize=64)
def _load(root: Path, stem: str, grader_changed: int, catalogue_changed: int) -> Chapter:
    tests = _import(root / GRADERS / f"test_{stem}.py", f"grader_of_{stem}")
    catalogue = _import(root / "misconceptions" / f"{stem}.py", f"catalogue_of_{stem}")
    graders = tuple(
        c for c in vars(tests).values() if isinstance(c, type) and "exercise" in vars(c)
    )
    declared = list(vars(catalogue).values())
    return Chapter(
        stem,
        _number(root, stem),
        tuple(grader.exercise for grader in graders),  # type: ignore[attr-defined]
        tuple(f.misconception for f in declared if hasattr(f, "misconception")),
        tuple(f.alternative for f in declared if hasattr(f, "alternative")),
        graders,
    )


def _import(path: Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
