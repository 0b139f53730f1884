"""The ledger of traffic: calls and bytes of one rank, by group and operation.

`payload_bytes` is what the program asked for, `wire_bytes` what the rank then sends by the
algorithm of `cost`. Sent bytes are also kept by receiver, for the matrix of who talks to whom.
"""

from collections import defaultdict
from dataclasses import dataclass

from reference.parallel.ranks.calls import Call
from reference.parallel.ranks.cost import payload_bytes, wire_bytes


@dataclass
class TrafficRow:
    """What one rank did with one operation in one group."""

    rank: int
    group: str
    operation: str
    num_calls: int = 0
    payload_bytes: int = 0
    wire_bytes: float = 0.0


class TrafficLedger:
    """One rank's traffic since the start, or since `reset`."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.reset()

    def reset(self) -> None:
        """Forget all: to measure one step by itself."""
        self._rows: dict[tuple[str, str], TrafficRow] = {}
        self.sent_to: dict[int, float] = defaultdict(float)

    def record(self, call: Call) -> None:
        """Add one call."""
        sent = wire_bytes(call)
        self.add(call.group.name, call.operation, payload_bytes(call), sum(sent.values()))
        for receiver, num_bytes in sent.items():
            self.sent_to[receiver] += num_bytes

    def add(self, group: str, operation: str, payload: int, wire: float) -> None:
        """Add a call of which only the bytes are known."""
        key = (group, operation)
        row = self._rows.setdefault(key, TrafficRow(self.rank, group, operation))
        row.num_calls += 1
        row.payload_bytes += payload
        row.wire_bytes += wire

    def rows(self) -> list[TrafficRow]:
        """In the order in which the operations first came up."""
        return list(self._rows.values())

    def total(self, *, group: str | None = None, operation: str | None = None) -> TrafficRow:
        """The sum of the rows of a group, of an operation, of both, or of all."""
        return total(self.rows(), group=group, operation=operation)


def total(
    rows: list[TrafficRow],
    *,
    rank: int | None = None,
    group: str | None = None,
    operation: str | None = None,
) -> TrafficRow:
    """The sum of those rows that have the given rank, group and operation."""
    chosen = [
        row
        for row in rows
        if rank in (None, row.rank)
        and group in (None, row.group)
        and operation in (None, row.operation)
    ]
    return TrafficRow(
        rank=-1 if rank is None else rank,
        group=group or "all",
        operation=operation or "all",
        num_calls=sum(row.num_calls for row in chosen),
        payload_bytes=sum(row.payload_bytes for row in chosen),
        wire_bytes=sum(row.wire_bytes for row in chosen),
    )
