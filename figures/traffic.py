"""Who sends how much to whom: a matrix of ranks, with the bytes written into its cells."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from figures.scale import scaled

MAX_WRITTEN_RANKS = 10


def traffic(ax: Axes, trace: Any, *, largest_bytes: float | None = None) -> None:
    """Draw a trace's traffic matrix (`reference.parallel.ranks.Trace`) on `ax`.

    `largest_bytes` is the end of the colours' scale, to compare several matrices.
    """
    matrix = np.array(trace.traffic_matrix())
    largest = float(matrix.max()) if largest_bytes is None else largest_bytes
    if largest <= 0:
        raise ValueError("trace: no rank sent anything")
    factor, unit = scaled(largest, "B")
    image = ax.imshow(matrix * factor, vmin=0, vmax=largest * factor, cmap="cividis")
    if len(matrix) <= MAX_WRITTEN_RANKS:
        for (sender, receiver), num_bytes in np.ndenumerate(matrix):
            if num_bytes:
                ax.text(
                    receiver, sender, f"{num_bytes * factor:.3g}", ha="center", va="center",
                    fontsize=10, color="white" if num_bytes < 0.6 * largest else "black",
                )  # fmt: skip
    ax.set(xlabel="to rank", ylabel="from rank")
    if len(matrix) <= MAX_WRITTEN_RANKS:
        ax.set(xticks=range(len(matrix)), yticks=range(len(matrix)))
    ax.grid(visible=False)
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.colorbar(image, ax=ax, label=f"sent ({unit})")
