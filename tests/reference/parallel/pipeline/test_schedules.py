"""Oracles: torch's own schedules; formulas of the papers; dependencies, on random sizes."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.parallel.pipeline import (
    Action,
    bubble_fraction,
    bubble_seconds,
    gpipe,
    in_flight,
    interleaved,
    one_f_one_b,
    peak_in_flight,
    simulate,
    zero_bubble_h1,
)
from reference.parallel.pipeline.schedules import Schedule
from tests.reference.parallel.pipeline.workload import SCHEDULES


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 6), st.integers(1, 4))
def test_invariant_each_action_once_and_in_a_possible_order(name, num_ranks, rounds):
    schedule = SCHEDULES[name](num_ranks, num_ranks * rounds)
    kinds = ("F", "B", "W") if schedule.is_split else ("F", "B")
    expected = {
        Action(kind, stage, micro)
        for kind, stage, micro in itertools.product(
            kinds, range(schedule.num_stages), range(schedule.num_micro)
        )
    }
    found = [action for row in schedule.actions for action in row]
    assert len(found) == len(expected) and set(found) == expected
    assert all(a.stage % num_ranks == r for r, row in enumerate(schedule.actions) for a in row)
    assert len(simulate(schedule)) == len(expected)
    assert all(in_flight(schedule, rank)[-1] == 0 for rank in range(num_ranks))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(SCHEDULES)), st.integers(2, 8), st.integers(1, 4))
def test_matches_the_papers_bubbles(name, num_ranks, rounds):
    schedule = SCHEDULES[name](num_ranks, num_ranks * rounds)
    times = {"forward": 1.0, "backward": 2.0}
    if schedule.is_split:
        times = {"forward": 1.0, "backward": 1.0, "weight": 1.0}
    bubble = bubble_seconds(name, num_ranks, num_chunks=schedule.num_chunks, **times)
    seconds = max(timed.end_seconds for timed in simulate(schedule))
    assert seconds - 3 * schedule.num_micro == pytest.approx(bubble)
    if not schedule.is_split:
        fraction = bubble_fraction(num_ranks, schedule.num_micro, schedule.num_chunks)
        assert bubble / (3 * schedule.num_micro) == pytest.approx(fraction)


@pytest.mark.parametrize("num_ranks, num_micro, fraction",
                         [(4, 8, 0.375), (8, 32, 0.21875), (8, 64, 0.109375)])  # fmt: skip
@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
def test_matches_published_fractions_and_peaks(make, num_ranks, num_micro, fraction):
    schedule = make(num_ranks, num_micro)
    seconds = max(timed.end_seconds for timed in simulate(schedule))
    assert seconds / (3 * num_micro) - 1 == pytest.approx(fraction)
    peaks = [peak_in_flight(schedule, rank) for rank in range(num_ranks)]
    if make is gpipe:
        assert peaks == [num_micro] * num_ranks
    else:
        assert peaks == list(range(num_ranks, 0, -1))


@pytest.mark.parametrize("num_ranks, num_micro", [(2, 2), (4, 8), (8, 8), (8, 24)])
def test_zero_bubble_keeps_the_peak_of_1f1b(num_ranks, num_micro):
    schedule = zero_bubble_h1(num_ranks, num_micro)
    assert {peak_in_flight(schedule, rank) for rank in range(num_ranks)} == {num_ranks}


@pytest.mark.parametrize("num_ranks, num_micro, num_chunks", [(2, 4, 2), (4, 8, 2), (4, 8, 4)])
def test_matches_torch_interleaved(num_ranks, num_micro, num_chunks):
    """Its table of operations, made without processes."""
    from torch.distributed.pipelining import schedules as theirs

    ours = interleaved(num_ranks, num_micro, num_chunks)
    for rank in range(num_ranks):
        warm_up = min(
            2 * (num_ranks - 1 - rank) + (num_chunks - 1) * num_ranks, num_micro * num_chunks
        )

        def forward(step, rank=rank):
            return step // num_ranks % num_chunks * num_ranks + rank

        def backward(step, rank=rank, warm_up=warm_up):
            return (num_chunks - 1 - (step - warm_up) // num_ranks % num_chunks) * num_ranks + rank

        row = theirs._get_1f1b_rank_ops(
            num_chunks, num_ranks, warm_up, num_micro * num_chunks - warm_up, warm_up, rank,
            forward, backward,
        )  # fmt: skip
        kinds = {"FORWARD": "F", "FULL_BACKWARD": "B"}
        found = [
            Action(kinds[op.computation_type.name], op.stage_index, op.microbatch_index)
            for op in row
            if op is not None
        ]
        assert found == list(ours.actions[rank])


def test_message_time_delays_each_hop():
    schedule = gpipe(4, 1)
    seconds = max(timed.end_seconds for timed in simulate(schedule, message_seconds=0.5))
    assert seconds == pytest.approx(4 * 3 + 6 * 0.5)


def test_few_micro_batches_are_allowed():
    for make in (gpipe, one_f_one_b, zero_bubble_h1):
        for num_micro in (1, 2, 3):
            assert len(simulate(make(4, num_micro))) == sum(map(len, make(4, num_micro).actions))


def test_rejects_actions_that_wait_for_each_other():
    bad = Schedule("bad", 1, 1, ((Action("B", 0, 0), Action("F", 0, 0)),))
    with pytest.raises(ValueError, match="wait for each other"):
        simulate(bad)


def test_rejects_impossible_counts():
    with pytest.raises(ValueError, match="num_ranks: expected at least 1"):
        gpipe(0, 1)
    with pytest.raises(ValueError, match="num_micro: expected at least 1"):
        one_f_one_b(1, 0)
    with pytest.raises(ValueError, match="num_micro: expected a multiple of 4"):
        interleaved(4, 6, 2)
    with pytest.raises(ValueError, match="num_chunks: expected at least 1"):
        interleaved(4, 4, 0)
    with pytest.raises(ValueError, match="name: expected GPipe"):
        bubble_seconds("none", 4, forward=1, backward=2)
