"""`python -m tools.check_notebooks`: what can be proved of the built notebooks without a kernel.

Each equals its source, was executed from top to bottom without errors or warnings, shows a picture
where it draws one, and holds nothing of the machine that built it.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tools.build_notebooks import ROOT, WIDGET, inputs, stems, unexecuted

MAX_BYTES = 3_000_000
MACHINE = re.compile(
    r"/home/\w+|/Users/\w+|/root/|/tmp/|/var/folders|[A-Z]:\\Users|site-packages|\.venv\b"
    r"|ipykernel_\d+|\bat 0x[0-9a-f]{6,}"
)
DRAWS = {"subplots", "figure", "subplot_mosaic"}


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    problems = list(check(root))
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print("make notebooks executes what is out of step", file=sys.stderr)
        return 1
    print(f"{len(stems(root))} notebooks are executed and in step with their sources")
    return 0


def check(root: Path) -> Iterator[str]:
    """Every problem of every notebook, as a sentence."""
    known = stems(root)
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        if path.stem not in known:
            yield f"notebooks/{path.name}: has no notebooks/src/{path.stem}.py"
    for stem in known:
        path = root / "notebooks" / f"{stem}.ipynb"
        if not path.is_file():
            yield f"notebooks/{stem}.ipynb: missing"
            continue
        source = (root / "notebooks" / "src" / f"{stem}.py").read_text(encoding="utf-8")
        for problem in check_notebook(nbformat.read(path, as_version=4), unexecuted(source), root):
            yield f"notebooks/{stem}.ipynb: {problem}"
        if path.stat().st_size > MAX_BYTES:
            yield f"notebooks/{stem}.ipynb: {path.stat().st_size} bytes, at most {MAX_BYTES}"


def check_notebook(built: NotebookNode, fresh: NotebookNode, root: Path) -> Iterator[str]:
    """Problems of one notebook beside its unexecuted self."""
    if built.metadata != fresh.metadata:
        yield f"metadata: expected {dict(fresh.metadata)}, got {dict(built.metadata)}"
    if inputs(built) != inputs(fresh):
        pairs = zip(inputs(built), inputs(fresh), strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        where = "the number of cells" if first is None else f"cell {first + 1}"
        yield f"not in step with its source, first in {where}"
    count = 0
    for number, cell in enumerate(built.cells, 1):
        if cell.cell_type == "code" and cell.source:
            count += 1
            for problem in _problems(cell, count, root):
                yield f"cell {number}: {problem}"


def _problems(cell: NotebookNode, count: int, root: Path) -> Iterator[str]:
    if cell.execution_count != count:
        yield f"expected to be executed as number {count}, got {cell.execution_count}"
    kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
    if WIDGET in kinds:
        yield "stores a widget"
    if draws(cell.source) and "image/png" not in kinds:
        yield "draws a figure but shows no image"
    if cell.source.rstrip().endswith(";"):
        yield "ends with a semicolon"
    may_raise = "raises-exception" in cell.metadata.get("tags", [])
    for output in cell.outputs:
        if output.output_type == "error" and not may_raise:
            yield f"raised {output.ename}: {output.evalue}"
        if output.output_type == "stream" and output.name == "stderr":
            yield f"wrote to stderr: {output.text.strip()[:80]}"
        for text in _texts(output):
            if found := MACHINE.search(text.replace(str(root), "/root/")):
                yield f"shows what belongs to one machine: {found[0]}"


def draws(source: str) -> bool:
    """Whether a cell, outside of the functions that it defines, makes a figure or a Stepper."""
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a magic
        return False
    own = (n for n in body if not isinstance(n, ast.FunctionDef | ast.ClassDef))
    calls = [n.func for node in own for n in ast.walk(node) if isinstance(n, ast.Call)]
    makes_figure = any(
        isinstance(f, ast.Attribute) and f.attr in DRAWS and getattr(f.value, "id", "") == "plt"
        for f in calls
    )
    last = body[-1].value if body and isinstance(body[-1], ast.Expr) else None
    shows_steps = isinstance(last, ast.Call) and getattr(last.func, "id", "") == "Stepper"
    return makes_figure or shows_steps


def _texts(output: NotebookNode) -> Iterator[str]:
    if output.output_type == "stream":
        yield output.text
    elif output.output_type == "error":
        yield from output.traceback
    for kind, data in output.get("data", {}).items():
        if not kind.startswith("image/") or kind.endswith("svg+xml"):
            yield str(data)


if __name__ == "__main__":
    sys.exit(main())
