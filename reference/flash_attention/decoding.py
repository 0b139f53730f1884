"""Split-K decoding: one query, many keys, and the keys shared out among workers.

While a model generates, T = 1: there are no blocks of queries to work on side by side. Flash-
Decoding cuts the *keys* into parts instead; each part gives an output and a log-sum-exp, and
`merge` joins them exactly. The same reduction reads a paged cache, whose blocks lie anywhere.

Shapes: B batch, S keys, H query heads, K key/value heads, d head width, N blocks of a paged
cache, P parts.
Sources: Dao et al., "Flash-Decoding for long-context inference", 2023 (blog); paged layout,
vLLM, arXiv 2309.06180, sec. 4.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reference.flash_attention.forward import flash_attention_forward
from reference.flash_attention.softmax import check_block_size, merge


def split_k_attention(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S dv"],
    *,
    num_splits: int,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H T dv"], Float[Tensor, "B H T"]]:
    """Attention to all keys, as `num_splits` independent parts that are merged at the end.

    Splits beyond the number of keys stay empty. Output in the dtype of q, log-sum-exp wide.

    Raises: ValueError for num_splits below 1 and for shapes that do not fit.
    """
    check_block_size("num_splits", num_splits)
    num_splits = min(num_splits, max(1, k.shape[2]))
    parts = [
        flash_attention_forward(q, k_part, v_part, scale=scale)
        for k_part, v_part in zip(
            k.tensor_split(num_splits, 2), v.tensor_split(num_splits, 2), strict=True
        )
    ]
    out, lse = merge(
        torch.stack([o.to(part_lse.dtype) for o, part_lse in parts]),
        torch.stack([part_lse for _, part_lse in parts]),
    )
    return out.to(q.dtype), lse


def paged_attention(
    q: Float[Tensor, "B H 1 d"],
    key_blocks: Float[Tensor, "N block K d"],
    value_blocks: Float[Tensor, "N block K dv"],
    block_table: Int[Tensor, "B M"],
    num_tokens: Int[Tensor, " B"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "B H 1 dv"]:
    """One query a sequence over keys that lie in blocks: column j of the table at a time.

    `block_table[b, j]` is the block of sequence b's tokens j * block ... ; entries beyond
    `num_tokens[b]` are not read. Nothing contiguous is made of the cache.

    Raises: ValueError for a table that is too short or names blocks that are not there.
    Source: vLLM, arXiv 2309.06180, sec. 4.1.
    """
    block_size = key_blocks.shape[1]
    _check_table(block_table, num_tokens, block_size, len(key_blocks))
    outs, lses = [], []
    for j in range(-(-int(num_tokens.max()) // block_size)):
        held = (num_tokens - j * block_size).clamp(0, block_size)  # tokens in block j of each
        where = block_table[:, j].masked_fill(held == 0, 0)
        is_token = torch.arange(block_size, device=q.device) < held[:, None]
        out, lse = flash_attention_forward(
            q,
            key_blocks[where].transpose(1, 2),  # (B, K, block, d)
            value_blocks[where].transpose(1, 2),
            is_token[:, None, None],
            scale=scale,
        )
        outs.append(out.to(lse.dtype))
        lses.append(lse)
    joined, _ = merge(torch.stack(outs), torch.stack(lses))
    return joined.to(q.dtype)


def _check_table(table: Tensor, num_tokens: Tensor, block_size: int, num_blocks: int) -> None:
    if num_tokens.numel() == 0 or int(num_tokens.min()) < 1:
        raise ValueError("num_tokens: expected at least one token in each sequence")
    needed = -(-int(num_tokens.max()) // block_size)
    if table.shape[1] < needed:
        raise ValueError(
            f"block_table: expected {needed} columns for {int(num_tokens.max())} tokens in blocks "
            f"of {block_size}, got {table.shape[1]}"
        )
    is_used = torch.arange(table.shape[1], device=table.device) * block_size < num_tokens[:, None]
    used = table[is_used]
    if int(used.min()) < 0 or int(used.max()) >= num_blocks:
        raise ValueError(
            f"block_table: expected blocks from 0 to {num_blocks - 1}, "
            f"got {int(used.min())} to {int(used.max())}"
        )
