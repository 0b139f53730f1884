"""Calls carried out by torch.distributed, one process a rank."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reference.parallel.ranks.calls import Call, Group
from reference.parallel.ranks.clock import Clock

# A mean is a sum, divided at the end, as in simulation.
REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}


class Processes:
    """Starts torch.distributed's operations on buffers and copies the results out at `wait`."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._groups: dict[Group, Any] = {}

    def join(self, group: Group) -> None:
        """Make the process group; all its ranks do, and no others need to."""
        if group not in self._groups:
            self._groups[group] = dist.new_group(
                list(group.ranks), use_local_synchronization=True, sort_ranks=False
            )

    def start(self, call: Call) -> tuple[Any, Tensor | None, float]:
        group = self._groups.get(call.group, dist.group.WORLD)
        if call.operation == "agree":
            values = [None] * call.group.size
            dist.all_gather_object(values, call.value, group=group)
            call.value = values
            return None, None, call.ready_seconds
        work, buffer = STARTERS[call.operation](call, group)
        return work, buffer, self.clock.communicate([call])

    def wait(self, call: Call, ticket: tuple[Any, Tensor | None, float]) -> None:
        work, buffer, end_seconds = ticket
        if work is not None:
            work.wait()
        if buffer is not None and call.out is not None:
            if call.reduction == "mean":
                buffer.div_(call.group.size)
            call.out.copy_(buffer.view_as(call.out))
        self.clock.wait(call.rank, end_seconds)

    def is_completed(self, call: Call, ticket: tuple[Any, Tensor | None, float]) -> bool:
        return ticket[0] is None or ticket[0].is_completed()


def _input(call: Call) -> Tensor:
    assert call.tensor is not None
    tensor = call.tensor.contiguous()
    return tensor.reshape(1) if tensor.ndim == 0 else tensor


def _copy(call: Call) -> Tensor:
    assert call.tensor is not None
    return call.tensor.clone(memory_format=torch.contiguous_format)


def _empty(call: Call) -> Tensor:
    assert call.out is not None
    return torch.empty(call.out.shape, dtype=call.out.dtype, device=call.out.device)


def _all_reduce(call: Call, group: Any) -> tuple[Any, Tensor]:
    buffer = _copy(call)
    work = dist.all_reduce(buffer, REDUCE_OPS[call.reduction or "sum"], group, async_op=True)
    return work, buffer


def _reduce(call: Call, group: Any) -> tuple[Any, Tensor]:
    buffer, op = _copy(call), REDUCE_OPS[call.reduction or "sum"]
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
    buffer, op = _empty(call), REDUCE_OPS[call.reduction or "sum"]
    return dist.reduce_scatter_single(buffer, _input(call), op, group, async_op=True), buffer


def _scatter(call: Call, group: Any) -> tuple[Any, Tensor]:
    buffer = _empty(call)
    parts = None
    if call.tensor is not None:
        whole = _input(call)
        parts = [part.view_as(buffer) for part in whole.tensor_split(call.group.size)]
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
