"""One look for every figure: colour-blind safe, legible from the back of a room."""

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes

# Okabe and Ito's palette (2008) without its yellow, which is too pale on white.
COLOURS = {
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "orange": "#E69F00",
    "black": "#000000",
}


def use() -> None:
    """Set matplotlib's defaults. Call it once, in a notebook's first cell."""
    mpl.rcParams.update(
        {
            "axes.axisbelow": True,
            "axes.formatter.useoffset": False,
            "axes.grid": True,
            "axes.labelsize": 13,
            "axes.prop_cycle": cycler(color=list(COLOURS.values())),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 13,
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "figure.figsize": (7.5, 4.2),
            "figure.titlesize": 14,
            "font.family": "DejaVu Sans",
            "font.size": 12,
            "grid.alpha": 0.25,
            "image.cmap": "viridis",
            "image.interpolation": "nearest",
            "legend.frameon": False,
            "lines.linewidth": 2.2,
            "savefig.dpi": 100,
            "xtick.labelsize": 12,
            "ytick.labelsize": 12,
        }
    )


def label_lines(ax: Axes, size: float = 12) -> None:
    """Write each labelled line's label beside its right end, in its colour, instead of a legend.

    Labels that would touch are moved apart upwards and downwards, in the order of the lines' ends.
    Call it last: after the data, the limits and the scales are set.
    """
    lines = [line for line in ax.lines if not str(line.get_label()).startswith("_")]
    if not lines:
        raise ValueError("ax: no labelled lines; pass label=... to plot")
    figure = ax.get_figure(root=True)
    figure.draw_without_rendering()
    to_points = 72 / figure.dpi
    low, high = (y * to_points for y in ax.bbox.extents[1::2])
    ends = []
    for line in lines:
        points = line.get_xydata()
        x, y = points[np.isfinite(points).all(axis=1)][-1]
        height = ax.transData.transform((x, y))[1] * to_points
        ends.append((height, line, (x, y)))
    ends.sort(key=lambda end: end[0])
    for target, (height, line, end) in zip(
        _apart([e[0] for e in ends], 1.25 * size, low + size / 2, high), ends, strict=True
    ):
        ax.annotate(
            str(line.get_label()), end, xytext=(6, target - height), textcoords="offset points",
            va="center", color=line.get_color(), fontsize=size, annotation_clip=False,
        )  # fmt: skip


def _apart(heights: list[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending heights, within low and high where they fit, so that neighbours keep the gap."""

    def bottom(group: list[float]) -> float:
        span = gap * (len(group) - 1)
        return max(low, min(high - span, sum(group) / len(group) - span / 2))

    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and bottom(groups[-1]) - bottom(groups[-2]) < gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [bottom(group) + i * gap for group in groups for i in range(len(group))]
