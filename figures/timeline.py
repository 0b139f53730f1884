"""What each rank computes and sends, over virtual time: bars, one row for each rank and stream."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from figures.scale import scaled
from figures.style import COLOURS

STREAMS = ("compute", "communication", "host")
MIN_LABEL_SHARE = 0.018


def timeline(
    ax: Axes,
    trace: Any,
    *,
    ranks: Sequence[int] | None = None,
    streams: Sequence[str] = STREAMS,
    colours: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | bool = True,
    seconds: float | None = None,
) -> None:
    """Draw a trace's events (`reference.parallel.ranks.Trace`) on `ax`, the first rank on top.

    `colours` and `labels` go by an event's name; labels=True writes the names themselves where
    they fit, False none. `seconds` is the right end, to give several timelines one scale.
    """
    ranks = range(trace.world_size) if ranks is None else ranks
    events = [e for e in trace.timeline() if e.rank in ranks and e.stream in streams]
    if not events:
        raise ValueError(f"trace: no events of ranks {list(ranks)} on {', '.join(streams)}")
    used = [stream for stream in streams if any(e.stream == stream for e in events)]
    rows = {(rank, stream): i for i, (rank, stream) in enumerate(
        (rank, stream) for rank in ranks for stream in used
    )}  # fmt: skip
    lanes, num_lanes = _lanes(events)
    end = max(e.end_seconds for e in events) if seconds is None else seconds
    factor, unit = scaled(end, "s")
    palette = dict(colours or _palette(events))
    for event, lane in zip(events, lanes, strict=True):
        width = event.end_seconds - event.start_seconds
        height = 0.8 / num_lanes[event.rank, event.stream]
        middle = rows[event.rank, event.stream] - 0.4 + (lane + 0.5) * height
        colour = palette.get(event.name, "0.6")
        ax.barh(
            middle, width * factor, left=event.start_seconds * factor, height=height,
            color=colour, edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        text = _text(event.name, labels)
        if text and width > MIN_LABEL_SHARE * end * len(text):
            ax.text(
                (event.start_seconds + width / 2) * factor, middle, text, ha="center", va="center",
                color=_ink(colour), fontsize=10 if height > 0.5 else 8,
            )  # fmt: skip
    names = [
        f"rank {rank}" if len(used) == 1 else f"rank {rank} {stream}" if i == 0 else stream
        for rank in ranks
        for i, stream in enumerate(used)
    ]
    ax.set(
        yticks=range(len(rows)), yticklabels=names, ylim=(len(rows) - 0.4, -0.6),
        xlim=(0, end * factor), xlabel=f"virtual time ({unit})",
    )  # fmt: skip
    ax.grid(axis="y", visible=False)


def _lanes(events: Sequence[Any]) -> tuple[list[int], dict[tuple[int, str], int]]:
    """Where bars of one row would lie on each other, each takes the first lane that is free."""
    busy_until: dict[tuple[int, str], list[float]] = {}
    found = [0] * len(events)
    for index, event in sorted(enumerate(events), key=lambda e: (e[1].start_seconds, e[1].name)):
        ends = busy_until.setdefault((event.rank, event.stream), [])
        free = [i for i, end in enumerate(ends) if end <= event.start_seconds * (1 + 1e-9)]
        lane = free[0] if free else len(ends)
        ends[lane : lane + 1] = [event.end_seconds]
        found[index] = lane
    return found, {row: len(ends) for row, ends in busy_until.items()}


def _palette(events: Sequence[Any]) -> dict[str, str]:
    names = list(dict.fromkeys(e.name for e in sorted(events, key=lambda e: e.stream != "compute")))
    cycle = list(COLOURS.values())
    return {name: cycle[i % len(cycle)] for i, name in enumerate(names)}


def _ink(colour: str) -> str:
    """Black or white, whichever can be read on the colour."""
    red, green, blue = to_rgb(colour)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def _text(name: str, labels: Mapping[str, str] | bool) -> str:
    if isinstance(labels, bool):
        return name.replace("_", "-") if labels else ""
    return labels.get(name, "")
