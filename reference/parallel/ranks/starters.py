"""How each call becomes one of torch.distributed's, on a buffer of its own."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reference.parallel.ranks.calls import Call
from reference.parallel.ranks.reductions import to_wire

# A mean is a sum, divided at the end, as in simulation.
REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}


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
