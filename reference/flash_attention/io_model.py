"""A machine with two memories, and what attention moves between them.

HBM is large and slow, SRAM small and fast. `TwoLevelMemory` lets an algorithm compute only on what
it has read into SRAM, refuses to hold more than fits, and counts the bytes that cross. The
algorithms below really compute, so that a count cannot be bought with a wrong result.

    standard, forward   4 N^2 + 4 N d elements a head: S written, S read, P written, P read
    FlashAttention      2 N d + (N / Bc) 3 N d: once through q and O for each block of Bc keys,
                        and Bc grows with SRAM: Theta(N^2 d^2 / M)

"Standard" is counted generously: each matrix product reads its factors once.

Shapes: one head, N queries and keys, d head width; Br, Bc rows and columns of a tile.
Source: FlashAttention, arXiv 2205.14135, alg. 0, 1, 3, 4 and theorem 2.
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class TwoLevelMemory:
    """Counts bytes read from and written to HBM; holds at most `sram_bytes` at a time."""

    sram_bytes: float | int = math.inf
    element_bytes: int = 2
    read_bytes: int = 0
    written_bytes: int = 0
    peak_bytes: int = 0
    held: dict[int, Tensor] = field(default_factory=dict)

    @property
    def traffic_bytes(self) -> int:
        return self.read_bytes + self.written_bytes

    def read(self, x: Tensor) -> Tensor:
        """A copy of x in SRAM.

        Raises: MemoryError where SRAM is full.
        """
        self.read_bytes += x.numel() * self.element_bytes
        return self.hold(x.clone())

    def write(self, target: Tensor, x: Tensor) -> None:
        """Copy x from SRAM to its place in HBM."""
        self.written_bytes += x.numel() * self.element_bytes
        target.copy_(x)

    def hold(self, x: Tensor) -> Tensor:
        """Keep a result in SRAM.

        Raises: MemoryError where SRAM is full.
        """
        self.held[id(x)] = x
        held_bytes = sum(t.numel() for t in self.held.values()) * self.element_bytes
        self.peak_bytes = max(self.peak_bytes, held_bytes)
        if held_bytes > self.sram_bytes:
            raise MemoryError(
                f"SRAM: expected at most {self.sram_bytes} bytes, got {held_bytes}; "
                "smaller tiles fit"
            )
        return x

    def free(self, *tensors: Tensor) -> None:
        for x in tensors:
            self.held.pop(id(x), None)


def tile_sizes(sram_bytes: int, head_dim: int, *, element_bytes: int = 2) -> tuple[int, int]:
    """Br and Bc of the paper for an SRAM of M elements: Bc = M / 4d, Br at most d.

    Raises: ValueError where not even one key fits.
    Source: arXiv 2205.14135, alg. 1, line 1 (floor in place of ceiling: it must fit).
    """
    block_k = sram_bytes // element_bytes // (4 * head_dim)
    if block_k < 1:
        raise ValueError(
            f"sram_bytes: expected at least {4 * head_dim * element_bytes} for head_dim="
            f"{head_dim}, got {sram_bytes}"
        )
    return min(block_k, head_dim), block_k


def standard_forward(
    memory: TwoLevelMemory, q: Float[Tensor, "N d"], k: Float[Tensor, "N d"], v: Tensor
) -> Float[Tensor, "N d"]:
    """Three kernels with all of S and P in HBM between them. SRAM is taken as large enough."""
    scores, weights, out = q.new_empty(len(q), len(k)), q.new_empty(len(q), len(k)), q.clone()
    memory.write(scores, memory.read(q) @ memory.read(k).T / math.sqrt(q.shape[1]))
    memory.held.clear()
    memory.write(weights, memory.read(scores).softmax(-1))
    memory.held.clear()
    memory.write(out, memory.read(weights) @ memory.read(v))
    memory.held.clear()
    return out


def flash_forward(
    memory: TwoLevelMemory,
    q: Float[Tensor, "N d"],
    k: Float[Tensor, "N d"],
    v: Float[Tensor, "N d"],
    *,
    block_q: int,
    block_k: int,
) -> Float[Tensor, "N d"]:
    """FlashAttention's own order: keys outside, queries inside; O, l, m travel to and fro."""
    out, m, total = torch.zeros_like(q), q.new_full((len(q), 1), -torch.inf), q.new_zeros(len(q), 1)
    for keys in range(0, len(k), block_k):
        kj, vj = memory.read(k[keys : keys + block_k]), memory.read(v[keys : keys + block_k])
        for rows in range(0, len(q), block_q):
            here = slice(rows, rows + block_q)
            qi, oi, mi, li = (memory.read(x[here]) for x in (q, out, m, total))
            scores = memory.hold(qi @ kj.T / math.sqrt(q.shape[1]))
            new_m = torch.maximum(mi, scores.amax(1, keepdim=True))
            p, factor = (scores - new_m).exp(), (mi - new_m).exp()
            new_l = li * factor + p.sum(1, keepdim=True)
            memory.write(out[here], (oi * li * factor + p @ vj) / new_l)
            memory.write(m[here], new_m)
            memory.write(total[here], new_l)
            memory.free(qi, oi, mi, li, scores)
        memory.free(kj, vj)
    return out


def flash2_forward(
    memory: TwoLevelMemory,
    q: Float[Tensor, "N d"],
    k: Float[Tensor, "N d"],
    v: Float[Tensor, "N d"],
    *,
    block_q: int,
    block_k: int,
) -> Float[Tensor, "N d"]:
    """FlashAttention-2's order: queries outside; O is written once, keys are read again.

    Source: arXiv 2307.08691, alg. 1.
    """
    out, lse = torch.zeros_like(q), q.new_zeros(len(q), 1)
    for rows in range(0, len(q), block_q):
        here = slice(rows, rows + block_q)
        qi = memory.read(q[here])
        oi = memory.hold(torch.zeros_like(qi))
        m, total = q.new_full((len(qi), 1), -torch.inf), q.new_zeros(len(qi), 1)
        for keys in range(0, len(k), block_k):
            kj, vj = memory.read(k[keys : keys + block_k]), memory.read(v[keys : keys + block_k])
            scores = memory.hold(qi @ kj.T / math.sqrt(q.shape[1]))
            new_m = torch.maximum(m, scores.amax(1, keepdim=True))
            p, factor = (scores - new_m).exp(), (m - new_m).exp()
            total, m = total * factor + p.sum(1, keepdim=True), new_m
            oi.mul_(factor).add_(p @ vj)
            memory.free(kj, vj, scores)
        memory.write(out[here], oi / total)
        memory.write(lse[here], m + total.log())
        memory.free(qi, oi)
    return out


def standard_elements(seq_len: int, head_dim: int, *, backward: bool = False) -> int:
    """Elements that cross for one head: 4 N^2 + 4 N d forward, 7 N^2 + 8 N d backward.

    Backward: dV = P^T dO, dP = dO V^T, dS from P and dP, dQ = dS K, dK = dS^T Q; each product
    reads its factors and writes its result once.
    """
    square, row = (7, 8) if backward else (4, 4)
    return square * seq_len**2 + row * seq_len * head_dim


def flash_elements(seq_len: int, head_dim: int, block_k: int, *, backward: bool = False) -> int:
    """Elements that cross for one head in FlashAttention's order, statistics included.

    Forward, for each block of keys: q, O, l, m read, O, l, m written. Backward: q, O, dO, dQ, l, m
    read and dQ written for each; k, v read and dK, dV written once.
    """
    passes = -(-seq_len // block_k)
    if backward:
        return 4 * seq_len * head_dim + passes * seq_len * (5 * head_dim + 2)
    return 2 * seq_len * head_dim + passes * seq_len * (3 * head_dim + 4)


def flash2_elements(seq_len: int, head_dim: int, block_q: int) -> int:
    """Elements that cross for one head in FlashAttention-2's order, forward."""
    passes = -(-seq_len // block_q)
    return seq_len * (2 * head_dim + 1) + passes * 2 * seq_len * head_dim
