"""Which rows a rank takes: all ranks shuffle alike, and take turns.

Source: torch.utils.data.DistributedSampler.
"""

from __future__ import annotations

import torch

from reference.parallel.options import at_least


def rows_of_rank(
    num_rows: int,
    world_size: int,
    rank: int,
    *,
    epoch: int = 0,
    seed: int = 0,
    is_shuffled: bool = True,
    drop_last: bool = False,
) -> list[int]:
    """This rank's rows in an epoch: of the permutation numbers rank, rank + N, rank + 2N, ...

    All ranks get the same number: the last round is filled up with rows from the beginning, or left
    out with `drop_last`. Shuffling depends on seed + epoch and not on the rank, or ranks would draw
    rows twice.

    Raises: ValueError for a rank outside of the world, or no rows.
    """
    at_least(1, [("world_size", world_size), ("num_rows", num_rows)])
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
    order = list(range(num_rows))
    if is_shuffled:
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(num_rows, generator=generator).tolist()
    rounds = num_rows // world_size if drop_last else -(-num_rows // world_size)
    filled = (order * (rounds * world_size // num_rows + 1))[: rounds * world_size]
    return filled[rank::world_size]


def rows_of_step(
    num_rows: int, batch_rows: int, step: int, world_size: int, rank: int, *, seed: int = 0
) -> list[int]:
    """This rank's rows of global batch number `step`, whatever the number of ranks is.

    The batch is the same set of rows on 1 rank and on 64, so that a run may go on with another
    number of ranks and see the same data. Batches do not cross epochs; the rest is skipped.

    Raises: ValueError where batch_rows does not divide by world_size or exceeds num_rows; for a
    step below 0 or a rank outside of the world.
    """
    at_least(1, [("world_size", world_size)])
    at_least(0, [("step", step)])
    if batch_rows % world_size or not 0 < batch_rows <= num_rows:
        raise ValueError(
            f"batch_rows: expected a multiple of {world_size}, the number of ranks, up to "
            f"{num_rows}; got {batch_rows}"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
    epoch, number = divmod(step, num_rows // batch_rows)
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(num_rows, generator=generator)
    batch = order[number * batch_rows : (number + 1) * batch_rows]
    return batch.chunk(world_size)[rank].tolist()
