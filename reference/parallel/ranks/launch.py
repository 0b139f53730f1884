"""Running a program on ranks: on simulated ones, on real processes, or on one out of thousands."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from reference.parallel.ranks.calls import Group
from reference.parallel.ranks.clock import Clock
from reference.parallel.ranks.hardware import DGX_H100, Hardware
from reference.parallel.ranks.membership import Rank
from reference.parallel.ranks.meter import optimizer_states_labelled
from reference.parallel.ranks.processes import Job, run_processes
from reference.parallel.ranks.program import Program, run_program
from reference.parallel.ranks.random_streams import CallersState, RandomStream
from reference.parallel.ranks.scheduler import Baton
from reference.parallel.ranks.trace import RankTrace, Trace
from reference.parallel.ranks.transport import OneRank, SimulatedRanks

MAX_SIMULATED_RANKS = 512
DEFAULT_TIMEOUT_SECONDS = 60.0


@dataclass
class Run:
    """What each rank's program returned, in rank order, and the ledgers of all."""

    results: list[Any]
    trace: Trace


def run(
    world_size: int,
    program: Program,
    *args: Any,
    backend: Literal["simulated", "processes"] = "simulated",
    hardware: Hardware = DGX_H100,
    seed: int = 0,
    is_measured: bool = True,
    shapes_only: bool = False,
    timeout_seconds: float | None = None,
) -> Run:
    """Run `program(comm, *args)` on every rank, and return when all have.

    Each rank is a thread, or with backend="processes" a forked process with gloo; torch runs on one
    thread in each, and its global random state (random's and numpy's too) starts from seed + rank.
    The caller's random state is left alone. `args` are shared by simulated ranks: copy a model
    before training it. Without `is_measured` memory and FLOPs are not counted, which saves some
    microseconds an operation. With `shapes_only` tensors have shapes and no values, on all ranks.
    `timeout_seconds` is how long a process waits for others that are at work (60 by default).

    Raises: what the program raises on the first rank that fails, with a note that names it;
    Deadlock, CollectiveMismatch; ValueError for a world that cannot be.
    """
    if not 1 <= world_size <= MAX_SIMULATED_RANKS:
        raise ValueError(
            f"world_size: expected 1 to {MAX_SIMULATED_RANKS}, got {world_size}; "
            "run_one_rank runs one rank out of more"
        )
    if backend == "processes":
        if shapes_only:
            raise ValueError("shapes_only: expected simulated ranks; processes move values")
        seconds = DEFAULT_TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds
        ended = run_processes(world_size, Job(program, args, hardware, seed, is_measured, seconds))
    elif backend == "simulated":
        if timeout_seconds is not None:
            raise ValueError(
                "timeout_seconds: expected processes; simulated ranks know a deadlock at once"
            )
        ended = _run_threads(world_size, program, args, hardware, seed, is_measured, shapes_only)
    else:
        raise ValueError(f"backend: expected 'simulated' or 'processes', got {backend!r}")
    return Run([result for result, _ in ended], Trace(world_size, [trace for _, trace in ended]))


def run_one_rank(
    world_size: int,
    program: Program,
    *args: Any,
    rank: int = 0,
    hardware: Hardware = DGX_H100,
    seed: int = 0,
) -> Run:
    """Run `program(comm, *args)` on one rank of many, with shapes and without values.

    Collectives return at once with the right shapes, as if all ranks had arrived when this one did;
    memory, FLOPs, traffic and clock are counted as ever. Tensors made inside are fake (torch's
    FakeTensorMode): a program must not ask for their values.

    Raises: ValueError for a rank outside of the world.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
    world = Group("world", tuple(range(world_size)))
    me = Rank(rank, world_size, hardware, OneRank(Clock(hardware, [rank])))
    stream = RandomStream(seed + rank)
    with CallersState(), optimizer_states_labelled(), _shapes_only(True):
        stream.enter()
        result, trace = run_program(program, args, world, me, is_measured=True)
    return Run([result], Trace(world_size, [trace]))


def _run_threads(
    world_size: int,
    program: Program,
    args: tuple[Any, ...],
    hardware: Hardware,
    seed: int,
    is_measured: bool,
    shapes_only: bool,
) -> list[tuple[Any, RankTrace]]:
    world = Group("world", tuple(range(world_size)))
    transport = SimulatedRanks(Clock(hardware, world.ranks), has_values=not shapes_only)
    streams = [RandomStream(seed + rank) for rank in world.ranks]
    transport.baton = Baton(streams, transport.meetings.conflicts)
    ended: dict[int, tuple[Any, RankTrace]] = {}
    grad_enabled = torch.is_grad_enabled()

    def live(rank: int) -> None:
        me = Rank(rank, world_size, hardware, transport)
        with torch.set_grad_enabled(grad_enabled), _shapes_only(shapes_only):
            ended[rank] = run_program(program, args, world, me, is_measured=is_measured)

    with CallersState(), optimizer_states_labelled():
        torch.set_num_threads(1)
        transport.baton.run(live)
    return [ended[rank] for rank in world.ranks]


def _shapes_only(is_wanted: bool) -> ExitStack:
    entered = ExitStack()
    if is_wanted:
        entered.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    return entered
