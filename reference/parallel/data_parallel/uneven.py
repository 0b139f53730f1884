"""Ranks with different numbers of batches.

A rank that has run out and goes home leaves the others waiting in their next all-reduce for ever.
Instead it stays and answers with zeros, until nobody has data.

Source: `join` of torch's DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from reference.parallel.data_parallel.ddp import DDP

Batch = TypeVar("Batch")


def uneven(
    ddp: DDP, batches: Iterable[Batch], *, divide_by_initial_world_size: bool = True
) -> Iterator[Batch]:
    """This rank's batches: `for batch in uneven(ddp, batches)`, one forward and backward for each.

    After its last one the rank takes part with zeros, so that nobody waits for ever. Gradients are
    divided by the number of all ranks, or of those that still have data. In the end all ranks have
    the parameters and buffers of one that went on longest. Costs one small all-gather a batch.
    """
    last = 0
    try:
        for batch in batches:
            last = _meet(ddp, True, divide_by_initial_world_size)
            yield batch
        while (source := _meet(ddp, False, divide_by_initial_world_size)) >= 0:
            last = source
            ddp.take_part_without_data()
    finally:
        ddp.divisor, ddp.buffers_from = ddp.comm.size, 0
    ddp.send_state(source=last)


def _meet(ddp: DDP, has_batch: bool, divide_by_initial: bool) -> int:
    """Who still has data: sets the divisor; the highest such rank, or -1."""
    flag = torch.tensor([int(has_batch)], device=ddp.comm.device)
    active = ddp.comm.all_gather(flag).nonzero().flatten().tolist()
    if not active:
        return -1
    ddp.divisor = ddp.comm.size if divide_by_initial else len(active)
    ddp.buffers_from = active[-1]
    return active[-1]
