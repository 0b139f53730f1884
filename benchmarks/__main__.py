"""python -m benchmarks [NAME ...]: measure every topic, or those named, and print one table.

A topic is a module of this package with `rows() -> list[measure.Row]`.
"""

import argparse
import importlib
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import measure

NOT_TOPICS = {"__init__", "__main__", "measure"}


def topics() -> list[str]:
    """The names of all benchmarks."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in NOT_TOPICS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(topics()))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=measure.RESULTS, help="folder of the JSON results"
    )
    chosen = parser.parse_args()
    unknown = set(chosen.names) - set(topics())
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(topics())}")
    torch.set_num_threads(chosen.threads)
    measure.keep_memory()
    console = Console()
    table = Table(title=_title(), caption="ratio = ours / theirs: below 1 is faster or smaller")
    for column in ("benchmark", "ours", "theirs", "ratio"):
        table.add_column(column, justify="left" if column == "benchmark" else "right")
    for name in chosen.names or topics():
        with console.status(f"measuring {name}"):
            rows = importlib.import_module(f"benchmarks.{name}").rows()
        measure.write(name, rows, chosen.out)
        table.add_section()
        for row in rows:
            table.add_row(row.what, *_shown(row), f"{row.ratio:.2f}")
    console.print(table)


def _title() -> str:
    machine = measure.machine()
    return f"{machine['processor']}, {machine['threads']} thread(s), torch {machine['torch']}"


def _shown(row: measure.Row) -> tuple[str, str]:
    if row.unit == "bytes":
        return f"{row.ours / 1e6:,.2f} MB", f"{row.theirs / 1e6:,.2f} MB"
    return f"{row.ours:,.0f} {row.unit}", f"{row.theirs:,.0f} {row.unit}"


if __name__ == "__main__":
    main()
