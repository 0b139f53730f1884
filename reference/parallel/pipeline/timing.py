"""What a schedule costs: event by event, and in closed form.

Each action starts when its rank is free and what it needs is there: F of stage s needs F of s - 1,
B of stage s needs B of s + 1 and its own F, W its own B. Against the m (F + B + W) that each rank
computes, the ideal, a step has a bubble of

    GPipe, 1F1B    (p - 1) (F + B + W)           bubble / ideal = (p - 1) / m
    interleaved    (p - 1) (F + B + W) / v                        (p - 1) / (v m)
    ZB-H1          (p - 1) (F + B - W)

where F, B, W are the times of one micro-batch on all stages of a rank.

Papers: Narayanan et al., 2104.04473, sec. 2.2; zero bubble, 2401.10241, table 2.
"""

from collections.abc import Mapping
from typing import NamedTuple

from reference.parallel.options import at_least, one_of
from reference.parallel.pipeline.schedules import Action, Schedule, check_schedule

NAMES = ("GPipe", "1F1B", "interleaved", "ZB-H1")
UNITS: Mapping[str, float] = {"F": 1.0, "B": 2.0, "W": 0.0}
SPLIT_UNITS: Mapping[str, float] = {"F": 1.0, "B": 1.0, "W": 1.0}


class Timed(NamedTuple):
    """An action with its place and time."""

    rank: int
    action: Action
    start_seconds: float
    end_seconds: float


def simulate(
    schedule: Schedule, seconds: Mapping[str, float] | None = None, message_seconds: float = 0.0
) -> list[Timed]:
    """When each action happens, if F, B and W of one stage take `seconds`.

    By default F = 1 and B = 2, or F = B = W = 1 where the schedule has W; with v stages a rank each
    has the 1/v-th. A message between ranks takes `message_seconds`.

    Raises: ValueError for a schedule in which actions wait for each other, that has not each
    action once, or whose actions have no time; for times below 0.
    """
    check_schedule(schedule)
    if seconds is None:
        whole = SPLIT_UNITS if schedule.is_split else UNITS
        seconds = {kind: time / schedule.num_chunks for kind, time in whole.items()}
    kinds = {action.kind for row in schedule.actions for action in row}
    if not kinds <= set(seconds) <= {"F", "B", "W"}:
        raise ValueError(f"seconds: expected of {', '.join(sorted(kinds))}, got {dict(seconds)}")
    _check_times(**seconds, message_seconds=message_seconds)
    ends: dict[Action, float] = {}
    done: list[Timed] = []
    nexts, free = [0] * schedule.num_ranks, [0.0] * schedule.num_ranks
    while len(done) < sum(map(len, schedule.actions)):
        before = len(done)
        for rank, row in enumerate(schedule.actions):
            while nexts[rank] < len(row):
                action = row[nexts[rank]]
                ready = _ready_seconds(action, schedule, ends, message_seconds)
                if ready is None:
                    break
                start = max(free[rank], ready)
                free[rank] = ends[action] = start + seconds[action.kind]
                done.append(Timed(rank, action, start, free[rank]))
                nexts[rank] += 1
        if len(done) == before:
            stuck = [str(row[n]) for row, n in zip(schedule.actions, nexts, strict=True)
                     if n < len(row)]  # fmt: skip
            raise ValueError(f"schedule: {', '.join(stuck)} wait for each other; order them anew")
    return sorted(done, key=lambda timed: (timed.start_seconds, timed.rank))


def _check_times(**seconds: float) -> None:
    for name, time in seconds.items():
        if not time >= 0:
            raise ValueError(f"{name}: expected seconds from 0 on, got {time}")


def _ready_seconds(
    action: Action, schedule: Schedule, ends: Mapping[Action, float], message_seconds: float
) -> float | None:
    kind, stage, micro = action
    needs: list[tuple[Action, float]] = []
    message = message_seconds if schedule.num_ranks > 1 else 0.0
    if kind == "F" and stage > 0:
        needs.append((Action("F", stage - 1, micro), message))
    if kind == "B":
        needs.append((Action("F", stage, micro), 0.0))
        if stage + 1 < schedule.num_stages:
            needs.append((Action("B", stage + 1, micro), message))
    if kind == "W":
        needs.append((Action("B", stage, micro), 0.0))
    if any(need not in ends for need, _ in needs):
        return None
    return max((ends[need] + delay for need, delay in needs), default=0.0)


def in_flight(schedule: Schedule, rank: int) -> list[int]:
    """How many stages' activations the rank keeps after each of its actions.

    Raises: ValueError for a rank that the schedule has not.
    """
    if not 0 <= rank < schedule.num_ranks:
        raise ValueError(f"rank: expected 0 to {schedule.num_ranks - 1}, got {rank}")
    frees = "W" if schedule.is_split else "B"
    alive, counts = 0, []
    for action in schedule.actions[rank]:
        alive += (action.kind == "F") - (action.kind == frees)
        counts.append(alive)
    return counts


def peak_in_flight(schedule: Schedule, rank: int) -> int:
    """The most activations that the rank keeps at once, counted in micro-batches on one stage.

    GPipe: m. 1F1B: p - rank. ZB-H1: p. Interleaved: up to v p + p - 1, each of 1/v the size.
    """
    return max(in_flight(schedule, rank))


def bubble_seconds(
    name: str, num_ranks: int, *, forward: float, backward: float, weight: float = 0.0,
    num_chunks: int = 1,
) -> float:  # fmt: skip
    """Idle time of each rank in a step, in closed form, where there are at least p micro-batches.

    `forward`, `backward` and `weight` are the times of one micro-batch on all stages of a rank;
    `backward` is the whole of it where weight is 0. ZB-H1's needs weight <= forward, backward.

    Raises: ValueError for a schedule that is not one of GPipe, 1F1B, interleaved, ZB-H1, chunks
    of another than interleaved, a weight above the others for ZB-H1, counts below 1, times below 0.
    Source: arXiv 2104.04473, sec. 2.2; ZB-H1: arXiv 2401.10241, table 2.
    """
    one_of("name", name, NAMES)
    at_least(1, [("num_ranks", num_ranks), ("num_chunks", num_chunks)])
    _check_times(forward=forward, backward=backward, weight=weight)
    if num_chunks > 1 and name != "interleaved":
        raise ValueError(f"num_chunks: expected 1 for {name}, got {num_chunks}; see interleaved")
    if name == "ZB-H1" and weight > min(forward, backward):
        raise ValueError(
            f"weight: expected at most {min(forward, backward)}, as forward and backward, got "
            f"{weight}; simulate such a schedule"
        )
    together = forward + backward + weight
    if name in ("GPipe", "1F1B"):
        return (num_ranks - 1) * together
    if name == "interleaved":
        return (num_ranks - 1) * together / num_chunks
    return (num_ranks - 1) * (together - 2 * weight)


def bubble_fraction(num_ranks: int, num_micro: int, num_chunks: int = 1) -> float:
    """Bubble over ideal time, (p - 1) / (v m): GPipe, 1F1B, and interleaved where v > 1.

    Raises: ValueError for counts below 1.
    Source: Narayanan et al., arXiv 2104.04473, sec. 2.2.
    """
    at_least(1, [("num_ranks", num_ranks), ("num_micro", num_micro), ("num_chunks", num_chunks)])
    return (num_ranks - 1) / (num_chunks * num_micro)
