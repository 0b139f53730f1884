"""`python -m autograder gradescope ZIP --chapter STEM`: the archive that Gradescope takes.

Its harness unpacks the archive to /autograder/source and runs setup.sh once; for each submission it
puts the files into /autograder/submission, runs /autograder/run_autograder and reads
/autograder/results/results.json.
"""

import argparse
import json
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from autograder.publishing.release import CannotPublish, write_files
from autograder.workspace import UnknownName, chapter_stems, find_root, load_chapter, unknown

SETUP = """\
#!/usr/bin/env bash
set -euo pipefail
cd "${AUTOGRADER_HOME:-/autograder}/source"
apt-get update -qq && apt-get install -qq -y python3 python3-venv git
PYTHON=python3
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  apt-get install -qq -y python3.11 python3.11-venv
  PYTHON=python3.11
fi
"$PYTHON" -m venv .venv
.venv/bin/python -m pip install --quiet -c course/constraints.txt -e course
"""

RUN = """\
#!/usr/bin/env bash
set -euo pipefail
HOME_OF_IT="${AUTOGRADER_HOME:-/autograder}"
PYTHON="$HOME_OF_IT/source/.venv/bin/python"
test -x "$PYTHON" || PYTHON=python3
cd "$HOME_OF_IT/source/course"
mkdir -p "$HOME_OF_IT/results"
OMP_NUM_THREADS=1 PYTHONPATH="$PWD" "$PYTHON" -m autograder.publishing.gradescope_run \\
  "$HOME_OF_IT/submission" "$HOME_OF_IT/results/results.json" $(cat "$HOME_OF_IT/source/chapters")
"""
MOMENT = (2000, 1, 1, 0, 0, 0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m autograder gradescope", description=__doc__)
    parser.add_argument("archive", type=Path, metavar="ZIP")
    parser.add_argument("--chapter", action="append", default=[], metavar="STEM",
                        help="what the assignment is about (again for more; all)")  # fmt: skip
    options = parser.parse_args(argv)
    root = find_root()
    try:
        stems = chapter_stems(root)
        for stem in options.chapter:
            if stem not in stems:
                raise UnknownName(unknown("chapter", stem, stems))
        write_archive(root, options.archive, options.chapter or stems)
    except (CannotPublish, UnknownName) as error:
        print(error, file=sys.stderr)
        return 2
    points = sum(
        e.points for s in options.chapter or stems for e in load_chapter(root, s).exercises
    )
    print(f"{options.archive}: upload it as the autograder; the assignment has {points:g} points")
    return 0


def write_archive(root: Path, archive: Path, stems: list[str]) -> None:
    """Write the archive, the same bytes for the same course; whole or not at all."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        course = folder / "course"
        course.mkdir()
        write_files(root, course)
        for package in ("classroom", "publishing"):
            for file in sorted((root / "autograder" / package).glob("*.py")):
                target = course / "autograder" / package / file.name
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(file.read_bytes())
        (folder / "chapters").write_text("\n".join(stems) + "\n")
        (folder / "setup.sh").write_text(SETUP)
        (folder / "run_autograder").write_text(RUN)
        draft = archive.with_name(archive.name + ".tmp")
        try:
            _zip(folder, draft)
            draft.replace(archive)
        finally:
            draft.unlink(missing_ok=True)


def _zip(folder: Path, archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            entry = zipfile.ZipInfo(name, MOMENT)
            is_program = name in ("setup.sh", "run_autograder")
            entry.external_attr = (0o100755 if is_program else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            packed.writestr(entry, path.read_bytes())


def results_of_problem(message: str) -> str:
    """A results.json that says why there is no grade."""
    return json.dumps({"score": 0.0, "output": message, "visibility": "visible", "tests": []})
