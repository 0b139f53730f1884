"""Finds students' answer files in a folder, as teachers get it from wherever students hand in.

    alice/normalization.py                              a folder for each student, any depth to 4
    alice.zip                                           an archive for each student
    Alice Smith_4711_assignsubmission_file_/...         Moodle
    smithalice_LATE_4711_90210_normalization-2.py       Canvas

Nothing is executed and no link is followed. What cannot be taken is reported as a problem.
"""

import hashlib
import lzma
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_FILE_BYTES = 2**20
MAX_DEPTH = 4
MAX_MEMBERS = 10_000
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, RuntimeError,
           NotImplementedError, EOFError, ValueError)  # fmt: skip
MOODLE = re.compile(r"(?P<name>.+)_(?P<id>\d+)_assignsubmission_\w+_?")
CANVAS = re.compile(r"(?P<name>[^_]+)_(LATE_)?(?P<id>\d+)_\d+_(?P<file>.+)")
AGAIN = re.compile(r"(-\d+| \(\d+\))?\.py$")  # what Canvas and browsers add to a second upload


@dataclass(frozen=True)
class Submission:
    """One answer file: whose, of which chapter, its bytes; or the problem why there are none."""

    student: str
    chapter: str
    text: bytes
    student_id: str = ""
    problem: str = ""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text).hexdigest()


def find_submissions(folder: Path, stems: list[str]) -> list[Submission]:
    """All answer files of the chapters `stems`, one a student and chapter, sorted.

    Of several files of one student for one chapter the newest counts, and of those in one archive
    the last. Raises: NotADirectoryError.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder of submissions")
    found: dict[tuple[str, str], tuple[float, Submission]] = {}
    for path in sorted(folder.iterdir()):
        for age, submission in _of_entry(path, set(stems)):
            key = submission.student, submission.chapter
            if key not in found or age >= found[key][0]:
                found[key] = age, submission
    return [found[key][1] for key in sorted(found)]


def _of_entry(path: Path, stems: set[str]) -> Iterator[tuple[float, Submission]]:
    if path.name.startswith((".", "__")):
        return
    if path.is_symlink():
        yield 0.0, Submission(_clean(path.stem), "", b"", problem="a link: links are not followed")
    elif path.is_dir():
        student, number = _named(MOODLE, path.name)
        yield from _of_folder(path, student, number, stems, MAX_DEPTH)
    elif path.suffix == ".zip":
        canvas = CANVAS.fullmatch(path.name)
        student, number = (canvas["name"], canvas["id"]) if canvas else (path.stem, "")
        yield from _of_archive(path, _clean(student), number, stems)
    elif canvas := CANVAS.fullmatch(path.name):
        stem = AGAIN.sub("", canvas["file"])
        if stem in stems:
            yield _read(path, _clean(canvas["name"]), canvas["id"], stem)


def _of_folder(
    folder: Path, student: str, number: str, stems: set[str], depth: int
) -> Iterator[tuple[float, Submission]]:
    for path in sorted(folder.iterdir()):
        stem = AGAIN.sub("", path.name)
        if path.name.startswith((".", "__")):
            continue
        if stem in stems and path.name.endswith(".py"):
            yield _read(path, student, number, stem)
        elif path.is_symlink():
            continue
        elif path.is_dir() and depth > 1:
            yield from _of_folder(path, student, number, stems, depth - 1)
        elif path.suffix == ".zip":
            yield from _of_archive(path, student, number, stems)


def _read(path: Path, student: str, number: str, stem: str) -> tuple[float, Submission]:
    facts = path.lstat()
    problem = ""
    if not stat.S_ISREG(facts.st_mode):
        problem = f"{_clean(path.name)}: not a file (links are not followed)"
    elif facts.st_size > MAX_FILE_BYTES:
        problem = f"{path.name}: {facts.st_size:,} bytes, at most {MAX_FILE_BYTES:,} are taken"
    text = b"" if problem else path.read_bytes()
    return facts.st_mtime, Submission(student, stem, text, number, problem)


def _of_archive(
    path: Path, student: str, number: str, stems: set[str]
) -> Iterator[tuple[float, Submission]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for order, member in enumerate(archive.infolist()[:MAX_MEMBERS]):
                name = member.filename.rpartition("/")[2]
                stem = AGAIN.sub("", name)
                if not name.endswith(".py") or stem not in stems or "__MACOSX" in member.filename:
                    continue
                with archive.open(member) as file:
                    text = file.read(MAX_FILE_BYTES + 1)
                problem = ""
                if len(text) > MAX_FILE_BYTES:
                    problem, text = f"{name}: more than {MAX_FILE_BYTES:,} bytes", b""
                yield float(order), Submission(student, stem, text, number, problem)
    except DAMAGED as error:
        yield 0.0, Submission(student, "", b"", number, _clean(f"{path.name}: {error}"))


def _named(pattern: re.Pattern[str], name: str) -> tuple[str, str]:
    match = pattern.fullmatch(name)
    return (_clean(match["name"]), match["id"]) if match else (_clean(name), "")


def _clean(name: str) -> str:
    """A student's name without what terminals, tables and paths would take for a command."""
    printable = "".join(c if c.isprintable() else "?" for c in name)
    return printable.encode("utf-8", "replace").decode()[:120] or "?"
