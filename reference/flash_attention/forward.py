"""FlashAttention forward: attention tile by tile, without ever holding T x S scores.

Outer loop over blocks of queries, inner over blocks of keys (the order of FlashAttention-2): a
block of queries keeps its maximum m, sum l and unnormalised output while keys stream past it.

    S = q k^T        m' = max(m, rowmax S)        P = exp(S - m')
    l <- l exp(m - m') + rowsum P                 O <- O exp(m - m') + P v
    at the end       O <- O / l                   lse = m + log l

Exact, not approximate: the same sums in another order. The result needs O(T) memory beyond its
inputs; `lse` is all that the backward pass needs of the softmax.

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, d head width.
Papers: FlashAttention, 2205.14135, alg. 1; FlashAttention-2, 2307.08691, alg. 1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reference.attention.dot_product import Mask
from reference.attention.weighted import weighted_sum
from reference.flash_attention.softmax import check_block_size, normalize, rescale, shift


@dataclass(frozen=True)
class Tiling:
    """Block sizes, and which keys a query may see.

    Causal masks are aligned at the bottom right, as a cache needs it: query t sees the keys up to
    S - T + t.

    Raises: ValueError for block sizes below 1.
    """

    num_queries: int
    num_keys: int
    block_q: int
    block_k: int
    is_causal: bool

    def __post_init__(self) -> None:
        check_block_size("block_q", self.block_q)
        check_block_size("block_k", self.block_k)

    @property
    def offset(self) -> int:
        return self.num_keys - self.num_queries

    def query_blocks(self) -> Iterator[slice]:
        for start in range(0, self.num_queries, self.block_q):
            yield slice(start, min(start + self.block_q, self.num_queries))

    def key_blocks(self, queries: slice) -> Iterator[slice]:
        """The key blocks of which some query of the block sees a part; the others are skipped."""
        end = self.num_keys
        if self.is_causal:
            end = min(end, max(0, self.offset + queries.stop))
        for start in range(0, end, self.block_k):
            yield slice(start, min(start + self.block_k, self.num_keys))

    def hidden(self, queries: slice, keys: slice, device: torch.device) -> Tensor | None:
        """True where a query must not see a key; None for a tile that it sees in full."""
        if not self.is_causal or keys.stop - 1 <= self.offset + queries.start:
            return None
        last_seen = torch.arange(queries.start, queries.stop, device=device) + self.offset
        return torch.arange(keys.start, keys.stop, device=device) > last_seen[:, None]


def flash_attention_forward(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S dv"],
    mask: Mask | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    block_q: int = 256,
    block_k: int = 256,
) -> tuple[Float[Tensor, "B H T dv"], Float[Tensor, "B H T"]]:
    """Output in the dtype of q, and log-sum-exp of the scores in float32 (float64 for float64).

    Half-precision tiles are widened one by one; sums are kept wide. A query that sees no key gets
    zeros and lse = -inf, and what it does not see does not reach it, be it NaN. Block sizes need
    not divide the lengths.

    Raises: ValueError for shapes or block sizes that do not fit, TypeError for unequal dtypes.
    """
    check_attention(q, k, v)
    tiling = Tiling(q.shape[2], k.shape[2], block_q, block_k, is_causal)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=wide)
    for queries in tiling.query_blocks():
        tile = q[:, :, queries].to(wide) * scale
        o, row_lse = _one_query_block(tile, k, v, mask, tiling, queries)
        out[:, :, queries], lse[:, :, queries] = o.to(out.dtype), row_lse
    return out, lse


def _one_query_block(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tiling: Tiling, queries: slice
) -> tuple[Tensor, Tensor]:
    """Stream the keys past one block of scaled, wide queries."""
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    q = fold(q, groups[0])  # (B, K, G * T', d)
    m = q.new_full(q.shape[:-1], -torch.inf)
    total = q.new_zeros(q.shape[:-1])
    out = q.new_zeros((*q.shape[:-1], v.shape[3]))
    for keys in tiling.key_blocks(queries):
        scores = tile_scores(q, k, mask, tiling, queries, keys)
        new_m = torch.maximum(m, scores.amax(-1))
        factor = rescale(m, new_m)
        terms = scores.sub_(shift(new_m)[..., None]).exp_()
        total.mul_(factor).add_(terms.sum(-1))
        out.mul_(factor[..., None]).add_(weighted_sum(terms, v[:, :, keys].to(q.dtype)))
        m = new_m
    out, lse = normalize(out, m, total)
    return unfold(out, groups), unfold(lse[..., None], groups)[..., 0]


def tile_scores(
    q: Tensor, k: Tensor, mask: Tensor | None, tiling: Tiling, queries: slice, keys: slice
) -> Tensor:
    """Scores of one tile, (B, K, G * T', S'), with -inf (or what an additive mask says) hidden."""
    scores = q @ k[:, :, keys].to(q.dtype).mT
    hidden = tiling.hidden(queries, keys, q.device)
    if hidden is None and mask is None:
        return scores
    groups = (k.shape[1], scores.shape[2] // (queries.stop - queries.start))
    tile = unfold(scores, groups)  # (B, H, T', S'), a view
    if hidden is not None:
        tile.masked_fill_(hidden, -torch.inf)
    if mask is not None:
        part = mask_tile(mask, queries, keys)
        is_seen = part if part.dtype == torch.bool else part != -torch.inf
        tile = tile if part.dtype == torch.bool else tile.add_(part)
        tile.masked_fill_(~is_seen, -torch.inf)  # also where a hidden key made it NaN
    return scores


def mask_tile(mask: Tensor, queries: slice, keys: slice) -> Tensor:
    """The part of a mask that lies on a tile; broadcast dimensions stay as they are."""
    if mask.ndim >= 2 and mask.shape[-2] != 1:
        mask = mask[..., queries, :]
    return mask[..., keys] if mask.shape[-1] != 1 else mask


def fold(x: Float[Tensor, "B H T d"], num_kv_heads: int) -> Float[Tensor, "B K GT d"]:
    """Lay the G query heads of a group under each other: they share one product with the keys."""
    return x.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)


def unfold(x: Tensor, groups: tuple[int, int]) -> Tensor:
    """The inverse of `fold`: (B, K, G * T, d) to (B, H, T, d)."""
    return x.unflatten(2, (groups[1], -1)).flatten(1, 2)


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse shapes and dtypes that do not fit."""
    if not (q.ndim == k.ndim == v.ndim == 4):
        got = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"q, k, v: expected (batch, heads, length, head_dim) each, got {got}")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k, v: expected one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or v.shape[:3] != k.shape[:3]:
        got = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"q, k, v: expected (B, H, T, d), (B, K, S, d), (B, K, S, dv), got {got}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: expected a number of heads that divides q's {q.shape[1]}, got {k.shape[1]}"
        )
