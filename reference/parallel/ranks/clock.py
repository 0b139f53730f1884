"""The virtual clock: when each rank would compute and communicate on given hardware.

Each rank has a compute stream, which counted FLOPs fill, and a communication stream for each
group, as NCCL has (for messages: one for each pair and direction). An operation starts when the
last of its ranks has reached the call and their streams are free, and ends `cost.seconds` later;
the compute streams go on meanwhile, until they wait for it:

    start = max over ranks of (compute stream at the call, end of the group's previous operation)
    wait:   compute stream = max(compute stream, end)

So overlap, prefetch and pipeline bubbles show. Only counted FLOPs take time: norms, activations
and optimizer steps are free here.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from reference.parallel.ranks import cost
from reference.parallel.ranks.calls import Call
from reference.parallel.ranks.hardware import Hardware

# Of the latest that a rank keeps; older ones are dropped, so that long runs do not grow.
MAX_EVENTS = 5_000


class Event(NamedTuple):
    """One bar of the timeline. `stream`: compute, communication or host."""

    rank: int
    stream: str
    name: str
    start_seconds: float
    end_seconds: float
    group: str = ""
    payload_bytes: int = 0


class Clock:
    """The streams of all ranks known here (in a real process: of one, its peers just like it)."""

    def __init__(self, hardware: Hardware, ranks: Sequence[int]) -> None:
        self.hardware = hardware
        self._now = dict.fromkeys(ranks, 0.0)
        self._busy_until: dict[Hashable, float] = {}
        self._events: dict[int, deque[Event]] = {r: deque(maxlen=MAX_EVENTS) for r in ranks}

    def now(self, rank: int) -> float:
        """Where the rank's compute stream stands, in seconds."""
        return self._now[rank]

    def events(self, rank: int) -> list[Event]:
        """The rank's timeline."""
        return list(self._events[rank])

    def compute(self, rank: int, flops: float, name: str) -> None:
        """Occupy the compute stream. Adjacent work of one name becomes one event."""
        start = self._now[rank]
        self._now[rank] = end = start + flops / self.hardware.flops_per_second
        events = self._events[rank]
        for i in range(len(events) - 1, max(len(events) - 8, -1), -1):
            last = events[i]
            if last.stream == "compute":
                if last.name == name and last.end_seconds == start:
                    events[i] = last._replace(end_seconds=end)
                    return
                break
        events.append(Event(rank, "compute", name, start, end))

    def communicate(self, calls: Sequence[Call]) -> float:
        """Occupy the communication streams of all calls' ranks; the end, in seconds."""
        streams = [self._stream(call) for call in calls]
        start = max(
            max(call.ready_seconds, self._busy_until.get(stream, 0.0))
            for call, stream in zip(calls, streams, strict=True)
        )
        end = start + cost.seconds(calls, self.hardware)
        self._busy_until.update(dict.fromkeys(streams, end))
        for call in calls if end > start else ():
            self._events[call.rank].append(
                Event(call.rank, "communication", call.operation, start, end, call.group.name,
                      cost.payload_bytes(call))
            )  # fmt: skip
        return end

    def copy_to_host(self, rank: int, name: str, num_bytes: int) -> float:
        """Occupy the rank's link to the host in one direction; the end, in seconds."""
        link = self.hardware.host
        start = max(self._now[rank], self._busy_until.get((rank, name), 0.0))
        end = start + link.latency_seconds + num_bytes / link.bytes_per_second
        self._busy_until[rank, name] = end
        self._events[rank].append(Event(rank, "host", name, start, end, "", num_bytes))
        return end

    def wait(self, rank: int, end_seconds: float) -> None:
        """Hold the compute stream until then."""
        self._now[rank] = max(self._now[rank], end_seconds)

    def _stream(self, call: Call) -> Hashable:
        return (call.rank, call.group, call.channel if call.is_message else None)
