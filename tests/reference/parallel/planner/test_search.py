"""Oracles: each plan weighed by itself, published layouts, reasons that name what is wrong."""

import time
from dataclasses import replace

import pytest

from reference.parallel.planner import (
    Batch,
    Plan,
    a100_cluster,
    candidates,
    gpt_shape,
    h100_cluster,
    llama_shape,
    misfits,
    rank_plans,
    weigh,
)
from reference.transformer import PRESETS

LLAMA_8B, LLAMA_405B = (llama_shape(PRESETS[f"llama-3.1-{s}"]) for s in ("8b", "405b"))


def test_ranks_the_fastest_that_fits_first():
    cluster, batch = h100_cluster(16), Batch(64, 4096)
    ranking = rank_plans(LLAMA_8B, cluster, batch)
    times = [verdict.time.total for verdict in ranking.fitting]
    assert times == sorted(times) and ranking.best is ranking.fitting[0]
    assert all(v.memory.total <= cluster.usable_bytes for v in ranking.fitting)
    assert all(v.reasons for v in ranking.rejected)
    weighed = {
        weigh(p, LLAMA_8B, cluster, batch).fits for p in candidates(LLAMA_8B, cluster, batch)
    }
    assert weighed == {True, False}
    assert 0 < ranking.best.mfu < cluster.efficiency.matmul


def test_plans_405b_on_16384_gpus_within_ten_seconds():
    start = time.process_time()
    ranking = rank_plans(LLAMA_405B, h100_cluster(16_384), Batch(2048, 8192))
    assert time.process_time() - start < 10
    best = ranking.best.plan
    assert best.tensor == 8 and best.pipeline > 1
    assert any("memory" in v.reasons[0] for v in ranking.rejected)


def test_long_sequences_need_context_parallelism():
    ranking = rank_plans(LLAMA_405B, h100_cluster(16_384), Batch(128, 2**17), max_context=16)
    assert ranking.best.plan.context > 1


def test_small_model_needs_nothing_but_data_parallelism():
    best = rank_plans(
        llama_shape(PRESETS["smollm2-135m"]), h100_cluster(8), Batch(64, 2048)
    ).best.plan
    assert (best.tensor, best.pipeline, best.data) == (1, 1, 8)


def test_tensor_parallelism_stays_within_a_node():
    model = gpt_shape(12288, 96, 96)
    ranking = rank_plans(model, a100_cluster(64), Batch(64, 2048), max_tensor=16)
    assert ranking.best.plan.tensor <= 8


@pytest.mark.parametrize(
    "plan, reason",
    [
        (Plan(data=4), "4 ranks on 8 GPUs"),
        (Plan(data=0), "at least 1"),
        (Plan(data=8, zero_stage=4), "stages 0 to 3"),
        (Plan(data=8, is_offloaded=True), "offload: needs ZeRO"),
        (Plan(data=8, sequence_parallel=True), "goes with tensor"),
        (Plan(data=8, num_chunks=2), "only the interleaved"),
        (Plan(context=8, attention="eager"), "needs fused attention"),
        (Plan(tensor=8, data=1, micro_batch=3), "sequences do not divide by 3"),
        (Plan(pipeline=8, schedule="interleaved", num_chunks=8), "64 stages for 32 layers"),
        (
            Plan(pipeline=8, schedule="interleaved", num_chunks=2, micro_batch=4),
            "4 micro-batches are no multiple of 8 stages",
        ),
    ],
)
def test_says_why_a_plan_does_not_fit(plan, reason):
    found = misfits(plan, LLAMA_8B, h100_cluster(8), Batch(16, 4096))
    assert any(reason in one for one in found), found
    assert not weigh(plan, LLAMA_8B, h100_cluster(8), Batch(16, 4096)).fits


def test_says_why_heads_and_positions_do_not_divide():
    odd = gpt_shape(60, 4, 6, vocab_size=100)
    found = misfits(Plan(tensor=4, sequence_parallel=True), odd, h100_cluster(4), Batch(1, 30))
    assert "6 query heads do not divide by 4 tensor ranks" in found
    assert "30 positions do not divide by 4 tensor x context" in found
    found = misfits(Plan(context=4), odd, h100_cluster(4), Batch(1, 30))
    assert "30 positions do not divide by 8 zigzag blocks" in found


def test_says_how_much_memory_is_missing():
    verdict = weigh(Plan(data=8), LLAMA_405B, h100_cluster(8), Batch(8, 8192))
    assert "memory" in verdict.reasons[0] and "of 75.2 GB usable" in verdict.reasons[0]
    assert verdict.memory.total > 6e12 and verdict.time is None


def test_no_plan_that_fits_names_the_nearest():
    with pytest.raises(ValueError, match="no plan fits; nearest: .*try more GPUs or offload"):
        _ = rank_plans(LLAMA_405B, h100_cluster(8), Batch(8, 8192)).best
    with pytest.raises(ValueError, match="no plan divides"):
        _ = rank_plans(LLAMA_8B, h100_cluster(8), Batch(8, 8192), plans=[Plan(data=3)]).best


def test_offload_rescues_a_model_that_is_too_large():
    plan = Plan(data=8, zero_stage=2, recompute="full")
    model, cluster, batch = gpt_shape(5120, 64, 40), a100_cluster(8), Batch(8, 1024)
    assert not weigh(plan, model, cluster, batch).fits
    assert weigh(replace(plan, is_offloaded=True, zero_stage=3), model, cluster, batch).fits


def test_offload_needs_room_on_the_host():
    small = replace(h100_cluster(8), host_memory_bytes=50e9)
    plan = Plan(data=2, tensor=4, zero_stage=3, recompute="full", is_offloaded=True)
    model = llama_shape(PRESETS["llama-3.1-70b"])
    (reason,) = weigh(plan, model, small, Batch(64, 4096)).reasons
    assert reason == "host memory: 106 GB of 50 GB a GPU"
    assert weigh(plan, model, h100_cluster(8), Batch(64, 4096)).fits


def test_names_a_plan_in_words():
    plan = Plan(tensor=8, pipeline=16, data=128, sequence_parallel=True, zero_stage=1,
                schedule="interleaved", num_chunks=4, recompute="full")  # fmt: skip
    words = "TP8 PP16 DP128 SP ZeRO-1 interleaved v4 micro-batch 1 full recomputation"
    assert str(plan) == words
    assert str(Plan()) == "1 GPU micro-batch 1"
