"""Simulated FSDP beside the same work on one rank, and a very large model by shapes alone.

Eight ranks of a small Llama, two rows each, beside one rank that takes the same eight pairs of rows
in turn: what gathering, scattering and book-keeping cost on top. Then one training step of
Llama-3.1-405B on one of 16,384 ranks: seconds beside the limit of a minute, and the bytes of the
ledger beside the formula's.
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Row, time_in_turns
from reference.parallel.ranks import Comm, run, run_one_rank
from reference.parallel.zero import FSDP, MixedPrecision, model_states_bytes
from reference.transformer import PRESETS, Llama, LlamaConfig

NUM_RANKS, ROWS, SEQ_LEN = 8, 2, 128
CONFIG = LlamaConfig(
    vocab_size=1024, dim=256, hidden_dim=688, num_layers=4, num_heads=4, max_seq_len=SEQ_LEN
)
LIMIT_SECONDS = 60.0


def rows() -> list[Row]:
    return [*_eight_ranks(), *_llama_405b()]


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def _eight_ranks() -> list[Row]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokens = torch.randint(0, CONFIG.vocab_size, (NUM_RANKS * ROWS, SEQ_LEN))
    alone = Llama(CONFIG)

    def one_rank() -> None:
        for part in tokens.chunk(NUM_RANKS):
            _loss(alone, part).backward()

    def program(comm: Comm) -> None:
        model = Llama(CONFIG)
        fsdp = FSDP(model, comm, model.layers)
        start.append(time.perf_counter())
        for _ in range(4):
            _loss(fsdp, tokens.chunk(NUM_RANKS)[comm.rank]).backward()
        comm.barrier()
        stop.append(time.perf_counter())

    found = {}
    for is_measured in (False, True):
        start: list[float] = []
        stop: list[float] = []
        run(NUM_RANKS, program, is_measured=is_measured)
        found[is_measured] = (max(stop) - max(start)) / 4 * 1e6
    (theirs,) = time_in_turns(one_rank)
    return [
        Row("FSDP on 8 simulated ranks, unmeasured", found[False], theirs, "us"),
        Row("FSDP on 8 simulated ranks, with ledgers", found[True], theirs, "us"),
    ]


def _llama_405b() -> list[Row]:
    world_size = 16_384
    begin = time.perf_counter()
    with torch.device("meta"):
        model = Llama(PRESETS["llama-3.1-405b"])
    num_parameters = sum(p.numel() for p in model.parameters())

    def program(comm: Comm) -> int:
        precision = MixedPrecision(torch.bfloat16, torch.float32)
        fsdp = FSDP(model, comm, model.layers, precision=precision)
        optimizer = torch.optim.AdamW(fsdp.parameters())
        _loss(fsdp, torch.zeros(1, 8193, dtype=torch.long)).backward()
        optimizer.step()
        use = comm.memory.use.current
        return sum(use[c] for c in ("parameters", "gradients", "optimizer_states"))

    held = run_one_rank(world_size, program).results[0]
    seconds = time.perf_counter() - begin
    formula = model_states_bytes(num_parameters, world_size, 3).total
    return [
        Row("405B on 16,384 ranks: time, limit", seconds, LIMIT_SECONDS, "s"),
        Row("405B on 16,384 ranks: states, formula", held, formula, "bytes"),
    ]
