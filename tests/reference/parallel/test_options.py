"""An option is honoured or refused: values that are none, counts of nothing, and combinations in
which an option would do nothing."""

import dataclasses
import re

import pytest
import torch

from reference.parallel.context import (
    ContextParallel,
    Kernel,
    attention_bytes,
    causal_pairs,
    gathered_attention,
    least_part,
    positions,
    ring_forward_seconds,
    ulysses_attention,
)
from reference.parallel.data_parallel import all_reduce_cost, rows_of_rank, rows_of_step
from reference.parallel.options import above_zero, at_least, one_of
from reference.parallel.pipeline import (
    Action,
    Pipeline,
    bubble_fraction,
    bubble_seconds,
    gpipe,
    groups_along,
    in_flight,
    interleaved,
    megatron_groups,
    one_f_one_b,
    simulate,
    split_llama,
    zero_bubble_h1,
)
from reference.parallel.planner import (
    Batch,
    Cluster,
    Efficiency,
    Plan,
    a100_cluster,
    gpt_shape,
    misfits,
    rank_plans,
    weigh,
)
from reference.parallel.planner.activations import layer_bytes
from reference.parallel.ranks import DGX_A100, DGX_H100, run
from reference.parallel.tensor import VocabParallelEmbedding, layer_activation_bytes
from reference.parallel.tensor.propagation import Einsum, part_by, propagate
from tests.reference.parallel.pipeline.workload import fresh

SHAPE = dict(batch=1, seq_len=8, num_heads=4, num_kv_heads=2, head_dim=8, num_ranks=2)
GPT, ONE = gpt_shape(64, 4, 4), Batch(8, 32)
TIMES = dict(forward=1.0, backward=2.0)
GPIPE = gpipe(2, 2)


def with_actions(rank, actions):
    rows = list(GPIPE.actions)
    rows[rank] = tuple(actions)
    return GPIPE._replace(actions=tuple(rows))


CASES = {
    "plan: recompute": (lambda: Plan(recompute="ful"), "recompute: expected none, selective or fu"),
    "plan: schedule": (lambda: Plan(schedule="1f1b"), "schedule: expected GPipe, 1F1B, interl"),
    "plan: attention": (lambda: Plan(attention="flash"), "attention: expected eager or fused, got"),
    "plan: gradients": (lambda: Plan(gradient_bytes=0), "gradient_bytes: expected at least 1, got"),
    "plan: replaced": (
        lambda: dataclasses.replace(Plan(), recompute="Full"), "got 'Full'"),
    "batch": (lambda: Batch(0, 8), "num_sequences: expected at least 1, got 0"),
    "batch: positions": (lambda: Batch(1, -8), "seq_len: expected at least 1, got -8"),
    "layer: recompute": (
        lambda: layer_bytes(GPT, Plan(), ONE, recompute="ful"), "recompute: expected none, sel"),
    "efficiency": (lambda: Efficiency(1.2, 0.3), "matmul: expected a share above 0 and at most 1"),
    "cluster: usable": (
        lambda: dataclasses.replace(a100_cluster(1), usable_share=0.0), "usable_share: expected a"),
    "cluster: memory": (
        lambda: Cluster(DGX_A100, 1, -1.0, Efficiency(0.5, 0.5)), "memory_bytes_per_second: expec"),
    "search: context": (
        lambda: rank_plans(GPT, a100_cluster(1), ONE, max_context=0), "max_context: expected at l"),
    "search: tensor": (
        lambda: rank_plans(GPT, a100_cluster(1), ONE, max_tensor=-1), "max_tensor: expected at le"),
    "search: plans": (
        lambda: rank_plans(GPT, a100_cluster(1), ONE, plans=[Plan()], max_context=2),
        "max_context, max_tensor: expected none next to plans"),
    "gpt": (lambda: gpt_shape(64, 0, 4), "num_layers: expected at least 1, got 0"),
    "gpt: heads": (lambda: gpt_shape(64, 4, 0), "num_heads: expected at least 1, got 0"),
    "activations": (
        lambda: layer_activation_bytes(8, 1, 64, 4, recompute="ful"), "recompute: expected none, "),
    "stage": (
        lambda: split_llama(fresh(), 0, 1, recompute="ful"), "recompute: expected none, selectiv"),
    "stage: chunks": (
        lambda: split_llama(fresh(), 0, 1, num_chunks=0), "num_chunks: expected at least 1, got 0"),
    "stage: ranks": (lambda: split_llama(fresh(), 0, 0), "num_ranks: expected at least 1, got 0"),
    "gpipe": (lambda: gpipe(0, 4), "num_ranks: expected at least 1, got 0"),
    "1F1B": (lambda: one_f_one_b(2, 0), "num_micro: expected at least 1, got 0"),
    "ZB-H1": (lambda: zero_bubble_h1(2, -1), "num_micro: expected at least 1, got -1"),
    "interleaved": (lambda: interleaved(2, 4, 0), "num_chunks: expected at least 1, got 0"),
    "bubble: name": (
        lambda: bubble_seconds("gpipe", 4, **TIMES), "name: expected GPipe, 1F1B, interleaved or"),
    "bubble: chunks": (
        lambda: bubble_seconds("1F1B", 4, num_chunks=2, **TIMES), "num_chunks: expected 1 for 1F1"),
    "bubble: weight": (
        lambda: bubble_seconds("ZB-H1", 4, weight=3.0, **TIMES), "weight: expected at most 1.0,"),
    "bubble: time": (
        lambda: bubble_seconds("1F1B", 4, forward=-1.0, backward=1.0), "forward: expected seconds"),
    "bubble: ranks": (lambda: bubble_seconds("1F1B", 0, **TIMES), "num_ranks: expected at least 1"),
    "fraction": (lambda: bubble_fraction(2, 0), "num_micro: expected at least 1, got 0"),
    "simulate: kinds": (
        lambda: simulate(GPIPE, {"F": 1.0}), "seconds: expected of B, F, got"),
    "simulate: other kinds": (
        lambda: simulate(GPIPE, {"F": 1.0, "B": 1.0, "b": 2.0}), "seconds: expected of B, F, got"),
    "simulate: time": (
        lambda: simulate(GPIPE, message_seconds=-1.0), "message_seconds: expected seconds from 0"),
    "simulate: twice": (
        lambda: simulate(with_actions(0, GPIPE.actions[0] + GPIPE.actions[0][:1])),
        "missing none, too many F0"),
    "simulate: elsewhere": (
        lambda: simulate(with_actions(0, [*GPIPE.actions[0][1:], Action("F", 1, 0)])),
        "rank 0's stages and micro-batches; missing F0, too many F0.1"),
    "simulate: number": (
        lambda: simulate(GPIPE._replace(num_micro=3)), "missing F2, B2, too many none"),
    "in flight": (lambda: in_flight(GPIPE, -1), "rank: expected 0 to 1, got -1"),
    "groups": (lambda: groups_along({"dp": 0}, "dp"), "dp: expected at least 1, got 0"),
    "megatron": (lambda: megatron_groups(8, tp=3), "world_size: expected a multiple of tp * pp"),
    "layout": (lambda: positions("zigzag", 8, 2, 2), "rank: expected 0 to 1, got 2"),
    "layout: name": (lambda: positions("zig-zag", 8, 0, 2), "layout: expected contiguous, zigzag"),
    "layout: ranks": (lambda: causal_pairs("striped", 8, 0), "num_ranks: expected at least 1, got"),
    "kernel": (
        lambda: Kernel(layout="spiral", is_causal=False), "layout: expected contiguous, zigzag"),
    "kernel: block": (lambda: Kernel(block_size=0), "block_size: expected at least 1, got 0"),
    "cost: method": (lambda: attention_bytes("usp", **SHAPE), "method: expected ulysses, ring or"),
    "cost: ranks": (
        lambda: attention_bytes("ring", **SHAPE | {"num_ranks": 0}), "num_ranks: expected at leas"),
    "cost: gradients": (
        lambda: attention_bytes("ulysses", **SHAPE, gradient_bytes=4, is_backward=True),
        "gradient_bytes: expected 2, as element_bytes, got 4"),
    "cost: part": (lambda: least_part(1e12, 0.0), "bytes_per_second: expected above 0, got 0.0"),
    "cost: ring": (
        lambda: ring_forward_seconds(DGX_H100, **SHAPE | {"batch": 0}), "batch: expected at least"),
    "all-reduce": (lambda: all_reduce_cost("torus", 2, 8), "algorithm: expected star, tree, ring"),
    "sampler": (lambda: rows_of_rank(4, 0, 0), "world_size: expected at least 1, got 0"),
    "sampler: step": (lambda: rows_of_step(8, 4, -1, 2, 0), "step: expected at least 0, got -1"),
    "annotation": (
        lambda: propagate([Einsum("y", "bd,df->bf", ("x", "w"))], {"v": ("dp", None)}),
        "v: expected one of x, w, y, each axis once"),
    "annotation: twice": (
        lambda: propagate([Einsum("y", "bd,df->bf", ("x", "w"))], {"x": ("dp", "dp")}),
        "x: expected one of x, w, y, each axis once"),
}  # fmt: skip

ON_RANKS = {
    "keys": (lambda comm: ContextParallel(comm, keys="rings"), "keys: expected ring or gathered,"),
    "layout": (lambda comm: ContextParallel(comm, layout="zig"), "layout: expected contiguous, zi"),
    "block": (lambda comm: ContextParallel(comm, block_size=-1), "block_size: expected at least 1"),
    "attend": (
        lambda comm: ulysses_attention(
            *[torch.zeros(1, 2, 2, 4)] * 3, comm, attend=gathered_attention),
        "attend: expected a ring that it goes along, got ring=None"),
    "schedule": (
        lambda comm: Pipeline(comm, [torch.nn.Identity()], with_actions(1, GPIPE.actions[1][:-1]),
                              lambda y, t: y, like=torch.empty_like),
        "schedule: expected each of F, B once for each of rank 1's stages and micro-batches; mis"),
    "token": (
        lambda comm: VocabParallelEmbedding(torch.ones(4, 2), comm)(torch.tensor([[4]])),
        "tokens: expected ids in 0 ... 3, got 4"),
    "part": (
        lambda comm: part_by(torch.ones(3, 2), ("dp", None), comm.mesh(dp=2)),
        "whole: expected dimension 0 to be a multiple of 2, the size of dp"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rejects(name):
    call, words = CASES[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


@pytest.mark.parametrize("name", ON_RANKS)
def test_rejects_on_ranks(name):
    program, words = ON_RANKS[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        run(2, program)


def test_rejects_plans_in_which_an_option_does_nothing():
    cluster = a100_cluster(8)
    found = misfits(Plan(data=8, zero_stage=3, is_overlapped=False), GPT, cluster, ONE)
    assert found == ["ZeRO-3: only with overlap; it prefetches"]
    assert not weigh(Plan(data=8, zero_stage=3, is_overlapped=False), GPT, cluster, ONE).fits


def test_rejects_no_numbers_and_counts_that_are_none():
    with pytest.raises(TypeError, match="num_ranks: expected a whole number, got 2.0"):
        at_least(1, [("num_ranks", 2.0)])
    with pytest.raises(TypeError, match="num_ranks: expected a whole number, got True"):
        at_least(1, [("num_ranks", True)])
    with pytest.raises(ValueError, match="rate: expected above 0, got nan"):
        above_zero([("rate", float("nan"))])
    with pytest.raises(ValueError, match="way: expected a or b, got 'c'"):
        one_of("way", "c", ("a", "b"))
    one_of("way", "a", ("a", "b"))
    at_least(0, [("num_ranks", 0)])
