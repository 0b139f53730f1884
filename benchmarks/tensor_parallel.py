"""Traffic of a layer beside the published counts, and a divided step beside a whole one.

A layer's bytes in a training step, forward and backward, on each rank: four all-reduces of the
stream under tensor parallelism, the same with sequence parallelism (Narayanan et al. 2021, sec.
3.2; Korthikanti et al. 2022, sec. 4.2.2; small all-reduces of norms' gradients are counted apart).
Then the time of a step on four simulated ranks beside the same work on one.
"""

import copy
import dataclasses
import time

import torch
import torch.nn.functional as F

from benchmarks.measure import Row, time_in_turns
from reference.parallel.ranks import Comm, run
from reference.parallel.tensor import parallelize, vocab_parallel_cross_entropy
from reference.transformer import Llama, LlamaConfig

NUM_RANKS, ROWS, SEQ_LEN, NUM_STEPS = 4, 4, 256, 4
CONFIG = LlamaConfig(
    vocab_size=1024, dim=512, hidden_dim=1376, num_layers=2, num_heads=8, max_seq_len=SEQ_LEN
)


def rows() -> list[Row]:
    torch.set_num_threads(1)
    return [*_traffic(), *_step()]


def _tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, CONFIG.vocab_size, (ROWS, SEQ_LEN), generator=generator)


def _loss(part: torch.nn.Module, tokens: torch.Tensor, comm: Comm) -> torch.Tensor:
    return vocab_parallel_cross_entropy(part(tokens), tokens, comm).mean()


def _traffic() -> list[Row]:
    def sent(comm: Comm, num_layers: int, sequence_parallel: bool) -> float:
        model = Llama(dataclasses.replace(CONFIG, num_layers=num_layers))
        part = parallelize(model, comm, sequence_parallel=sequence_parallel)
        comm.traffic.reset()
        _loss(part, _tokens(), comm).backward()
        rows_ = comm.traffic.rows()
        norms = 2 * num_layers + 1 if sequence_parallel else 0
        small = norms * 2 * (NUM_RANKS - 1) / NUM_RANKS * CONFIG.dim * 4
        return sum(row.wire_bytes for row in rows_) - small

    stream = ROWS * SEQ_LEN * CONFIG.dim * 4
    published = 4 * 2 * (NUM_RANKS - 1) / NUM_RANKS * stream
    found = []
    for name, sequence_parallel in (("TP", False), ("TP and SP", True)):
        one, two = (run(NUM_RANKS, sent, n, sequence_parallel).results[0] for n in (1, 2))
        found.append(Row(f"{name}: bytes of a layer, published", two - one, published, "bytes"))
    return found


def _step() -> list[Row]:
    tokens, model = _tokens(), Llama(CONFIG)

    def whole() -> None:
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()

    def program(comm: Comm, sequence_parallel: bool) -> float:
        part = parallelize(copy.deepcopy(model), comm, sequence_parallel=sequence_parallel)
        _loss(part, tokens, comm).backward()
        comm.barrier()
        begin = time.perf_counter()
        for _ in range(NUM_STEPS):
            _loss(part, tokens, comm).backward()
        comm.barrier()
        return (time.perf_counter() - begin) / NUM_STEPS * 1e6

    (theirs,) = time_in_turns(whole)
    return [
        Row(f"{name} on 4 simulated ranks, a step",
            max(run(NUM_RANKS, program, sp, is_measured=False).results), theirs, "us")
        for name, sp in (("TP", False), ("TP and SP", True))
    ]  # fmt: skip
