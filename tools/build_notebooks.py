"""`python -m tools.build_notebooks [STEM ...]`: notebooks/src/*.py, executed -> notebooks/*.ipynb.

One way only: authors edit src, students open (and may change) the .ipynb. What is written is the
same each time but for figures and for cells tagged nbval-ignore-output: cell ids come from the
cells' text, timings and widget states are left out, and so is metadata that nothing reads.
"""

import argparse
import asyncio
import hashlib
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
KEPT_METADATA = ("slideshow", "tags")
WIDGET = "application/vnd.jupyter.widget-view+json"
CELL_SECONDS = 600
AT_ONCE = 2


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.build_notebooks")
    parser.add_argument("stems", nargs="*", help="such as 01_normalization (all)")
    parser.add_argument("--force", action="store_true", help="also those whose source is unchanged")
    options = parser.parse_args(argv)
    known = stems(root)
    unknown = set(options.stems) - set(known)
    if unknown:
        print(f"no notebooks/src/ of: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    wanted = options.stems or known
    stale = [stem for stem in wanted if options.force or not is_current(root, stem)]
    for stem in (s for s in wanted if s not in stale):
        print(f"{stem}: in step (--force executes it again)")
    with tempfile.TemporaryDirectory(prefix="ipython-") as folder:
        return asyncio.run(_build_all(root, stale, _environment(Path(folder))))


def stems(root: Path) -> list[str]:
    """The names of all sources, in the order of the course."""
    return sorted(path.stem for path in (root / "notebooks" / "src").glob("*.py"))


def unexecuted(source: str) -> NotebookNode:
    """The notebook of a py:percent text, before execution."""
    cells = []
    seen: Counter[str] = Counter()
    for cell in jupytext.reads(source, fmt="py:percent").cells:
        new = (
            nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        )
        text = f"{cell.cell_type}:{cell.source}"
        seen[text] += 1
        digest = hashlib.sha256(f"{seen[text]}:{text}".encode()).hexdigest()[:12]
        kept = {key: cell.metadata[key] for key in KEPT_METADATA if key in cell.metadata}
        cells.append(new(cell.source, id=digest, metadata=kept))
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


async def execute(notebook: NotebookNode, folder: Path, environment: dict[str, str]) -> None:
    """Run all cells in `folder`, in place, and leave out what differs from run to run.

    Raises: nbclient.exceptions.CellExecutionError, with the traceback.
    """
    from nbclient import NotebookClient

    await NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name=KERNEL["name"],
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
    ).async_execute(env=environment)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata = {
                key: cell.metadata[key] for key in KEPT_METADATA if key in cell.metadata
            }
            cell.outputs = list(_merged(cell.outputs))


def is_current(root: Path, stem: str) -> bool:
    """Whether the built notebook has the source's cells and all of them were executed."""
    path = root / "notebooks" / f"{stem}.ipynb"
    if not path.is_file():
        return False
    built = nbformat.read(path, as_version=4)
    fresh = unexecuted((root / "notebooks" / "src" / f"{stem}.py").read_text(encoding="utf-8"))
    executed = all(c.execution_count for c in built.cells if c.cell_type == "code" and c.source)
    return executed and inputs(built) == inputs(fresh)


def inputs(notebook: NotebookNode) -> list[tuple[str, str, str, dict]]:
    """What the author wrote: each cell's id, type, text and metadata."""
    return [(c.id, c.cell_type, c.source, dict(c.metadata)) for c in notebook.cells]


def _environment(profiles: Path) -> dict[str, str]:
    """A kernel's environment without the author's IPython, matplotlib and hub settings."""
    profile = profiles / "profile_default"
    profile.mkdir()
    (profile / "ipython_kernel_config.py").write_text("c.IPKernelApp.log_level = 40\n")
    kept = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    return {**kept, "IPYTHONDIR": str(profiles), "HF_HUB_OFFLINE": "1"}


async def _build_all(root: Path, stale: list[str], environment: dict[str, str]) -> int:
    turn = asyncio.Semaphore(AT_ONCE)

    async def in_turn(stem: str) -> int:
        async with turn:
            return await _build(root, stem, environment)

    return max(await asyncio.gather(*map(in_turn, stale)), default=0)


async def _build(root: Path, stem: str, environment: dict[str, str]) -> int:
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    started = time.perf_counter()
    source = (root / "notebooks" / "src" / f"{stem}.py").read_text(encoding="utf-8")
    notebook = unexecuted(source)
    try:
        await execute(notebook, root / "notebooks", environment)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        print(f"{stem}: failed, nothing written\n{error}", file=sys.stderr)
        return 1
    path = root / "notebooks" / f"{stem}.ipynb"
    partial = path.with_suffix(".partial")
    nbformat.write(notebook, partial)
    partial.replace(path)
    print(f"{stem}: executed in {time.perf_counter() - started:.0f} s", flush=True)
    return 0


def _merged(outputs: list[NotebookNode]) -> Iterator[NotebookNode]:
    """Outputs without widget views and stack frames, neighbouring pieces of a stream as one."""
    last: NotebookNode | None = None
    for output in outputs:
        if "data" in output:
            output.data.pop(WIDGET, None)
        if output.output_type == "error":  # the frames name files of this machine
            output.traceback = output.traceback[-1:]
        if last is not None and output.output_type == last.output_type == "stream":
            if output.name == last.name:
                last.text += output.text
                continue
        if last is not None:
            yield last
        last = output
    if last is not None:
        yield last


if __name__ == "__main__":
    sys.exit(main())
