"""What a run leaves behind: a timeline, memory and traffic as data, and a file for Perfetto.

Figures draw it (figures/timeline.py, memory.py, traffic.py); nothing here does.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference.parallel.ranks.clock import Event
from reference.parallel.ranks.ledger import TrafficRow, total
from reference.parallel.ranks.memory import ON_DEVICE, MemorySample, MemoryUse

STREAMS = ("compute", "communication", "host")


@dataclass
class RankTrace:
    """The ledgers of one rank at its end."""

    rank: int
    seconds: float
    events: list[Event]
    traffic: list[TrafficRow]
    sent_to: dict[int, float]
    memory: MemoryUse
    samples: list[MemorySample]


class Trace:
    """The ledgers of all ranks of a run (of one, where only one was run)."""

    def __init__(self, world_size: int, ranks: Sequence[RankTrace]) -> None:
        self.world_size = world_size
        self._of = {trace.rank: trace for trace in ranks}

    @property
    def seconds(self) -> float:
        """When the last rank's streams are done, on the virtual clock."""
        ends = [e.end_seconds for trace in self._of.values() for e in trace.events]
        return max([trace.seconds for trace in self._of.values()] + ends, default=0.0)

    def timeline(self, *, rank: int | None = None, stream: str | None = None) -> list[Event]:
        """Bars of work by rank and stream, in order of their start."""
        chosen = [
            event
            for trace in self._of.values()
            for event in trace.events
            if rank in (None, event.rank) and stream in (None, event.stream)
        ]
        return sorted(chosen, key=lambda event: (event.start_seconds, event.rank))

    def busy_seconds(self, rank: int, stream: str = "compute") -> float:
        """How long a rank's stream is occupied, overlapping work once."""
        busy, reached = 0.0, 0.0
        for event in self.timeline(rank=rank, stream=stream):
            start = max(reached, event.start_seconds)
            busy += max(0.0, event.end_seconds - start)
            reached = max(reached, event.end_seconds)
        return busy

    def idle_fraction(self, rank: int) -> float:
        """The share of the run without computation: bubbles and exposed communication."""
        return 1 - self.busy_seconds(rank) / self.seconds if self.seconds else 0.0

    def memory(self) -> dict[int, MemoryUse]:
        """Bytes held and held at most, by rank."""
        return {rank: trace.memory for rank, trace in self._of.items()}

    def memory_samples(self, rank: int = 0) -> list[MemorySample]:
        """A rank's bytes by category over virtual time."""
        return self._of[rank].samples

    def traffic(self) -> list[TrafficRow]:
        """Calls and bytes by rank, group and operation."""
        return [row for trace in self._of.values() for row in trace.traffic]

    def total(
        self, *, rank: int | None = None, group: str | None = None, operation: str | None = None
    ) -> TrafficRow:
        """The sum of the rows of traffic that have this rank, group and operation."""
        return total(self.traffic(), rank=rank, group=group, operation=operation)

    def traffic_matrix(self) -> list[list[float]]:
        """Wire bytes that the rank of the row sent to the rank of the column."""
        matrix = [[0.0] * self.world_size for _ in range(self.world_size)]
        for rank, trace in self._of.items():
            for receiver, num_bytes in trace.sent_to.items():
                matrix[rank][receiver] = num_bytes
        return matrix

    def to_perfetto(self, path: str | Path) -> None:
        """Write a file that ui.perfetto.dev and chrome://tracing open: ranks, streams, memory."""
        Path(path).write_text(json.dumps({"traceEvents": self.chrome_events()}))

    def chrome_events(self) -> list[dict[str, Any]]:
        """The events of Chrome's trace format; times in microseconds."""
        events: list[dict[str, Any]] = []
        for rank, trace in self._of.items():
            name = {
                "name": "process_name",
                "ph": "M",
                "pid": rank,
                "args": {"name": f"rank {rank}"},
            }
            events.append(name)
            for thread, stream in enumerate(STREAMS):
                args = {"name": stream}
                events.append({"name": "thread_name", "ph": "M", "pid": rank, "tid": thread,
                               "args": args})  # fmt: skip
            events += [_bar(event) for event in trace.events]
            for seconds, held in trace.samples:
                on_device = {category: held[category] for category in ON_DEVICE}
                events.append({"name": "memory", "ph": "C", "pid": rank, "ts": seconds * 1e6,
                               "args": on_device})  # fmt: skip
        return events


def _bar(event: Event) -> dict[str, Any]:
    return {
        "name": event.name,
        "ph": "X",
        "pid": event.rank,
        "tid": STREAMS.index(event.stream),
        "ts": event.start_seconds * 1e6,
        "dur": (event.end_seconds - event.start_seconds) * 1e6,
        "args": {"group": event.group, "payload_bytes": event.payload_bytes},
    }
