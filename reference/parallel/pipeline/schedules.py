"""Schedules as data: for each rank, the list of what it does, in order.

    F  forward of one micro-batch through one stage
    B  its backward; where the schedule has W as well, for the stage's input alone
    W  the weights' half of the backward, which nobody waits for

Stage s stands on rank s mod p, so that with v stages a rank each micro-batch goes round v times.
A schedule says nothing of time: order and dependencies decide when things happen (timing.py).

Papers: GPipe, 1811.06965; 1F1B without flush, PipeDream, 1806.03377; with flush and interleaved,
Narayanan et al., 2104.04473, sec. 2.2; zero bubble, 2401.10241, sec. 2.
"""

from collections import Counter
from typing import Literal, NamedTuple

from reference.parallel.options import at_least

Kind = Literal["F", "B", "W"]


class Action(NamedTuple):
    """One micro-batch's F, B or W on one stage."""

    kind: Kind
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro}" + (f".{self.stage}" if self.stage else "")


class Schedule(NamedTuple):
    """Each rank's actions. `num_chunks` stages stand on each rank."""

    name: str
    num_micro: int
    num_chunks: int
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.actions)

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.num_chunks

    @property
    def is_split(self) -> bool:
        """Whether weights' gradients have actions of their own."""
        return any(action.kind == "W" for row in self.actions for action in row)


def gpipe(num_ranks: int, num_micro: int) -> Schedule:
    """All forwards, then all backwards: m micro-batches are alive at once.

    Raises: ValueError for fewer than one rank or micro-batch.
    Source: GPipe, arXiv 1811.06965.
    """
    _check(num_ranks, num_micro)
    actions = [
        [Action(kind, rank, micro) for kind in ("F", "B") for micro in range(num_micro)]
        for rank in range(num_ranks)
    ]
    return _schedule("GPipe", num_micro, 1, actions)


def one_f_one_b(num_ranks: int, num_micro: int) -> Schedule:
    """Fill the pipeline, then one backward for each forward: at most p are alive.

    Raises: ValueError for fewer than one rank or micro-batch.
    Source: Narayanan et al., arXiv 2104.04473, sec. 2.2 (PipeDream-Flush).
    """
    _check(num_ranks, num_micro)
    actions = []
    for rank in range(num_ranks):
        forwards = [Action("F", rank, micro) for micro in range(num_micro)]
        backwards = [Action("B", rank, micro) for micro in range(num_micro)]
        actions.append(_warm_up_then_pairs(forwards, backwards, num_ranks - 1 - rank))
    return _schedule("1F1B", num_micro, 1, actions)


def interleaved(num_ranks: int, num_micro: int, num_chunks: int) -> Schedule:
    """1F1B with v smaller stages on each rank, taken in turns of p micro-batches.

    Raises: ValueError for micro-batches that are no multiple of p, or counts below 1.
    Source: Narayanan et al., arXiv 2104.04473, sec. 2.2; the order is Megatron-LM's.
    """
    _check(num_ranks, num_micro)
    at_least(1, [("num_chunks", num_chunks)])
    if num_micro % num_ranks:
        raise ValueError(
            f"num_micro: expected a multiple of {num_ranks}, the number of ranks, got {num_micro}"
        )
    round_size = num_ranks * num_chunks
    actions = []
    for rank in range(num_ranks):
        forwards, backwards = [], []
        for k in range(num_micro * num_chunks):
            chunk = k % round_size // num_ranks
            micro = k // round_size * num_ranks + k % num_ranks
            last = num_chunks - 1 - chunk
            forwards.append(Action("F", chunk * num_ranks + rank, micro))
            backwards.append(Action("B", last * num_ranks + rank, micro))
        warm_up = num_ranks - 1 - rank
        if num_chunks > 1:
            warm_up = 2 * warm_up + (num_chunks - 1) * num_ranks
        actions.append(_warm_up_then_pairs(forwards, backwards, warm_up))
    return _schedule("interleaved", num_micro, num_chunks, actions)


def zero_bubble_h1(num_ranks: int, num_micro: int) -> Schedule:
    """1F1B in which rank r puts weights off by r micro-batches: its peak of p, a third of its
    bubble.

    W has the same cost as F and B in the ideal; it fills the gaps in which 1F1B waits.

    Raises: ValueError for fewer than one rank or micro-batch.
    Source: Qi et al., Zero Bubble Pipeline Parallelism, arXiv 2401.10241, ZB-H1.
    """
    _check(num_ranks, num_micro)
    actions = []
    for rank in range(num_ranks):
        row: list[Action] = []
        num_weights = 0
        for action in one_f_one_b(num_ranks, num_micro).actions[rank]:
            row.append(action)
            if action.kind == "B" and action.micro >= num_weights + rank:
                row.append(Action("W", rank, num_weights))
                num_weights += 1
        row += [Action("W", rank, micro) for micro in range(num_weights, num_micro)]
        actions.append(row)
    return _schedule("ZB-H1", num_micro, 1, actions)


def check_schedule(schedule: Schedule) -> None:
    """Refuse one that leaves an action out, has one twice, or has it on another rank.

    Raises: ValueError with the actions.
    """
    kinds: tuple[Kind, ...] = ("F", "B", "W") if schedule.is_split else ("F", "B")
    for rank, row in enumerate(schedule.actions):
        stages = range(rank, schedule.num_stages, schedule.num_ranks)
        expected = Counter(
            Action(kind, stage, micro)
            for kind in kinds for stage in stages for micro in range(schedule.num_micro)
        )  # fmt: skip
        found = Counter(row)
        if found != expected:
            missing, extra = expected - found, found - expected
            raise ValueError(
                f"schedule: expected each of {', '.join(kinds)} once for each of rank {rank}'s "
                f"stages and micro-batches; missing {_some(missing)}, too many {_some(extra)}"
            )


def _some(actions: Counter[Action]) -> str:
    words = [str(action) for action in list(actions)[:4]]
    return ", ".join(words) + (", ..." if len(actions) > 4 else "") or "none"


def _warm_up_then_pairs(
    forwards: list[Action], backwards: list[Action], warm_up: int
) -> list[Action]:
    warm_up = min(warm_up, len(forwards))
    row = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        row += [forward, backward]
    return row + backwards[len(forwards) - warm_up :]


def _check(num_ranks: int, num_micro: int) -> None:
    at_least(1, [("num_ranks", num_ranks), ("num_micro", num_micro)])


def _schedule(name: str, num_micro: int, num_chunks: int, actions: list[list[Action]]) -> Schedule:
    return Schedule(name, num_micro, num_chunks, tuple(tuple(row) for row in actions))
