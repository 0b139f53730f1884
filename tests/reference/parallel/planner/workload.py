"""A Llama by shapes alone on the simulated machine, in 16 bits, and the same as a plan."""

from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F

from reference.parallel.pipeline import Pipeline, one_f_one_b, split_llama
from reference.parallel.planner import Batch, Plan, llama_shape, perfect
from reference.parallel.ranks import DGX_H100, run
from reference.parallel.tensor import parallelize, vocab_parallel_cross_entropy
from reference.transformer import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=16_000, dim=2048, hidden_dim=5632, num_layers=2, num_heads=16, max_seq_len=2048
)
SHAPE = llama_shape(CONFIG)
SEQ_LEN = 1024


@contextmanager
def sixteen_bits():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def fresh():
    return Llama(CONFIG)


def simulated(num_ranks, program):
    with sixteen_bits():
        return run(num_ranks, program, shapes_only=True, hardware=DGX_H100)


def tokens(rows):
    return torch.zeros(rows, SEQ_LEN, dtype=torch.long)


def losses_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")


def loss_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def eager(**sizes):
    """A plan as this course's modules carry it out."""
    return Plan(attention="eager", **sizes)


def batch(num_sequences):
    return Batch(num_sequences, SEQ_LEN)


def machine(num_gpus):
    return perfect(DGX_H100, num_gpus)


@cache
def pipeline_run(recompute):
    """Two stages of 1F1B, four micro-batches: each rank's peak bytes by category."""

    def program(comm):
        stages = split_llama(fresh(), comm.rank, 2, recompute=recompute)
        comm.memory.reset_peak()
        Pipeline(comm, stages, one_f_one_b(2, 4), losses_of).step(tokens(4), tokens(4))
        return comm.memory.use.peak

    return simulated(2, program)


@cache
def tensor_run(sequence_parallel):
    """Two tensor parallel ranks, two rows: each rank's peak bytes by category."""

    def program(comm):
        model = parallelize(fresh(), comm, sequence_parallel=sequence_parallel)
        ids = tokens(2)
        comm.memory.reset_peak()
        vocab_parallel_cross_entropy(model(ids), ids, comm).mean().backward()
        return comm.memory.use.peak

    return simulated(2, program)
