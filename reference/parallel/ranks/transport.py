"""How calls reach the other ranks: the one thing in which simulation and real processes differ.

`Comm` says what is to happen and keeps the ledgers; a transport makes it happen. SimulatedRanks
meets the other rank threads in slots; OneRank has no others, only shapes; processes.Processes asks
torch.distributed.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from reference.parallel.ranks.calls import Call, Group
from reference.parallel.ranks.clock import Clock
from reference.parallel.ranks.collectives import check_agreement, combine, deliver, disagreement
from reference.parallel.ranks.scheduler import Baton


@runtime_checkable
class Transport(Protocol):
    """Starts an operation, and later waits for its result to be in `call.out`.

    `join` is called once by each rank of a new group.
    """

    clock: Clock

    def join(self, group: Group) -> None: ...
    def start(self, call: Call) -> Any: ...
    def wait(self, call: Call, ticket: Any) -> None: ...
    def is_completed(self, call: Call, ticket: Any) -> bool: ...


@dataclass(eq=False)
class Slot:
    """Where the calls of one operation meet, and where its result then lies."""

    calls: dict[int, Call] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    is_completed: bool = False
    result: Any = None
    end_seconds: float = 0.0


class SimulatedRanks:
    """Rank threads of one process, handing the baton over.

    The calls of a collective meet by group and sequence number: the last to arrive checks that all
    agree, combines, and releases those who wait. Messages meet by group, sender, receiver and tag,
    the oldest first. A send waits until it is received, as NCCL's and gloo's do.
    """

    def __init__(self, clock: Clock, *, has_values: bool) -> None:
        self.clock, self._has_values = clock, has_values
        self.baton: Baton
        self._collectives: dict[tuple[Group, int], Slot] = {}
        self._next: defaultdict[tuple[Group, int], int] = defaultdict(int)
        self._messages: dict[Any, deque[Slot]] = {}

    def join(self, group: Group) -> None:
        """A group is a name here; nothing is to be made."""

    def start(self, call: Call) -> Slot:
        self.baton.check()
        slot = self._message_slot(call) if call.is_message else self._collective_slot(call)
        slot.calls[call.rank] = call
        if len(slot.calls) == (2 if call.is_message else call.group.size):
            self._complete(slot)
        return slot

    def _collective_slot(self, call: Call) -> Slot:
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

    def _complete(self, slot: Slot) -> None:
        calls = sorted(slot.calls.values(), key=lambda call: call.group_rank)
        check_agreement(calls)
        if calls[0].is_message:
            sender = next(call for call in calls if call.operation == "send")
            assert sender.tensor is not None
            slot.result = sender.tensor.clone() if self._has_values else None
        elif self._has_values or calls[0].operation == "agree":
            slot.result = combine(calls)
        slot.end_seconds = self.clock.communicate(calls)
        slot.is_completed = True
        self.baton.release(slot.waiting)
        slot.calls, slot.waiting = {}, []

    def wait(self, call: Call, ticket: Slot) -> None:
        if not ticket.is_completed:
            ticket.waiting.append(call.rank)
            self.baton.wait(call.rank, lambda: self._describe(call, ticket))
        if call.operation == "agree":
            call.value = ticket.result
        elif self._has_values:
            deliver(ticket.result, call)
        self.clock.wait(call.rank, ticket.end_seconds)

    def is_completed(self, call: Call, ticket: Slot) -> bool:
        """A rank that only asks would ask for ever: the others get a turn first."""
        if not ticket.is_completed:
            self.baton.let_others_run(call.rank)
        return ticket.is_completed

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

    def _describe(self, call: Call, slot: Slot) -> str:
        if call.is_message:
            return f"{call.group}, {call.describe()}"
        missing = [str(r) for r in call.group.ranks if r not in slot.calls]
        return (
            f"{call.group}, collective {call.sequence}: {call.describe()}; "
            f"{len(slot.calls)} of {call.group.size} have come, missing: {', '.join(missing)}"
        )


class OneRank:
    """One rank alone: results have the right shapes and no values, peers arrive when it does."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def join(self, group: Group) -> None:
        pass

    def start(self, call: Call) -> float:
        if call.operation == "agree":
            raise RuntimeError(
                "split: one rank alone cannot know the others' colors; use comm.mesh(...)"
            )
        return self.clock.communicate([call])

    def wait(self, call: Call, ticket: float) -> None:
        self.clock.wait(call.rank, ticket)

    def is_completed(self, call: Call, ticket: float) -> bool:
        return True
