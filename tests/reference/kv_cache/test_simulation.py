import pytest

from reference.kv_cache import (
    Request,
    beam_saved,
    sampling_saved,
    static_iterations,
    utilization,
)


def test_utilization_matches_the_closed_form():
    """One request of P = 10, O = 4: it holds 11, 12, 13, 14 tokens."""
    lengths = [(10, 4)]
    assert utilization(lengths, "max", max_len=20) == 50 / 80
    assert utilization(lengths, "pow2") == 50 / 64
    assert utilization(lengths, "oracle") == 50 / 56
    assert utilization(lengths, "paged", block_size=4) == 50 / (12 + 12 + 16 + 16)
    assert utilization(lengths, "paged", block_size=1) == 1.0
    assert utilization([], "max") == 0.0


def test_invariant_policies_stand_in_the_papers_order():
    lengths = [(p, o) for p in range(5, 600, 60) for o in range(7, 500, 70)]
    found = [utilization(lengths, policy) for policy in ("max", "pow2", "oracle", "paged")]
    assert found == sorted(found) and found[-1] > 0.96


def test_sampling_matches_counting_by_hand():
    """Full prompt blocks are shared for good, the last one until each sample has written."""
    for prompt, num_samples in ((32, 2), (40, 4)):
        shared, output = prompt // 16, 8
        after = -(-(prompt + 1) // 16) - shared  # own blocks of each, all answers within one
        total = num_samples * (shared + after)
        expected = (num_samples - 1) * shared / total
        assert sampling_saved(prompt, output, num_samples) == pytest.approx(expected)
    assert sampling_saved(100, 20, 1) == 0.0


def test_invariant_beams_share_more_than_samples():
    assert beam_saved(32, 100, 4) > 1.5 * sampling_saved(32, 100, 4)
    assert beam_saved(32, 100, 4, stay=1.0) == pytest.approx(sampling_saved(32, 100, 4))


def test_static_iterations_match_counting_by_hand():
    requests = [Request("a", (1,) * 5, 3), Request("b", (1,) * 2, 1), Request("c", (1,) * 4, 2)]
    history = static_iterations(requests, batch_size=2, max_len=10)
    assert [i.prefill_tokens for i in history] == [10, 0, 0, 4, 0]
    assert [i.decoded for i in history] == [0, 2, 2, 0, 1]
    assert [i.num_running for i in history] == [2, 1, 1, 1, 1]
    assert [i.held_tokens for i in history] == [7, 6, 7, 4, 5]
    assert [i.used_slots for i in history] == [20, 20, 20, 10, 10]


def test_rejects_policies_and_sizes():
    with pytest.raises(ValueError, match="policy: expected one of max, pow2, oracle, paged"):
        utilization([(1, 1)], "none")
    with pytest.raises(ValueError, match="expected at most max_len=8, got 9"):
        utilization([(5, 4)], "max", max_len=8)
    requests = [Request("a", (1,) * 5, 3)]
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        static_iterations(requests, batch_size=0, max_len=9)
    with pytest.raises(ValueError, match="max_len: expected at least 7, got 6"):
        static_iterations(requests, batch_size=1, max_len=6)
