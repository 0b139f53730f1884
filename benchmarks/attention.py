"""The reference's attention beside torch's, in the shapes of SmolLM2-135M: 9 heads, 3 KV, width 64.

The memory of the first rows is the T x T scores that a fused kernel never writes down: the gap
that FlashAttention closes. The last rows set the copy-free form of grouped-query attention against
repeated heads, ours against ours: a whole prompt at once, then one token against a cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Row, compare
from reference.attention import (
    FusedAttention,
    attention_backward,
    causal_mask,
    grouped_query_attention,
    scaled_dot_product_attention,
)

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64
SEQ_LEN, CACHED = 512, 4096


def rows() -> list[Row]:
    return [*_dot_product(), *_layer(), *_hand_backward(), *_sharing()]


def _dot_product() -> list[Row]:
    mask = causal_mask(SEQ_LEN)
    measured = []
    for name, kv_heads in (("MHA", NUM_HEADS), ("GQA", NUM_KV_HEADS)):
        q, k, v = _leaves(SEQ_LEN, SEQ_LEN, kv_heads)
        measured += compare(
            f"{name}, causal, {SEQ_LEN} tokens, against F.scaled_dot_product_attention",
            lambda q=q, k=k, v=v: grouped_query_attention(q, k, v, mask),
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ),
            (q, k, v),
        )
    return measured


def _layer() -> list[Row]:
    dim = NUM_HEADS * HEAD_DIM
    theirs = nn.MultiheadAttention(dim, NUM_HEADS, bias=False, batch_first=True)
    ours = FusedAttention(dim, num_heads=NUM_HEADS)
    ours.qkv_proj.weight, ours.o_proj.weight = theirs.in_proj_weight, theirs.out_proj.weight
    x = torch.randn(1, SEQ_LEN, dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
    parameters = (x, theirs.in_proj_weight, theirs.out_proj.weight)
    return compare(
        f"layer, {SEQ_LEN} tokens, against nn.MultiheadAttention",
        lambda: ours(x),
        lambda: theirs(x, x, x, need_weights=False)[0],
        parameters,
    )


def _hand_backward() -> list[Row]:
    q, k, v = _leaves(SEQ_LEN, SEQ_LEN, NUM_KV_HEADS)
    mask, grad_out = causal_mask(SEQ_LEN), torch.ones_like(q)

    def theirs() -> Tensor:
        with torch.enable_grad():
            out = scaled_dot_product_attention(q, k, v, mask)
            return torch.autograd.grad(out, (q, k, v), grad_out)[0]

    return compare(
        "gradients by hand, against autograd through ours",
        lambda: attention_backward(grad_out, q, k, v, mask)[0],
        theirs,
    )


def _sharing() -> list[Row]:
    measured = []
    for what, queries, keys in (("prompt", SEQ_LEN, SEQ_LEN), ("one token", 1, CACHED)):
        q, k, v = _leaves(queries, keys, NUM_KV_HEADS)
        measured += compare(
            f"GQA without a copy, {what} on {keys} keys, against repeat_kv",
            lambda q=q, k=k, v=v: grouped_query_attention(q, k, v),
            lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v),
            (q, k, v) if queries > 1 else (),
        )
    return measured


def _leaves(num_queries: int, num_keys: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, NUM_HEADS, num_queries, HEAD_DIM)] + 2 * [(1, num_kv_heads, num_keys, HEAD_DIM)]
    q, k, v = (torch.randn(s, generator=generator).requires_grad_() for s in shapes)
    return q, k, v
