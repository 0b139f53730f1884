"""Schedules on the simulated machine: their bubbles beside the formulas, and Megatron's layout
beside DeepSpeed's on the same 8 ranks.

Bubbles twice: with links that take no time, as the formulas have it, and with an H100 node's.
A step of a Llama by shapes alone: seconds of the virtual clock and the most bytes that a rank
holds, on an H100 node; first under tensor 4 x pipeline 2 with 1F1B, then under ZeRO-3.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Row
from reference.parallel.pipeline import (
    Pipeline,
    Schedule,
    bubble_seconds,
    gpipe,
    interleaved,
    one_f_one_b,
    split_llama,
    zero_bubble_h1,
)
from reference.parallel.ranks import DGX_H100, Comm, Hardware, Link, Run, run
from reference.parallel.tensor import parallelize, vocab_parallel_cross_entropy
from reference.parallel.zero import FSDP
from reference.transformer import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=32_000, dim=2048, hidden_dim=5632, num_layers=2, num_heads=16, max_seq_len=2048
)
NUM_RANKS, NUM_MICRO, SEQ_LEN = 4, 8, 2048
_NO_TIME = Link(latency_seconds=0.0, bytes_per_second=1e20)
INSTANT = dataclasses.replace(DGX_H100, intra=_NO_TIME, inter=_NO_TIME)


def rows() -> list[Row]:
    return [*_bubbles(), *_megatron_beside_deepspeed()]


def _bubbles() -> list[Row]:
    schedules = (
        gpipe(NUM_RANKS, NUM_MICRO),
        one_f_one_b(NUM_RANKS, NUM_MICRO),
        interleaved(NUM_RANKS, NUM_MICRO, 2),
        zero_bubble_h1(NUM_RANKS, NUM_MICRO),
    )
    return [
        _bubble(schedule, name, hardware)
        for name, hardware in (("", INSTANT), (", H100 node's links", DGX_H100))
        for schedule in schedules
    ]


def _bubble(schedule: Schedule, links: str, hardware: Hardware, width: int = 8192) -> Row:
    def program(comm: Comm) -> None:
        per_stage = 8 // schedule.num_chunks
        stages = [
            nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(per_stage)))
            for _ in range(schedule.num_chunks)
        ]
        x = torch.empty(NUM_MICRO * 1024, width, requires_grad=True)
        pipeline = Pipeline(comm, stages, schedule, _square, like=torch.empty_like)
        pipeline.step(x, x.detach())

    trace = run(schedule.num_ranks, program, shapes_only=True, hardware=hardware).trace
    busy = trace.busy_seconds(1)
    one = busy / NUM_MICRO / 3
    times = {"forward": one, "backward": 2 * one}
    if schedule.is_split:
        times = {"forward": one, "backward": one, "weight": one}
    formula = bubble_seconds(
        schedule.name, schedule.num_ranks, num_chunks=schedule.num_chunks, **times
    )
    name = f"{schedule.name}: bubble, formula{links}"
    return Row(name, (trace.seconds - busy) * 1e3, formula * 1e3, "ms")


def _square(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square()


def _megatron_beside_deepspeed() -> list[Row]:
    rows_of_batch = 8

    def megatron(comm: Comm) -> None:
        mesh = comm.mesh(pp=2, tp=4)
        model = parallelize(Llama(CONFIG), mesh.tp, sequence_parallel=True)
        stages = split_llama(model, mesh.pp.rank, 2, recompute="selective")
        tokens = torch.zeros(rows_of_batch, SEQ_LEN, dtype=torch.long)
        comm.memory.reset_peak()
        Pipeline(
            mesh.pp,
            stages,
            one_f_one_b(2, rows_of_batch),
            lambda y, t: vocab_parallel_cross_entropy(y, t, mesh.tp),
        ).step(tokens, tokens)

    def deepspeed(comm: Comm) -> None:
        model = Llama(CONFIG)
        fsdp = FSDP(model, comm, model.layers)
        del model
        tokens = torch.zeros(1, SEQ_LEN, dtype=torch.long)
        comm.memory.reset_peak()
        logits = fsdp(tokens)
        F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()

    ours, theirs = (run(8, p, shapes_only=True) for p in (megatron, deepspeed))
    return [
        Row("TP4 x PP2, ZeRO-3: step", ours.trace.seconds * 1e3, theirs.trace.seconds * 1e3, "ms"),
        Row("TP4 x PP2, ZeRO-3: sent by a rank", _sent(ours), _sent(theirs), "GB"),
        Row("TP4 x PP2, ZeRO-3: peak activations", _peak(ours), _peak(theirs), "GB"),
    ]


def _sent(done: Run) -> float:
    return max(done.trace.total(rank=rank).wire_bytes for rank in range(8)) / 1e9


def _peak(done: Run) -> float:
    return max(use.peak["activations"] for use in done.trace.memory().values()) / 1e9
