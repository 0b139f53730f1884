"""Oracles: ZeRO's table 1, the simulated machine's ledger, pipeline schedules, measured GPUs."""

from dataclasses import replace

import pytest
import torch

from reference.parallel.pipeline import (
    gpipe,
    interleaved,
    one_f_one_b,
    peak_in_flight,
    zero_bubble_h1,
)
from reference.parallel.planner import Batch, Plan, gpt_shape, llama_shape, memory_bytes
from reference.parallel.planner.activations import in_flight, layer_bytes
from reference.parallel.planner.memory import layers_of_ranks, rank_parameters
from reference.parallel.ranks import run
from reference.parallel.tensor import layer_activation_bytes
from reference.parallel.zero import FSDP, MixedPrecision, Zero
from reference.transformer import PRESETS
from tests.reference.parallel.planner.workload import (
    SHAPE,
    batch,
    eager,
    fresh,
    loss_of,
    pipeline_run,
    simulated,
    tensor_run,
    tokens,
)

GIB = 2**30


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_matches_the_ledger_of_tensor_parallelism(sequence_parallel):
    peak = tensor_run(sequence_parallel).results[0]
    plan = eager(tensor=2, sequence_parallel=sequence_parallel, micro_batch=2)
    ours = memory_bytes(SHAPE, plan, batch(2))
    assert ours.states.parameters == pytest.approx(peak["parameters"], rel=1e-3)
    assert ours.states.gradients == pytest.approx(peak["gradients"], rel=1e-3)
    assert ours.activations == pytest.approx(peak["activations"], rel=0.05)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_matches_the_ledger_of_a_pipeline(recompute):
    """1F1B with its micro-batches in flight; the plan's rank is the fullest."""
    peaks = [peak["activations"] for peak in pipeline_run(recompute).results]
    plan = eager(pipeline=2, recompute=recompute)
    ours = memory_bytes(SHAPE, plan, batch(4)).activations
    assert ours == pytest.approx(max(peaks), rel=0.12)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_matches_the_ledger_of_zero(stage):
    def program(comm):
        zero = Zero(fresh(), comm, stage)
        loss_of(zero.model(tokens(1)), tokens(1)).backward()
        if stage == 2:
            zero.reduce_gradients()
        gradients = comm.memory.use.current["gradients"]
        zero.step()
        return comm.memory.use.current | {"gradients": gradients}

    held = simulated(2, program).results[0]
    ours = memory_bytes(SHAPE, Plan(data=2, zero_stage=stage), batch(2)).states
    for category in ("parameters", "gradients", "optimizer_states"):
        assert getattr(ours, category) == pytest.approx(held[category], rel=1e-3), category


def test_matches_the_ledger_of_fsdp():
    """Master weights are parameters there, optimizer states in ZeRO's count: 16 bytes in all."""

    def program(comm):
        model = fresh()
        fsdp = FSDP(model, comm, model.layers, precision=MixedPrecision(torch.bfloat16))
        optimizer = torch.optim.AdamW(fsdp.parameters())
        loss_of(fsdp(tokens(1)), tokens(1)).backward()
        optimizer.step()
        use = comm.memory.use.current
        return sum(use[c] for c in ("parameters", "gradients", "optimizer_states"))

    held = run(2, program, shapes_only=True).results[0]
    ours = memory_bytes(SHAPE, Plan(data=2, zero_stage=3), batch(2)).states.total
    assert ours == pytest.approx(held, rel=1e-3)


@pytest.mark.parametrize("p, m", [(1, 4), (2, 2), (4, 8), (8, 4), (4, 4)])
def test_in_flight_matches_the_schedules(p, m):
    schedules = [("GPipe", 1, gpipe(p, m)), ("1F1B", 1, one_f_one_b(p, m)),
                 ("ZB-H1", 1, zero_bubble_h1(p, m))]  # fmt: skip
    if m % p == 0 and p > 1:
        schedules.append(("interleaved", 2, interleaved(p, m, 2)))
    for name, chunks, schedule in schedules:
        for rank in {0, p - 1}:
            plan = Plan(pipeline=p, schedule=name, num_chunks=chunks)
            peak = peak_in_flight(schedule, rank) / chunks
            if name == "ZB-H1":
                assert in_flight(plan, rank, m) >= peak
            else:
                assert in_flight(plan, rank, m) == peak, (name, rank)


@pytest.mark.parametrize("positions, data, context, printed_gib", [
    (32768, 8, 1, 83.9), (65536, 4, 2, 84.2), (131072, 2, 4, 84.0), (262144, 1, 8, 84.5),
])  # fmt: skip
def test_matches_the_memory_that_torchtitan_measured(positions, data, context, printed_gib):
    """pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, table 2: 8B on 8 H100."""
    plan = Plan(data=data, context=context, zero_stage=3, recompute="full")
    ours = memory_bytes(llama_shape(PRESETS["llama-3.1-8b"]), plan, Batch(data, positions))
    assert ours.total / GIB == pytest.approx(printed_gib, rel=0.05)


def test_activations_of_a_gpt_layer_are_chapter_13s():
    model, plan = gpt_shape(512, 4, 8), Plan(tensor=4, micro_batch=2, attention="eager")
    expected = layer_activation_bytes(1024, 2, 512, 8, num_ranks=4)
    assert layer_bytes(model, plan, Batch(2, 1024)) == expected
    fused = layer_bytes(model, replace(plan, attention="fused"), Batch(2, 1024))
    assert fused == layer_activation_bytes(1024, 2, 512, 8, num_ranks=4, recompute="selective")


def test_invariant_context_divides_activations():
    long = Batch(1, 8192)
    one, four = (layer_bytes(SHAPE, Plan(context=c), long) for c in (1, 4))
    assert one == 4 * four


def test_invariant_offload_leaves_parameters_and_gradients():
    kept = memory_bytes(SHAPE, Plan(data=4, zero_stage=2), batch(4)).states
    offloaded = memory_bytes(SHAPE, Plan(data=4, zero_stage=2, is_offloaded=True), batch(4)).states
    assert offloaded.optimizer_states == 0
    assert (offloaded.parameters, offloaded.gradients) == (kept.parameters, kept.gradients)


def test_invariant_ranks_share_all_layers():
    for p, v in ((1, 1), (4, 1), (5, 2), (16, 1)):
        assert sum(layers_of_ranks(126, p, v)) == 126
    ranks = [rank_parameters(SHAPE, Plan(pipeline=2, tensor=2), rank) for rank in range(2)]
    assert sum(ranks) == SHAPE.num_parameters / 2


def test_memory_says_what_it_consists_of():
    text = str(memory_bytes(SHAPE, Plan(), batch(1)))
    assert "GB: parameters 0." in text and "optimizer" in text and "activations" in text
