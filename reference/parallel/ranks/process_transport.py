"""Calls carried out by torch.distributed, one process a rank."""

import threading
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from reference.parallel.ranks.calls import Call, Group
from reference.parallel.ranks.clock import Clock
from reference.parallel.ranks.control import Control
from reference.parallel.ranks.reductions import from_wire
from reference.parallel.ranks.starters import STARTERS

POLL_SECONDS = 2e-4


@dataclass(eq=False)
class Ticket:
    """A call on its way: announced, then started or refused."""

    call: Call
    end_seconds: float
    number: int = 0
    is_answered: bool = False
    error: BaseException | None = None
    work: Any = None
    end: Future[Any] | None = None
    buffer: Tensor | None = None


class Processes:
    """Starts torch.distributed's operations on buffers and copies the results out at `wait`.

    With a line to a referee an operation starts when all of its ranks have announced it and agree;
    those of which this is heard late start at the rank's next call or wait.
    """

    def __init__(self, clock: Clock, control: Control | None = None) -> None:
        self.clock, self.control = clock, control
        self._groups: dict[Group, Any] = {}
        self._pending: dict[int, Ticket] = {}

    def adopt(self, group: Group, process_group: Any) -> None:
        """Use a process group that somebody else has made."""
        self._groups[group] = process_group

    def join(self, call: Call) -> None:
        """Make the process group; all its ranks do, and no others need to."""
        if call.group not in self._groups:
            self.wait(call, self.start(call))

    def start(self, call: Call) -> Ticket:
        is_timed = call.operation not in ("agree", "join")
        end_seconds = self.clock.communicate([call]) if is_timed else call.ready_seconds
        ticket = Ticket(call, end_seconds)
        if self.control is None:
            self._begin(ticket)
        else:
            ticket.number = self.control.announce(call)
            self._pending[ticket.number] = ticket
            self._take_in(self.control.receive())
        return ticket

    def _take_in(self, answers: list[tuple[int, BaseException | None]]) -> None:
        for number, error in answers:
            ticket = self._pending.pop(number)
            ticket.is_answered, ticket.error = True, error
            if error is None:
                try:
                    self._begin(ticket)
                except Exception as failure:
                    ticket.error = failure

    def _begin(self, ticket: Ticket) -> None:
        call = ticket.call
        if call.operation == "join":
            self._groups[call.group] = dist.new_group(
                list(call.group.ranks), use_local_synchronization=True, sort_ranks=False
            )
            return
        group = self._groups.get(call.group, dist.group.WORLD)
        if call.operation == "agree":
            values = [None] * call.group.size
            dist.all_gather_object(values, call.value, group=group)
            call.value = values
        else:
            ticket.work, ticket.buffer = STARTERS[call.operation](call, group)

    def wait(self, call: Call, ticket: Ticket) -> None:
        if self.control is not None and not ticket.is_answered:
            for answers in self.control.answers_to(ticket.number, call):
                self._take_in(answers)
                if ticket.is_answered:
                    break
        if ticket.error is not None:
            raise ticket.error
        if ticket.work is not None:
            self._finish(ticket)
        if ticket.buffer is not None and call.out is not None:
            result = ticket.buffer
            if call.reduction is not None:
                result = from_wire(result, call.out.dtype)
            if call.reduction == "mean":
                result.div_(call.group.size)
            call.out.copy_(result.view(call.out.dtype).view_as(call.out))
        self.clock.wait(call.rank, ticket.end_seconds)

    def _finish(self, ticket: Ticket) -> None:
        """Wait for it; others may wait for what this rank has announced and not yet started."""
        if ticket.end is None and not (self.control is not None and self._pending):
            ticket.work.wait()
            return
        end = self._end(ticket)
        while self.control is not None and self._pending and not end.done():
            wait_for([end], timeout=POLL_SECONDS)
            self._take_in(self.control.receive())
        end.result()

    def _end(self, ticket: Ticket) -> Future[Any]:
        """Its end, awaited by a thread: gloo's messages never say by themselves that they came."""
        if ticket.end is None:
            ticket.end = Future()
            threading.Thread(target=_await, args=(ticket.work, ticket.end), daemon=True).start()
        return ticket.end

    def is_completed(self, call: Call, ticket: Ticket) -> bool:
        if self.control is not None:
            self._take_in(self.control.receive())
            if not ticket.is_answered:
                return False
        if ticket.error is not None or ticket.work is None:
            return True
        return self._end(ticket).done() if call.is_message else bool(ticket.work.is_completed())


def _await(work: Any, end: Future[Any]) -> None:
    try:
        end.set_result(work.wait())
    except BaseException as error:
        end.set_exception(error)
