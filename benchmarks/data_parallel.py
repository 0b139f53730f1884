"""DDP on simulated ranks beside the same work on one, and on processes beside PyTorch's.

Eight ranks of a small Llama, two rows each, beside one rank that takes the same eight pairs of rows
in turn: what copies, reductions and book-keeping (some 40 us an operation) cost on top. Two
processes with gloo: our DDP beside DistributedDataParallel. Start-up: eight simulated ranks, beside
the limit of 50 ms. The virtual clock: an all-reduce of 100 MiB on eight GPUs, beside the
alpha-beta formula.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import Row, time_in_turns
from reference.parallel.data_parallel import DDP, all_reduce_cost
from reference.parallel.ranks import DGX_H100, Comm, run
from reference.transformer import Llama, LlamaConfig

NUM_RANKS, ROWS, SEQ_LEN, NUM_STEPS = 8, 2, 256, 4
CONFIG = LlamaConfig(
    vocab_size=1024, dim=512, hidden_dim=1376, num_layers=2, num_heads=8, max_seq_len=SEQ_LEN
)
START_LIMIT_US = 50e3


def rows() -> list[Row]:
    return [*_eight_ranks(), _processes(), _start(), _clock()]


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def _tokens(num_ranks: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, CONFIG.vocab_size, (num_ranks * ROWS, SEQ_LEN), generator=generator)


def _eight_ranks() -> list[Row]:
    torch.set_num_threads(1)
    tokens = _tokens(NUM_RANKS)
    alone = Llama(CONFIG)

    def one_rank() -> None:
        for part in tokens.chunk(NUM_RANKS):
            _loss(alone, part).backward()

    def program(comm: Comm) -> None:
        model = Llama(CONFIG)
        ddp = DDP(model, comm, broadcast_buffers=False)
        _loss(ddp, tokens.chunk(NUM_RANKS)[comm.rank]).backward()
        comm.barrier()
        start.append(time.perf_counter())
        for _ in range(NUM_STEPS):
            _loss(ddp, tokens.chunk(NUM_RANKS)[comm.rank]).backward()
        comm.barrier()
        stop.append(time.perf_counter())

    found = {}
    for is_measured in (False, True):
        start: list[float] = []
        stop: list[float] = []
        run(NUM_RANKS, program, is_measured=is_measured)
        found[is_measured] = (max(stop) - max(start)) / NUM_STEPS * 1e6
    (theirs,) = time_in_turns(one_rank)
    return [
        Row("DDP on 8 simulated ranks, unmeasured", found[False], theirs, "us"),
        Row("DDP on 8 simulated ranks, with ledgers", found[True], theirs, "us"),
    ]


def _processes() -> Row:
    def seconds_of(comm: Comm, wrap: Callable[[nn.Module, Comm], nn.Module]) -> float:
        torch.manual_seed(0)
        model = wrap(Llama(CONFIG), comm)
        tokens = _tokens(2).chunk(2)[comm.rank]
        found = []
        for _ in range(NUM_STEPS + 2):
            comm.barrier()
            begin = time.perf_counter()
            _loss(model, tokens).backward()
            found.append(time.perf_counter() - begin)
        return sorted(found)[len(found) // 2]

    def program(comm: Comm) -> list[float]:
        wraps: tuple[Any, Any] = (DDP, lambda model, _: DistributedDataParallel(model))
        return [seconds_of(comm, wrap) for wrap in wraps]

    ours, theirs = run(2, program, backend="processes", is_measured=False).results[0]
    return Row("DDP on 2 processes, a backward", ours * 1e6, theirs * 1e6, "us")


def _start() -> Row:
    def start() -> None:
        run(NUM_RANKS, lambda comm: comm.rank, is_measured=False)

    start()
    found = []
    for _ in range(20):
        begin = time.perf_counter()
        start()
        found.append(time.perf_counter() - begin)
    return Row("start of 8 simulated ranks, limit", sorted(found)[10] * 1e6, START_LIMIT_US, "us")


def _clock() -> Row:
    num_bytes = 100 * 2**20
    trace = run(
        NUM_RANKS, lambda comm: comm.all_reduce(torch.zeros(num_bytes // 4)).numel(),
        shapes_only=True,
    ).trace  # fmt: skip
    formula = all_reduce_cost("ring", NUM_RANKS, num_bytes).seconds(DGX_H100.intra)
    return Row("virtual all-reduce of 100 MiB, formula", trace.seconds * 1e6, formula * 1e6, "us")
