"""Ranks with different numbers of batches.

A rank that has run out and goes home leaves the others waiting in their next all-reduce for ever.
Instead it stays and answers with zeros, until nobody has data.

Source: `join` of torch's DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar

import torch

from reference.parallel.data_parallel.ddp import DDP

Batch = TypeVar("Batch")
DivideBy = Literal["all", "active", "tokens"]
GONE = -1  # in place of a number of tokens: no batch is left


def uneven(
    ddp: DDP,
    batches: Iterable[Batch],
    *,
    divide_by_initial_world_size: bool = True,
    num_counted: Callable[[Batch], int] | None = None,
) -> Iterator[Batch]:
    """This rank's batches: `for batch in uneven(ddp, batches)`, one forward and backward for each.

    After its last one the rank takes part with zeros, so that nobody waits for ever. Gradients are
    divided by the number of all ranks, or of those that still have data. In the end all ranks have
    the parameters and buffers of one that went on longest. Costs one small all-gather a batch.

    With `num_counted`, which says how many tokens of a batch count, gradients are divided by the
    number that count in all ranks' batches together: for a loss that is the *sum* over the batch's.

    Raises: ValueError for `num_counted` together with another divisor.
    """
    if num_counted is not None and not divide_by_initial_world_size:
        raise ValueError(
            "divide_by_initial_world_size: expected True, the default, got False; num_counted "
            "divides by tokens"
        )
    by: DivideBy = "tokens" if num_counted else "all" if divide_by_initial_world_size else "active"
    last = 0
    try:
        for batch in batches:
            last = _meet(ddp, num_counted(batch) if num_counted else 0, by)
            yield batch
        while (source := _meet(ddp, GONE, by)) >= 0:
            last = source
            ddp.take_part_without_data()
    finally:
        ddp.divisor, ddp.buffers_from = ddp.comm.size, 0
    ddp.send_state(source=last)


def _meet(ddp: DDP, num_counted: int, by: DivideBy) -> int:
    """Who still has data, and how many tokens: sets the divisor; the highest such rank, or -1."""
    mine = torch.tensor([num_counted], device=ddp.comm.device)
    counts = ddp.comm.all_gather(mine).tolist()
    active = [rank for rank, count in enumerate(counts) if count != GONE]
    if not active:
        return -1
    num_tokens = sum(counts[rank] for rank in active)
    ddp.divisor = {"all": ddp.comm.size, "active": len(active), "tokens": max(1, num_tokens)}[by]
    ddp.buffers_from = active[-1]
    return active[-1]
