"""What each rank computes and sends, over virtual time: bars, one row for each rank and stream."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

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
    end = max(e.end_seconds for e in events) if seconds is None else seconds
    factor, unit = scaled(end, "s")
    palette = dict(colours or _palette(events))
    for event in events:
        width = event.end_seconds - event.start_seconds
        row = rows[event.rank, event.stream]
        ax.barh(
            row, width * factor, left=event.start_seconds * factor, height=0.8,
            color=palette.get(event.name, "0.6"), edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        text = _text(event.name, labels)
        if text and width > MIN_LABEL_SHARE * end * len(text):
            middle = (event.start_seconds + width / 2) * factor
            ax.text(middle, row, text, ha="center", va="center", color="white", fontsize=10)
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


def _palette(events: Sequence[Any]) -> dict[str, str]:
    names = list(dict.fromkeys(e.name for e in sorted(events, key=lambda e: e.stream != "compute")))
    cycle = list(COLOURS.values())
    return {name: cycle[i % len(cycle)] for i, name in enumerate(names)}


def _text(name: str, labels: Mapping[str, str] | bool) -> str:
    if isinstance(labels, bool):
        return name.replace("_", "-") if labels else ""
    return labels.get(name, "")
