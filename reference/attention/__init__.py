"""Attention: every query takes an average of the values, weighted by how well the keys match it.

masks        who may look at whom, and how conditions combine
dot_product  softmax(q k^T / sqrt(d)) v, with few key/value heads shared by many query heads
weighted     sums that what lies behind a mask cannot reach
backward     its gradient, derived by hand
layer        the projections around it, as modules that take their cache and kernel as arguments
cost         bytes of a KV cache, FLOPs and reads
"""

from reference.attention.backward import AttentionFunction, attention_backward, softmax_backward
from reference.attention.cost import (
    attention_flops,
    decode_intensity,
    decode_reads,
    kv_cache_bytes,
    projection_flops,
)
from reference.attention.dot_product import (
    attention_weights,
    dropout,
    grouped_query_attention,
    masked_softmax,
    repeat_kv,
    scaled_dot_product_attention,
    single_head_attention,
)
from reference.attention.layer import Attention, FusedAttention, KVCache, merge_heads, split_heads
from reference.attention.masks import (
    additive_mask,
    causal_mask,
    document_mask,
    padding_mask,
    sliding_window_mask,
)
from reference.attention.weighted import mean_pool, weighted_sum

__all__ = [
    "Attention",
    "AttentionFunction",
    "FusedAttention",
    "KVCache",
    "additive_mask",
    "attention_backward",
    "attention_flops",
    "attention_weights",
    "causal_mask",
    "decode_intensity",
    "decode_reads",
    "document_mask",
    "dropout",
    "grouped_query_attention",
    "kv_cache_bytes",
    "masked_softmax",
    "mean_pool",
    "merge_heads",
    "padding_mask",
    "projection_flops",
    "repeat_kv",
    "scaled_dot_product_attention",
    "single_head_attention",
    "sliding_window_mask",
    "softmax_backward",
    "split_heads",
    "weighted_sum",
]
