"""Tiled attention in plain PyTorch beside torch's fused kernel; memory beside the naive form.

4 heads of 64, causal and not, at 4,096 tokens; and one head's peak memory from 1k to 16k tokens,
where "theirs" is the naive form (up to 4k) or, for the growth, the same form at half the length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Row, compare, peak_bytes
from reference.attention import causal_mask, scaled_dot_product_attention
from reference.flash_attention import flash_attention, split_k_attention

NUM_TOKENS, NUM_HEADS, HEAD_DIM = 4096, 4, 64


def rows() -> list[Row]:
    return [*_speed(), *_decode(), *_memory()]


def _inputs(num_heads: int, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, num_heads, n, HEAD_DIM, generator=generator).requires_grad_()
        for n in (num_queries, num_keys, num_keys)
    )
    return q, k, v


def _speed() -> list[Row]:
    measured = []
    q, k, v = _inputs(NUM_HEADS, NUM_TOKENS, NUM_TOKENS)
    for is_causal in (False, True):
        name = f"{NUM_TOKENS} tokens, {'causal' if is_causal else 'no mask'} / torch's kernel"
        measured += compare(
            name,
            lambda c=is_causal: flash_attention(q, k, v, is_causal=c),
            lambda c=is_causal: F.scaled_dot_product_attention(q, k, v, is_causal=c),
            (q, k, v),
        )
    return measured


def _decode() -> list[Row]:
    with torch.no_grad():
        q, k, v = _inputs(NUM_HEADS, 1, NUM_TOKENS)
        return compare(
            "one query, 8 splits / torch's kernel",
            lambda: split_k_attention(q, k, v, num_splits=8)[0],
            lambda: F.scaled_dot_product_attention(q, k, v),
        )


def _memory() -> list[Row]:
    measured, last = [], 0
    for num_tokens in (1024, 2048, 4096, 8192, 16384):
        with torch.no_grad():
            q, k, v = _inputs(1, num_tokens, num_tokens)
            tiles = peak_bytes(lambda x=(q, k, v): flash_attention(*x, is_causal=True))
            if num_tokens <= 4096:
                mask = causal_mask(num_tokens)
                naive = peak_bytes(lambda x=(q, k, v), m=mask: scaled_dot_product_attention(*x, m))
                measured.append(
                    Row(f"{num_tokens} tokens: peak memory / naive", tiles, naive, "bytes")
                )
        if last:
            what = f"{num_tokens} tokens: peak memory / at half the length"
            measured.append(Row(what, tiles, last, "bytes"))
        last = tiles
    return measured
