"""`python -m tools.build_exercises [STEM ...]`: solutions/ -> exercises/, the answers taken out.

In a solution, the lines from `# BEGIN SOLUTION` to `# END SOLUTION` become one that raises
NotImplementedError, or, where `# STARTER` stands between, the commented lines after it (`# | `
removed): the broken program of a repair exercise.

The first line of an exercise holds the hash of the text that was generated below it. A file whose
text has another hash has been edited: it is left alone, or with --force kept as a backup.
"""

import argparse
import ast
import hashlib
import sys
import textwrap
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, STARTER, END = "# BEGIN SOLUTION", "# STARTER", "# END SOLUTION"
HEADER = "# Exercise {}: write your answers below, and leave this line as it is.\n"


class MarkerError(ValueError):
    """Markers that do not pair; the message names the file and the line."""


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.build_exercises")
    parser.add_argument("stems", nargs="*", help="chapters (all)")
    parser.add_argument("--check", action="store_true", help="prove them in step; write nothing")
    parser.add_argument("--force", action="store_true", help="replace edited ones, with a backup")
    options = parser.parse_args(argv)
    known = sorted(path.stem for path in (root / "solutions").glob("*.py"))
    unknown = set(options.stems) - set(known)
    if unknown:
        print(f"no solutions/ of: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    try:
        built = {stem: generate(root / "solutions" / f"{stem}.py")
                 for stem in options.stems or known}  # fmt: skip
    except MarkerError as error:
        print(error, file=sys.stderr)
        return 1
    if options.check:
        return _check(root, built, complete=not options.stems)
    return _write(root, built, force=options.force)


def generate(solution: Path) -> str:
    """The text of the exercise: header line, then the solution without its answers.

    Raises: MarkerError.
    """
    name = f"{solution.parent.name}/{solution.name}"
    body = strip(solution.read_text(encoding="utf-8"), name)
    return HEADER.format(_digest(body)) + body


def strip(text: str, name: str) -> str:
    """A solution's text without its answers; `name` is for messages.

    Raises: MarkerError.
    """
    try:
        functions = _functions(text)
    except SyntaxError as error:
        raise MarkerError(f"{name}:{error.lineno}: {error.msg}") from error
    lines = text.splitlines()
    kept: list[str] = []
    after = 0
    for begin, end in _blocks(lines, name):
        kept += lines[after:begin]
        kept += _stripped(lines[begin + 1 : end], lines[begin], begin + 1, functions, name)
        after = end + 1
    body = "\n".join([*kept, *lines[after:]]) + "\n"
    try:
        ast.parse(body)
    except SyntaxError as error:
        raise MarkerError(f"{name}: the exercise would not parse: {error}") from error
    return body


def is_edited(text: str) -> bool:
    """Whether a generated exercise has been changed since."""
    header, _, body = text.partition("\n")
    return header + "\n" != HEADER.format(_digest(body))


def _blocks(lines: list[str], name: str) -> list[tuple[int, int]]:
    """The indices of each BEGIN and its END."""
    blocks = []
    begin = None
    for index, line in enumerate(lines):
        marker, where = line.strip(), f"{name}:{index + 1}"
        if marker in (STARTER, END) and begin is None:
            raise MarkerError(f"{where}: {marker} without {BEGIN} before it")
        if marker == BEGIN:
            if begin is not None:
                raise MarkerError(f"{where}: {BEGIN} inside the block begun on line {begin + 1}")
            begin = index
        elif marker == END and begin is not None:
            blocks.append((begin, index))
            begin = None
    if begin is not None:
        raise MarkerError(f"{name}:{begin + 1}: {BEGIN} without {END}")
    return blocks


def _stripped(
    block: list[str], begin: str, number: int, functions: list[tuple[int, int, str]], name: str
) -> list[str]:
    """What the student sees in place of a block that began on line `number`."""
    inside = [owner for first, last, owner in functions if first < number <= last]
    if not inside:
        raise MarkerError(f"{name}:{number}: {BEGIN} outside of any function")
    indent = begin[: len(begin) - len(begin.lstrip())]
    starters = [i for i, line in enumerate(block) if line.strip() == STARTER]
    if not starters:
        return [f'{indent}raise NotImplementedError("{inside[-1]}: not written yet")']
    given = []
    for offset, line in enumerate(block[starters[0] + 1 :], starters[0] + 2):
        text = line.strip()
        if text != "# |" and not text.startswith("# | "):
            raise MarkerError(
                f"{name}:{number + offset}: after {STARTER} expected `# | code`, got `{text}`"
            )
        given.append(text[4:])
    return textwrap.indent("\n".join(given), indent).splitlines()


def _functions(text: str) -> list[tuple[int, int, str]]:
    """First line, last line and dotted name of every function."""
    found = []

    def walk(node: ast.AST, outer: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = outer + child.name
                if isinstance(child, ast.FunctionDef):
                    found.append((child.lineno, child.end_lineno or child.lineno, name))
                walk(child, name + ".")

    walk(ast.parse(text), "")
    return found


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:12]


def _check(root: Path, built: dict[str, str], complete: bool) -> int:
    wrong = []
    for stem, text in built.items():
        path = root / "exercises" / f"{stem}.py"
        if not path.is_file():
            wrong.append(f"{path.name}: missing")
        elif (found := path.read_text(encoding="utf-8")) != text:
            edited = is_edited(found)
            wrong.append(f"{path.name}: {'edited by hand' if edited else 'not in step'}")
    if complete:
        left = {path.stem for path in (root / "exercises").glob("*.py")} - set(built)
        wrong += [f"{stem}.py: has no solution" for stem in sorted(left)]
    for line in wrong:
        print(f"exercises/{line}", file=sys.stderr)
    if wrong:
        print("make exercises writes them from solutions/", file=sys.stderr)
        return 1
    print(f"{len(built)} exercise files are in step with solutions/")
    return 0


def _write(root: Path, built: dict[str, str], force: bool) -> int:
    (root / "exercises").mkdir(exist_ok=True)
    refused = 0
    for stem, text in built.items():
        path = root / "exercises" / f"{stem}.py"
        shown = f"exercises/{path.name}"
        found = path.read_text(encoding="utf-8") if path.is_file() else None
        if found == text:
            print(f"{shown}: in step")
            continue
        if found is not None and is_edited(found):
            if not force:
                print(f"{shown}: holds your work, left alone (--force replaces it, with a backup)")
                refused += 1
                continue
            backup = path.with_name(f"{path.name}.orig.{datetime.now():%Y%m%dT%H%M%S%f}")
            path.rename(backup)
            print(f"{shown}: your work is now {backup.name}")
        path.write_text(text, encoding="utf-8")
        print(f"{shown}: written")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
