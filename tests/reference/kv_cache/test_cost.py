import pytest

from reference.attention import kv_cache_bytes
from reference.kv_cache import (
    Iteration,
    Machine,
    ServedModel,
    iteration_bytes,
    iteration_flops,
    iteration_intensity,
    iteration_seconds,
)

A100 = Machine(flops_per_second=312e12, bytes_per_second=1.555e12)
OPT_13B = ServedModel(
    num_parameters=13 * 10**9,
    bytes_per_parameter=2,
    kv_bytes_per_token=kv_cache_bytes(num_layers=40, num_kv_heads=40, head_dim=128),
)


def decode(batch, held):
    return Iteration(0, batch, batch, batch * held, batch * held)


def test_matches_the_closed_form():
    step = decode(8, 100)
    assert iteration_flops(OPT_13B, step) == 2 * 13 * 10**9 * 8
    assert iteration_bytes(OPT_13B, step) == 26 * 10**9 + 819_200 * 800
    assert A100.ridge_point == pytest.approx(200.6, abs=0.1)


def test_invariant_decode_waits_for_memory_and_prefill_computes():
    for batch in (1, 8, 64):
        step = decode(batch, 0)
        assert iteration_intensity(OPT_13B, step) == batch  # 2 FLOPs and 2 bytes a weight
        assert iteration_seconds(OPT_13B, step, A100) == pytest.approx(26e9 / 1.555e12)
    prefill = Iteration(2048, 0, 1, 2048, 2048)
    assert iteration_intensity(OPT_13B, prefill) > A100.ridge_point
    assert iteration_seconds(OPT_13B, prefill, A100) == pytest.approx(2 * 13e9 * 2048 / 312e12)
