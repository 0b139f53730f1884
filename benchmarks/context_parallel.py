"""Context parallelism: bytes beside the published counts, balance on the clock, time beside torch.

Bytes that a rank sends for the attention of one layer, one way: Ulysses beside 4 N h / P (Jacobs et
al., arXiv 2309.14509, sec. 3.2; of P parts P - 1 leave, so that the ratio is (P - 1)/P), the ring
beside its closed form. Steps of a balanced causal ring beside contiguous parts, on the virtual
clock. A ring of two processes beside torch's own on the same two; attention on four simulated ranks
beside the same tiles on one.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import Row, time_in_turns
from reference.flash_attention import flash_attention
from reference.parallel.context import (
    Kernel,
    attention_bytes,
    positions,
    ring_attention,
    ulysses_attention,
)
from reference.parallel.ranks import DGX_H100, Comm, run

HEADS, WIDTH, LENGTH = 8, 64, 2048
NUM_RANKS, NUM_TURNS, BLOCK = 4, 7, 256


def rows() -> list[Row]:
    torch.set_num_threads(1)
    return [*_traffic(), *_balance(), *_beside_torch(), *_simulated()]


def _inputs(num_kv_heads: int = HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    counts = (HEADS, num_kv_heads, num_kv_heads)
    return [torch.randn(1, n, LENGTH, WIDTH, generator=generator) for n in counts]


def _part(comm: Comm, layout: str = "contiguous") -> list[Tensor]:
    place = positions(layout, LENGTH, comm.rank, comm.size)  # type: ignore[arg-type]
    return [x[:, :, place].contiguous() for x in _inputs()]


def _traffic() -> list[Row]:
    def sent(comm: Comm, attend: Callable[..., Tensor]) -> float:
        attend(*_part(comm), comm, Kernel(layout="contiguous", block_size=LENGTH))
        return comm.traffic.total().wire_bytes

    found = []
    for n in (2, 4, 8):
        ours = run(n, sent, ulysses_attention, is_measured=False).results[0]
        published = 4 * LENGTH * HEADS * WIDTH * 4 / n
        found.append(Row(f"Ulysses, P = {n}: bytes, 4 N h / P", ours, published, "bytes"))
    for n in (2, 4, 8):
        ours = run(n, sent, ring_attention, is_measured=False).results[0]
        formula = attention_bytes(
            "ring", batch=1, seq_len=LENGTH, num_heads=HEADS, num_kv_heads=HEADS, head_dim=WIDTH,
            num_ranks=n, element_bytes=4,
        )  # fmt: skip
        found.append(Row(f"ring, N = {n}: bytes, formula", ours, formula, "bytes"))
    return found


def _balance() -> list[Row]:
    def program(comm: Comm, layout: str) -> None:
        given = (torch.empty(1, HEADS, 16_384, 128) for _ in range(3))
        kernel = Kernel(layout=layout, block_size=4096)  # type: ignore[arg-type]
        ring_attention(*given, comm, kernel)

    times = {
        layout: run(NUM_RANKS, program, layout, shapes_only=True, hardware=DGX_H100).trace.seconds
        for layout in ("contiguous", "zigzag", "striped")
    }
    return [
        Row(f"{layout}, contiguous: clock", times[layout] * 1e6, times["contiguous"] * 1e6, "us")
        for layout in ("zigzag", "striped")
    ]


def _beside_torch() -> list[Row]:
    def program(comm: Comm) -> tuple[float, float]:
        import torch.distributed as dist
        from torch.distributed.tensor.experimental._context_parallel import _attention

        _attention._cp_options.enable_load_balance = True
        q, k, v = _part(comm, "zigzag")
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

        def theirs() -> None:
            _attention._templated_ring_attention(dist.group.WORLD, 2, kernel, q, k, v,
                                                 is_causal=True)  # fmt: skip

        def ours() -> None:
            ring_attention(q, k, v, comm, Kernel(layout="zigzag", block_size=BLOCK))

        spent = {ours: [], theirs: []}  # type: ignore[var-annotated]
        for _ in range(NUM_TURNS):
            for way, times in spent.items():
                comm.barrier()
                start = time.perf_counter()
                way()
                comm.barrier()
                times.append(time.perf_counter() - start)
        return tuple(sorted(times)[NUM_TURNS // 2] for times in spent.values())  # type: ignore

    ours, theirs = run(2, program, backend="processes", is_measured=False).results[0]
    return [Row("ring on 2 processes, torch's: forward", ours * 1e3, theirs * 1e3, "ms")]


def _simulated() -> list[Row]:
    def program(comm: Comm) -> Tensor:
        return ring_attention(*_part(comm, "zigzag"), comm, Kernel(block_size=BLOCK))

    def ours() -> None:
        run(NUM_RANKS, program, is_measured=False)

    def alone() -> None:
        flash_attention(*_inputs(), is_causal=True, block_q=BLOCK, block_k=BLOCK)

    times = time_in_turns(ours, alone)
    return [Row("4 simulated ranks, the same tiles on one: forward", *times, "us")]
