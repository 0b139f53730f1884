"""What torchrun does: when one rank dies, stop all, and start again from the last checkpoint.

Data parallel replicas are equal, so one rank's checkpoint is everybody's, and any number of ranks
can load it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from reference.parallel.ranks import Comm, Run, run
from reference.transformer.resume import load_run, save_run


class Restarted(NamedTuple):
    """The run that ended well, and what ended those before it."""

    run: Run
    failures: list[Exception]


def run_with_restarts(
    world_sizes: Sequence[int], program: Any, *args: Any, **options: Any
) -> Restarted:
    """`run(world_sizes[0], program, *args, **options)`; after a failure the next size, and so on.

    A program that is to be restarted loads its checkpoint when it begins.

    Raises: the last failure, when no sizes are left; ValueError for no sizes.
    """
    if not world_sizes:
        raise ValueError("world_sizes: expected at least one, got none")
    failures: list[Exception] = []
    for world_size in world_sizes:
        try:
            return Restarted(run(world_size, program, *args, **options), failures)
        except Exception as failure:
            failures.append(failure)
    raise failures[-1]


def save_replica(
    comm: Comm, path: Path | str, module: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Rank 0 writes the state after `step` steps; nobody goes on before it is on disk.

    The file is complete or the one before: it is written beside and then takes its place.
    """
    if comm.rank == 0:
        save_run(path, module, optimizer, step=step)
    comm.barrier()


def load_replica(
    comm: Comm, path: Path | str, module: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Load on every rank what save_replica wrote; the number of steps done, 0 without a file.

    Random states stay each rank's own. Raises: ValueError for another model's checkpoint.
    """
    if not Path(path).exists():
        return 0
    random = torch.get_rng_state()
    step = load_run(path, module, optimizer, device=comm.device)
    torch.set_rng_state(random)
    return step
