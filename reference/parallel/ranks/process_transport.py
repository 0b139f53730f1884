"""Calls carried out by torch.distributed, one process a rank."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reference.parallel.ranks.calls import Call, Group
from reference.parallel.ranks.clock import Clock
from reference.parallel.ranks.control import Control
from reference.parallel.ranks.reductions import from_wire, to_wire

# A mean is a sum, divided at the end, as in simulation.
REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}
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
            self._finish(ticket.work)
        if ticket.buffer is not None and call.out is not None:
            result = ticket.buffer
            if call.reduction is not None:
                result = from_wire(result, call.out.dtype)
            if call.reduction == "mean":
                result.div_(call.group.size)
            call.out.copy_(result.view(call.out.dtype).view_as(call.out))
        self.clock.wait(call.rank, ticket.end_seconds)

    def _finish(self, work: Any) -> None:
        """Wait for it; others may wait for what this rank has announced and not yet started."""
        while self.control is not None and self._pending and not work.is_completed():
            self._take_in(self.control.receive(POLL_SECONDS))
        work.wait()

    def is_completed(self, call: Call, ticket: Ticket) -> bool:
        if self.control is not None:
            self._take_in(self.control.receive())
            if not ticket.is_answered:
                return False
        return ticket.error is not None or ticket.work is None or ticket.work.is_completed()


def _plain(tensor: Tensor) -> Tensor:
    """Its bytes, row by row: gloo moves few dtypes, and none differ in being moved."""
    rows = tensor.shape[0] if tensor.ndim else 1
    row = tensor.numel() // rows if rows else 0
    return tensor.reshape(rows, row).view(torch.uint8)


def _reduced(call: Call) -> tuple[Tensor, Any]:
    assert call.tensor is not None and call.reduction is not None
    op = REDUCE_OPS[call.reduction]
    if call.tensor.dtype == torch.bool:
        op = dist.ReduceOp.MAX if call.reduction in ("sum", "max") else dist.ReduceOp.MIN
    return to_wire(call.tensor, call.reduction), op


def _input(call: Call) -> Tensor:
    assert call.tensor is not None
    return _plain(call.tensor.contiguous())


def _copy(call: Call) -> Tensor:
    assert call.tensor is not None
    return _plain(call.tensor.clone(memory_format=torch.contiguous_format))


def _empty(call: Call) -> Tensor:
    assert call.out is not None
    return _plain(torch.empty(call.out.shape, dtype=call.out.dtype, device=call.out.device))


def _all_reduce(call: Call, group: Any) -> tuple[Any, Tensor]:
    buffer, op = _reduced(call)
    return dist.all_reduce(buffer, op, group, async_op=True), buffer


def _reduce(call: Call, group: Any) -> tuple[Any, Tensor]:
    buffer, op = _reduced(call)
    return dist.reduce(buffer, op=op, group=group, async_op=True, group_dst=call.root), buffer


def _broadcast(call: Call, group: Any) -> tuple[Any, Tensor]:
    buffer = _copy(call)
    return dist.broadcast(buffer, group=group, async_op=True, group_src=call.root), buffer


def _all_gather(call: Call, group: Any) -> tuple[Any, Tensor]:
    buffer = _empty(call)
    return dist.all_gather_single(buffer, _input(call), group, async_op=True), buffer


def _gather(call: Call, group: Any) -> tuple[Any, Tensor | None]:
    buffer = None if call.out is None else _empty(call)
    parts = None if buffer is None else list(buffer.tensor_split(call.group.size))
    work = dist.gather(_input(call), parts, group=group, async_op=True, group_dst=call.root)
    return work, buffer


def _reduce_scatter(call: Call, group: Any) -> tuple[Any, Tensor]:
    assert call.out is not None
    whole, op = _reduced(call)
    buffer = torch.empty(call.out.shape, dtype=whole.dtype, device=whole.device)
    return dist.reduce_scatter_single(buffer, whole, op, group, async_op=True), buffer


def _scatter(call: Call, group: Any) -> tuple[Any, Tensor]:
    buffer = _empty(call)
    parts = None
    if call.tensor is not None:
        parts = [part.view_as(buffer) for part in _input(call).tensor_split(call.group.size)]
    return dist.scatter(buffer, parts, group=group, async_op=True, group_src=call.root), buffer


def _all_to_all(call: Call, group: Any) -> tuple[Any, Tensor]:
    assert call.input_splits is not None and call.output_splits is not None
    buffer = _empty(call)
    splits = list(call.output_splits), list(call.input_splits)
    return dist.all_to_all_single(buffer, _input(call), *splits, group, async_op=True), buffer


def _barrier(call: Call, group: Any) -> tuple[Any, None]:
    return dist.barrier(group=group, async_op=True), None


def _send(call: Call, group: Any) -> tuple[Any, None]:
    return dist.isend(_copy(call), group=group, tag=call.tag, group_dst=call.root), None


def _recv(call: Call, group: Any) -> tuple[Any, Tensor]:
    buffer = _empty(call)
    return dist.irecv(buffer, group=group, tag=call.tag, group_src=call.root), buffer


Starter = Callable[[Call, Any], tuple[Any, Tensor | None]]
STARTERS: dict[str, Starter] = {
    "all_reduce": _all_reduce,
    "reduce": _reduce,
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "gather": _gather,
    "reduce_scatter": _reduce_scatter,
    "scatter": _scatter,
    "all_to_all": _all_to_all,
    "barrier": _barrier,
    "send": _send,
    "recv": _recv,
}
