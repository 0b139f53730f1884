"""What each collective means, on the calls of all its ranks.

`combine` runs once, when the last rank has arrived; `deliver` runs for each rank when it waits for
its result. A rank that forgets to wait therefore keeps its old values, as on real hardware, but
each time.

    all_reduce      out = x_0 + x_1 + ... on all         reduce          the same, on the root
    all_gather      out = [x_0; x_1; ...] on all         gather          the same, on the root
    reduce_scatter  out = part r of x_0 + x_1 + ...      scatter         out = part r of root's x
    all_to_all      out = [part r of x_0; of x_1; ...]   broadcast       out = the root's x

Parts are taken along dimension 0. Sums run in rank order, ((x_0 + x_1) + x_2) + ..., in the
tensors' own dtype: each run gives the same bits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reference.parallel.ranks.calls import Call
from reference.parallel.ranks.reductions import reduce_in_rank_order


class CollectiveMismatch(RuntimeError):
    """Ranks met in one collective of a group with calls that do not fit each other."""


def combine(calls: Sequence[Call]) -> Any:
    """What the ranks together produce; `calls` stand in the order of the group."""
    operation, root = calls[0].operation, calls[0].root
    if operation == "agree":
        return [call.value for call in calls]
    if operation == "barrier":
        return None
    if operation in ("broadcast", "scatter"):
        assert root is not None
        return _given(calls[root]).clone()
    tensors = [_given(call) for call in calls]
    if operation in ("all_gather", "gather"):
        return torch.cat([t.reshape(1) if t.ndim == 0 else t for t in tensors])
    if operation == "all_to_all":
        return [t.clone().split(c.input_splits or ()) for t, c in zip(tensors, calls, strict=True)]
    return reduce_in_rank_order(tensors, calls[0].reduction or "sum")


def deliver(result: Any, call: Call) -> None:
    """Write this rank's share of the combined result into `call.out`."""
    if call.out is None:
        return
    here = call.group_rank
    if call.operation in ("reduce_scatter", "scatter"):
        result = result.chunk(call.group.size)[here] if len(result) else result
    elif call.operation == "all_to_all":
        result = torch.cat([parts[here] for parts in result])
    call.out.copy_(result.view_as(call.out))


def check_agreement(calls: Sequence[Call]) -> None:
    """Refuse calls that do not fit each other.

    Raises: CollectiveMismatch, with each rank's call and source line.
    """
    what = disagreement(calls)
    if what is None:
        return
    first = calls[0]
    lines = [f"  rank {c.rank}: {c.describe()}" for c in sorted(calls, key=lambda c: c.rank)]
    if first.is_message:
        where = f"a message in {first.group}"
    else:
        where = f"collective {first.sequence} of {first.group}"
    raise CollectiveMismatch(f"{where}: the ranks disagree about the {what}\n" + "\n".join(lines))


def disagreement(calls: Sequence[Call]) -> str | None:
    """The first thing about which the calls differ, in words, or None."""
    views: dict[str, Callable[[Call], Any]]
    if calls[0].is_message:
        views = {"dtype": _dtype, "device": _device, "shape": _shape}
    else:
        views = {
            "operation": lambda c: c.operation,
            "root": lambda c: c.root,
            "reduction": lambda c: c.reduction,
            "dtype": _dtype,
            "device": _device,
            "shape": _shape,
            "contents": lambda c: c.what,
        }
    for what, view in views.items():
        if len({view(call) for call in calls}) > 1:
            return what
    if calls[0].operation == "all_to_all" and len(calls) == calls[0].group.size:
        for i, sender in enumerate(calls):
            for j, receiver in enumerate(calls):
                assert sender.input_splits is not None and receiver.output_splits is not None
                if sender.input_splits[j] != receiver.output_splits[i]:
                    return f"rows that rank {sender.rank} sends to rank {receiver.rank}"
    return None


def _given(call: Call) -> Tensor:
    assert call.tensor is not None
    return call.tensor


def _dtype(call: Call) -> torch.dtype | None:
    return None if call.compared is None else call.compared.dtype


def _device(call: Call) -> str | None:
    return None if call.compared is None else call.compared.device.type


def _shape(call: Call) -> tuple[int, ...] | None:
    if call.compared is None:
        return None
    shape = tuple(call.compared.shape)
    return shape[1:] if call.operation == "all_to_all" else shape
