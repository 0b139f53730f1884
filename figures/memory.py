"""What a rank holds over virtual time, by what it is for: stacked areas."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from figures.scale import scaled
from figures.style import COLOURS

COLOUR = {
    "parameters": COLOURS["blue"],
    "gradients": COLOURS["vermilion"],
    "optimizer_states": COLOURS["green"],
    "activations": COLOURS["sky"],
    "communication_buffers": COLOURS["orange"],
    "host": "0.6",
}


def memory(
    ax: Axes,
    trace: Any,
    *,
    rank: int = 0,
    categories: Sequence[str] | None = None,
    has_legend: bool = True,
) -> None:
    """Draw the memory samples of a trace (`reference.parallel.ranks.Trace`) on `ax`.

    Each category lies on the ones before it; without `categories` all that are ever held on the
    device. The legend stands to the right of the axes.
    """
    samples = trace.memory_samples(rank)
    if not samples:
        raise ValueError(f"trace: no memory samples of rank {rank}; run with is_measured=True")
    if categories is None:
        on_device = [category for category in COLOUR if category != "host"]
        categories = [c for c in on_device if any(held[c] for _, held in samples)]
    unknown = set(categories) - set(COLOUR)
    if unknown:
        raise ValueError(f"categories: expected some of {', '.join(COLOUR)}; got {unknown}")
    seconds = np.array([at for at, _ in samples])
    held = np.array([[sample[c] for c in categories] for _, sample in samples], dtype=float).T
    time_factor, time_unit = scaled(max(float(seconds[-1]), trace.seconds), "s")
    factor, unit = scaled(float(held.sum(axis=0).max()), "B")
    areas = ax.stackplot(
        seconds * time_factor, held * factor, step="post", colors=[COLOUR[c] for c in categories],
        labels=[c.replace("_", " ") for c in categories], linewidth=0,
    )  # fmt: skip
    ax.set(
        xlabel=f"virtual time ({time_unit})", ylabel=f"held by rank {rank} ({unit})",
        xlim=(0, None), ylim=(0, None),
    )  # fmt: skip
    if has_legend:
        ax.legend(
            areas[::-1], [a.get_label() for a in areas[::-1]], loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )  # fmt: skip
