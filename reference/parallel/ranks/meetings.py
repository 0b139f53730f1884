"""Where the calls of one operation meet: in simulation, and for the referee of real processes.

The calls of a collective meet by group and sequence number. Messages meet by group, sender,
receiver and tag, the oldest first.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from reference.parallel.ranks.calls import Call, Group
from reference.parallel.ranks.collectives import disagreement


@dataclass(eq=False)
class Slot:
    """The calls that have come, and, once all have, what becomes of them."""

    calls: dict[int, Call] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    is_completed: bool = False
    result: Any = None
    error: Exception | None = None
    end_seconds: float = 0.0

    def in_order(self) -> list[Call]:
        """The calls by rank within the group."""
        return sorted(self.calls.values(), key=lambda call: call.group_rank)


class Meetings:
    """The slots in which somebody is still missing."""

    def __init__(self) -> None:
        self._collectives: dict[tuple[Group, int | str], Slot] = {}
        self._next: defaultdict[tuple[Group, int], int] = defaultdict(int)
        self._messages: dict[Any, deque[Slot]] = {}

    def arrive(self, call: Call) -> tuple[Slot, bool]:
        """The call's slot, and whether all have now come."""
        slot = self._message_slot(call) if call.is_message else self._collective_slot(call)
        slot.calls[call.rank] = call
        return slot, len(slot.calls) == (2 if call.is_message else call.group.size)

    def _collective_slot(self, call: Call) -> Slot:
        key: tuple[Group, int | str] = (call.group, call.operation)
        if call.operation != "join":  # what makes a group is not one of its collectives
            call.sequence = self._next[call.group, call.rank]
            self._next[call.group, call.rank] += 1
            key = (call.group, call.sequence)
        slot = self._collectives.setdefault(key, Slot())
        if len(slot.calls) == call.group.size - 1:
            del self._collectives[key]
        return slot

    def _message_slot(self, call: Call) -> Slot:
        key = (call.group, call.channel, call.tag)
        queue = self._messages.setdefault(key, deque())
        if not queue or call.rank in queue[0].calls:
            queue.append(Slot())
            return queue[-1]
        slot = queue.popleft()
        if not queue:
            del self._messages[key]
        return slot

    def conflicts(self) -> str:
        """For the doctor: collectives in which some have arrived with calls that do not agree."""
        found = []
        for slot in self._collectives.values():
            calls = list(slot.calls.values())
            what = disagreement(calls)
            if what is not None:
                where = f"collective {calls[0].sequence} of {calls[0].group}"
                found.append(f"in {where} the ranks that came disagree about the {what}")
        return "\n".join(found)


def missing(call: Call, slot: Slot) -> Iterator[int]:
    """The ranks without which the call's operation cannot begin."""
    ranks = [call.group.ranks[i] for i in call.channel] if call.is_message else call.group.ranks
    return (rank for rank in ranks if rank not in slot.calls)


def describe_wait(call: Call, slot: Slot) -> str:
    """Where a rank waits and for whom."""
    if call.is_message:
        return f"{call.group}, {call.describe()}"
    absent = ", ".join(map(str, missing(call, slot)))
    which = "" if call.operation == "join" else f", collective {call.sequence}"
    return (
        f"{call.group}{which}: {call.describe()}; "
        f"{len(slot.calls)} of {call.group.size} have come, missing: {absent}"
    )
