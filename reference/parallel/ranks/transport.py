"""How calls reach the other ranks: the one thing in which simulation and real processes differ.

`Comm` says what is to happen and keeps the ledgers; a transport makes it happen. SimulatedRanks
meets the other rank threads in slots; OneRank has no others, only shapes; processes.Processes asks
torch.distributed.
"""

from typing import Any, Protocol, runtime_checkable

from reference.parallel.ranks.calls import Call
from reference.parallel.ranks.clock import Clock
from reference.parallel.ranks.collectives import check_agreement, combine, deliver
from reference.parallel.ranks.meetings import Meetings, Slot, describe_wait
from reference.parallel.ranks.scheduler import Baton, Released, own_copy


@runtime_checkable
class Transport(Protocol):
    """Starts an operation, and later waits for its result to be in `call.out`.

    `join` is called by each rank of a new group, for the group of its call.
    """

    clock: Clock

    def join(self, call: Call) -> None: ...
    def start(self, call: Call) -> Any: ...
    def wait(self, call: Call, ticket: Any) -> None: ...
    def is_completed(self, call: Call, ticket: Any) -> bool: ...


class SimulatedRanks:
    """Rank threads of one process, handing the baton over.

    The last to arrive at a slot checks that all agree, combines, and releases those who wait. What
    goes wrong there is every rank's error: each raises it from its own `wait`. A send waits until
    it is received, as NCCL's and gloo's do.
    """

    def __init__(self, clock: Clock, *, has_values: bool) -> None:
        self.clock, self._has_values = clock, has_values
        self.baton: Baton
        self.meetings = Meetings()

    def join(self, call: Call) -> None:
        """A group is a name here; nothing is to be made."""

    def start(self, call: Call) -> Slot:
        self.baton.check()
        slot, is_full = self.meetings.arrive(call)
        if is_full:
            self._complete(slot)
        return slot

    def _complete(self, slot: Slot) -> None:
        calls = slot.in_order()
        try:
            check_agreement(calls)
            slot.result = self._result(calls)
            slot.end_seconds = self.clock.communicate(calls)
        except Exception as error:
            slot.error = error
        slot.is_completed = True
        self.baton.release(slot.waiting)
        slot.calls, slot.waiting = {}, []

    def _result(self, calls: list[Call]) -> Any:
        if not self._has_values and calls[0].operation != "agree":
            return None
        if calls[0].is_message:
            sender = next(call for call in calls if call.operation == "send")
            assert sender.tensor is not None
            return sender.tensor.clone()
        return combine(calls)

    def wait(self, call: Call, ticket: Slot) -> None:
        if not ticket.is_completed:
            ticket.waiting.append(call.rank)
            try:
                self.baton.wait(call.rank, lambda: describe_wait(call, ticket))
            except Released:
                if ticket.error is None:
                    raise
        if ticket.error is not None:
            raise own_copy(ticket.error)
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


class OneRank:
    """One rank alone: results have the right shapes and no values, peers arrive when it does."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def join(self, call: Call) -> None:
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
