"""Small tables as text, the same in a notebook, on a slide and in a terminal."""

from typing import Any


def table(*rows: Any) -> None:
    """Print rows as a table; the first row is the head, the first column stands left.

    Floats are shown with four digits. Raises: ValueError for rows of different lengths.
    """
    texts = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    if len(lengths := {len(row) for row in texts}) > 1:
        raise ValueError(f"rows: expected as many columns in each, got {sorted(lengths)}")
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for number, row in enumerate(texts):
        cells = zip(row, widths, strict=True)
        print("  ".join(t.rjust(w) if j else t.ljust(w) for j, (t, w) in enumerate(cells)))
        if number == 0:
            print("  ".join("-" * w for w in widths))
