"""Oracles: the clock of the simulated machine, event simulation of schedules, closed forms."""

import pytest
import torch

from reference.parallel.pipeline import (
    gpipe,
    interleaved,
    one_f_one_b,
    simulate,
)
from reference.parallel.planner import (
    Batch,
    Plan,
    a100_cluster,
    gpt_shape,
    h100_cluster,
    llama_shape,
    model_flops,
    step_seconds,
)
from reference.parallel.planner.kernels import attention_seconds, layer_seconds
from reference.parallel.ranks import DGX_H100, run
from reference.parallel.zero import FSDP, MixedPrecision, Zero
from reference.transformer import PRESETS, training_flops_per_token
from tests.reference.parallel.planner.workload import (
    SHAPE,
    batch,
    eager,
    fresh,
    loss_of,
    machine,
    pipeline_run,
    simulated,
    tensor_run,
    tokens,
)

GPT_175B = gpt_shape(12288, 96, 96)


def planned(plan, num_sequences):
    return step_seconds(SHAPE, plan, machine(plan.num_gpus), batch(num_sequences))


def test_matches_the_clock_of_one_rank():
    def program(comm):
        loss_of(fresh()(tokens(2)), tokens(2)).backward()

    assert planned(eager(micro_batch=2), 2).total == pytest.approx(
        simulated(1, program).trace.seconds, rel=1e-9
    )


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_matches_the_clock_of_tensor_parallelism(sequence_parallel):
    """To 5 %: sums of the loss and of norms' gradients, a few small calls, are left out."""
    plan = eager(tensor=2, sequence_parallel=sequence_parallel, micro_batch=2)
    ours = planned(plan, 2)
    assert ours.total == pytest.approx(tensor_run(sequence_parallel).trace.seconds, rel=0.05)
    assert ours.tensor > 0.1 * ours.total


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_matches_the_clock_of_a_pipeline(recompute):
    """To 5 %: the last stage has the head, and others wait for it; messages hide there."""
    ours = planned(eager(pipeline=2, recompute=recompute), 4)
    assert ours.total == pytest.approx(pipeline_run(recompute).trace.seconds, rel=0.05)


def test_matches_the_clock_of_ddp_without_overlap():
    """Two ranks, gradients in 16 bits, summed after backward."""

    def program(comm):
        zero = Zero(fresh(), comm, 0, bucket_bytes=1 << 30)
        start = comm.now_seconds  # parameters have been sent round
        loss_of(zero.model(tokens(1)), tokens(1)).backward()
        zero.reduce_gradients()
        return comm.now_seconds - start

    ours = planned(eager(data=2, is_overlapped=False), 2)
    assert ours.total == pytest.approx(simulated(2, program).results[0], rel=0.02)
    assert ours.data > 0.1 * ours.total


def test_fsdp_hides_its_gathering_as_the_clock_says():
    """Work, traffic and their overlap: never less than the longer, never more than both."""

    def program(comm):
        model = fresh()
        fsdp = FSDP(model, comm, model.layers, precision=precision)
        start = comm.now_seconds
        loss_of(fsdp(tokens(8)), tokens(8)).backward()
        return comm.now_seconds - start

    precision = MixedPrecision(torch.bfloat16, torch.bfloat16)
    clock = run(2, program, shapes_only=True, hardware=DGX_H100).results[0]
    ours = planned(eager(data=2, zero_stage=3, micro_batch=8), 16)
    assert ours.total == pytest.approx(clock, rel=0.15)


@pytest.mark.parametrize("name, v", [("GPipe", 1), ("1F1B", 1), ("interleaved", 2)])
def test_bubble_matches_the_event_simulation(name, v):
    """Stages alike: no embedding's, no head's work."""
    even = gpt_shape(4096, 8, 32, vocab_size=1, context=1)
    schedule = {"GPipe": gpipe(4, 8), "1F1B": one_f_one_b(4, 8),
                "interleaved": interleaved(4, 8, 2)}[name]  # fmt: skip
    plan = Plan(pipeline=4, schedule=name, num_chunks=v)
    ours = step_seconds(even, plan, machine(4), Batch(8, 1024))
    layer = layer_seconds(even, plan, machine(4), Batch(8, 1024))
    per_stage = {"F": 2 / v * layer.forward, "B": 2 / v * layer.backward}
    truth = max(timed.end_seconds for timed in simulate(schedule, per_stage))
    assert ours.total - ours.messages == pytest.approx(truth, rel=0.02)
    assert ours.bubble / (ours.total - ours.bubble) == pytest.approx(3 / (8 * v), rel=0.01)


def test_zero_bubble_leaves_a_third():
    times = {s: step_seconds(GPT_175B, Plan(pipeline=8, tensor=8, schedule=s), a100_cluster(64),
                             Batch(16, 2048)) for s in ("1F1B", "ZB-H1")}  # fmt: skip
    assert times["ZB-H1"].bubble == pytest.approx(times["1F1B"].bubble / 3)


def test_model_flops_match_chapter_05():
    config = PRESETS["llama-3.1-8b"]
    ours = model_flops(llama_shape(config), Batch(4, 4096))
    assert ours == pytest.approx(training_flops_per_token(config, 4096) * 4 * 4096)


def test_wide_models_come_nearer_to_the_peak():
    """Element-wise work grows with D, products with D^2."""
    shares = []
    for dim in (1024, 4096, 16384):
        shape, one = gpt_shape(dim, 4, dim // 128), Batch(4, 2048)
        cluster = a100_cluster(1)
        layer = layer_seconds(shape, Plan(micro_batch=4), cluster, one)
        products = 3 * shape.layer_flops(8192) / cluster.flops_per_second
        shares.append(products / (layer.forward + layer.backward))
    assert shares == sorted(shares) and shares[0] < 0.75 < 0.95 < shares[-1]


def test_eager_attention_is_bound_by_memory():
    """Head width 64: 64 FLOPs a byte of weights, below the ridge of 312e12 / 2.039e12 = 153."""
    plan, cluster, one = Plan(attention="eager"), a100_cluster(1), Batch(1, 2048)
    shape = gpt_shape(1024, 1, 16)
    forward, _ = attention_seconds(shape, plan, cluster, one)
    at_peak = shape.pair_flops() * 2048**2 / cluster.flops_per_second
    assert forward > 4 * at_peak


def test_tensor_parallel_over_nodes_is_slow():
    batch_of, model = Batch(64, 2048), gpt_shape(8192, 48, 64)
    inside = step_seconds(model, Plan(tensor=8, data=2), a100_cluster(16), batch_of)
    across = step_seconds(model, Plan(tensor=16), a100_cluster(16), batch_of)
    assert across.tensor > 2 * inside.tensor
    assert across.total > 1.3 * inside.total


def test_context_hides_its_ring_behind_long_blocks():
    model = llama_shape(PRESETS["llama-3.1-405b"])
    plan = Plan(tensor=8, context=16)
    short, long = (step_seconds(model, plan, h100_cluster(128), Batch(1, s)) for s in (4096, 2**17))
    assert long.context == 0 < short.context


def test_selective_recomputation_costs_least():
    cluster, one = a100_cluster(64), Batch(64, 2048)
    times = {
        kind: step_seconds(
            GPT_175B,
            Plan(tensor=8, pipeline=8, recompute=kind, attention="eager"),
            cluster,
            one,
        )
        for kind in ("none", "selective", "full")
    }
    assert times["none"].total < times["selective"].total < times["full"].total
    extra = times["selective"].recompute / times["full"].recompute
    assert extra < 0.25


def test_offload_pays_for_the_way_to_the_host():
    model, one = llama_shape(PRESETS["llama-3.1-8b"]), Batch(8, 4096)
    times = [step_seconds(model, Plan(data=8, zero_stage=2, is_offloaded=o), h100_cluster(8), one)
             for o in (False, True)]  # fmt: skip
    assert times[1].optimizer > 10 * times[0].optimizer


def test_zero_2_scatters_every_micro_batch():
    """Where nothing hides: one scatter a micro-batch, for want of room for whole gradients."""
    model, cluster = llama_shape(PRESETS["llama-3.1-8b"]), h100_cluster(64)

    def data(stage, num_sequences):
        plan = Plan(data=64, zero_stage=stage, is_overlapped=False)
        return step_seconds(model, plan, cluster, Batch(num_sequences, 128)).data

    assert data(1, 256) == data(1, 64)
    assert data(2, 256) > 2 * data(2, 64)


def test_step_says_where_its_time_goes():
    text = str(
        step_seconds(GPT_175B, Plan(tensor=8, pipeline=8), a100_cluster(64), Batch(64, 2048))
    )
    assert "s: compute" in text and "tensor" in text and "bubble" in text
