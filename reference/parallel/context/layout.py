"""Which positions of a text a rank holds, and which of its queries see which keys.

Four ranks, sixteen positions, by the rank that holds each:

    contiguous   0000 1111 2222 3333
    zigzag       00 11 22 33 33 22 11 00
    striped      0123 0123 0123 0123

Without a mask all are alike. Under a causal mask a late query sees more keys than an early one:
contiguous parts give the last rank almost twice the mean work, and all others wait for it. Zigzag
gives each rank an early and a late part, striped every N-th position.

Papers: striped, Brandon et al., 2311.09431; 2 N parts, as in zigzag, Llama 3, 2407.21783, sec.
3.3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from reference.parallel.options import at_least, one_of

Layout = Literal["contiguous", "zigzag", "striped"]


class Stretch(NamedTuple):
    """The positions start, start + step, ...: `length` of them."""

    start: int
    step: int
    length: int


class Tile(NamedTuple):
    """Queries (rows) and keys (columns) of local tensors that meet. Where `is_causal`, the last
    query sees all these keys, and each one before it one fewer."""

    rows: slice
    columns: slice
    is_causal: bool


def stretches(layout: Layout, seq_len: int, rank: int, num_ranks: int) -> list[Stretch]:
    """What rank `rank` holds of `seq_len` positions, in the order of its local tensor.

    Raises: ValueError for an unknown layout, a text that does not divide, or a rank outside.
    """
    one_of("layout", layout, Layout)
    at_least(1, [("num_ranks", num_ranks)])
    at_least(0, [("seq_len", seq_len)])
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank: expected 0 to {num_ranks - 1}, got {rank}")
    num_parts = 2 * num_ranks if layout == "zigzag" and num_ranks > 1 else num_ranks
    if seq_len % num_parts:
        raise ValueError(
            f"seq_len: expected a multiple of {num_parts} for {num_ranks} ranks, {layout}; got "
            f"{seq_len}; pad the text"
        )
    size = seq_len // num_parts
    if layout == "striped":
        return [Stretch(rank, num_ranks, size)]
    parts = [rank] if num_parts == num_ranks else [rank, num_parts - 1 - rank]
    return [Stretch(part * size, 1, size) for part in parts]


def positions(layout: Layout, seq_len: int, rank: int, num_ranks: int) -> Int[Tensor, " t"]:
    """The positions of rank `rank`, in the order of its local tensor.

    Raises: as `stretches`.
    """
    held = stretches(layout, seq_len, rank, num_ranks)
    return torch.cat([torch.arange(s.length) * s.step + s.start for s in held])


def tiles(
    queries: Sequence[Stretch], keys: Sequence[Stretch], *, is_causal: bool
) -> Iterator[Tile]:
    """Which parts of two local tensors meet; what nobody may see is left out."""
    if not is_causal:
        rows, columns = (slice(0, sum(s.length for s in held)) for held in (queries, keys))
        yield Tile(rows, columns, False)
        return
    for row, query in zip(_offsets(queries), queries, strict=True):
        for column, key in zip(_offsets(keys), keys, strict=True):
            yield from _causal_tiles(row, query, column, key)


def causal_pairs(layout: Layout, seq_len: int, num_ranks: int) -> list[list[int]]:
    """Pairs of a query and a key that it sees: by rank, and by step of the ring.

    Raises: as `stretches`.
    """
    at_least(1, [("num_ranks", num_ranks)])
    held = [stretches(layout, seq_len, rank, num_ranks) for rank in range(num_ranks)]
    return [
        [
            sum(map(_num_pairs, tiles(held[rank], held[(rank - step) % num_ranks], is_causal=True)))
            for step in range(num_ranks)
        ]
        for rank in range(num_ranks)
    ]


def _causal_tiles(row: int, query: Stretch, column: int, key: Stretch) -> Iterator[Tile]:
    """Query a sees key b where b <= a + diagonal: rows that see some keys, rows that see all."""
    assert query.step == key.step, "stretches of one layout have one step"
    diagonal = (query.start - key.start) // query.step
    first, last = max(0, -diagonal), min(query.length, key.length - diagonal)
    if first < last:
        yield Tile(slice(row + first, row + last), slice(column, column + last + diagonal), True)
    first = max(0, key.length - diagonal)
    if first < query.length:
        rows = slice(row + first, row + query.length)
        yield Tile(rows, slice(column, column + key.length), False)


def _num_pairs(tile: Tile) -> int:
    rows, columns = (s.stop - s.start for s in (tile.rows, tile.columns))
    return rows * columns - (rows * (rows - 1) // 2 if tile.is_causal else 0)


def _offsets(held: Sequence[Stretch]) -> list[int]:
    return [0, *accumulate(s.length for s in held)][:-1]
