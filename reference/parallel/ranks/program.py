"""One rank's life, the same in a thread, a process and alone: run the program, keep ledgers."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from reference.parallel.ranks.calls import Group
from reference.parallel.ranks.comm import Comm
from reference.parallel.ranks.membership import Rank
from reference.parallel.ranks.trace import RankTrace

Program = Callable[..., Any]


def run_program(
    program: Program, args: tuple[Any, ...], world: Group, me: Rank, *, is_measured: bool
) -> tuple[Any, RankTrace]:
    """The program's result on this rank, and the rank's ledgers.

    Raises: RuntimeError where the program has not waited for all that it started.
    """
    with ExitStack() as entered:
        # On a GPU backward would run hooks in the device's own thread, which all ranks share.
        entered.enter_context(torch.autograd.set_multithreading_enabled(False))
        if is_measured:
            entered.enter_context(me.meter)
        result = program(Comm(world, me), *args)
    check_finished(me)
    return result, rank_trace(me)


def check_finished(me: Rank) -> None:
    """Raises: RuntimeError for handles whose `wait` was never called."""
    if me.unfinished:
        lines = "\n  ".join(call.describe() for call in me.unfinished.values())
        raise RuntimeError(
            f"rank {me.rank} has finished without wait() on the handle of\n  {lines}\n"
            "the result never arrived; keep the handle and wait for it"
        )


def rank_trace(me: Rank) -> RankTrace:
    """Close the ledgers and hand them over."""
    me.memory.close()
    return RankTrace(
        rank=me.rank,
        seconds=me.clock.now(me.rank),
        events=me.clock.events(me.rank),
        traffic=me.traffic.rows(),
        sent_to=dict(me.traffic.sent_to),
        memory=me.memory.use,
        samples=me.memory.samples(),
    )
