"""Who talks to whom when several kinds of parallelism compose.

Ranks fill a grid, the last axis running fastest. What talks most comes last, so that its groups
stand on one node: tensor parallel inside, then context, then data parallel, the pipeline outside.

    16 ranks, (pp 4, dp 2, tp 2):    rank = (pp * 2 + dp) * 2 + tp
    tensor    [0 1] [2 3] ...        neighbours
    data      [0 2] [1 3] [4 6] ...
    pipeline  [0 4 8 12] [1 5 9 13] ...

`comm.mesh(pp=4, dp=2, tp=2)` makes communicators of the same groups.

Sources: the example is the docstring of initialize_model_parallel in Megatron-LM's
megatron/core/parallel_state.py; the order, Narayanan et al., 2104.04473, sec. 3; four dimensions,
Llama 3, 2407.21783, sec. 3.3.2: [TP, CP, PP, DP] from the innermost.
"""

import itertools
import math
from collections.abc import Mapping

from reference.parallel.options import at_least


def groups_along(sizes: Mapping[str, int], *axes: str) -> list[list[int]]:
    """The groups of ranks that differ along `axes` alone, in a grid whose last axis is fastest.

    Several axes make one group: ("dp", "cp") has the ranks that share weights, and so gradients.

    Raises: ValueError for a size below 1; KeyError for an axis that is not in the grid.
    """
    at_least(1, sizes.items())
    unknown = set(axes) - set(sizes)
    if unknown or not axes:
        raise KeyError(f"{sorted(unknown)}: expected axes of the grid, {', '.join(sizes)}")
    fixed = [name for name in sizes if name not in axes]
    inner = [name for name in sizes if name in axes]
    return [
        [_rank(sizes, dict(zip(fixed + inner, (*at, *along), strict=True)))
         for along in itertools.product(*(range(sizes[name]) for name in inner))]
        for at in itertools.product(*(range(sizes[name]) for name in fixed))
    ]  # fmt: skip


def megatron_groups(
    world_size: int, *, tp: int = 1, pp: int = 1, cp: int = 1
) -> dict[str, list[list[int]]]:
    """Megatron-LM's groups: tp, cp, dp and pp, and dp_cp, over which gradients are averaged.

    Data parallelism has what is left, world_size / (tp pp cp).

    Raises: ValueError where the sizes do not divide the world.
    Source: initialize_model_parallel, megatron/core/parallel_state.py (order tp-cp-ep-dp-pp).
    """
    model = tp * pp * cp
    if min(tp, pp, cp) < 1 or world_size % model:
        raise ValueError(
            f"world_size: expected a multiple of tp * pp * cp = {model}, got {world_size}"
        )
    sizes = {"pp": pp, "dp": world_size // model, "cp": cp, "tp": tp}
    assert math.prod(sizes.values()) == world_size
    found = {axis: groups_along(sizes, axis) for axis in ("tp", "cp", "dp", "pp")}
    return found | {"dp_cp": groups_along(sizes, "dp", "cp")}


def _rank(sizes: Mapping[str, int], at: Mapping[str, int]) -> int:
    rank = 0
    for name, size in sizes.items():
        rank = rank * size + at[name]
    return rank
