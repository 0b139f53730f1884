"""FlashAttention: exact attention that never holds the T x S scores.

softmax        overflow, safe, online, one pass; merging partial results
forward        tiles, running maximum and sum, log-sum-exp
backward       recomputation from the log-sum-exp; the autograd function
decoding       split-K, and over a paged cache
io_model       bytes between a small and a large memory, counted
accesses       loads and stores of softmax, counted
triton_kernel  the same loops for a GPU (imported by name: it needs Triton)
"""

from reference.flash_attention.backward import flash_attention, flash_attention_backward
from reference.flash_attention.decoding import paged_attention, split_k_attention
from reference.flash_attention.forward import flash_attention_forward
from reference.flash_attention.io_model import (
    TwoLevelMemory,
    flash2_elements,
    flash2_forward,
    flash_elements,
    flash_forward,
    standard_elements,
    standard_forward,
    tile_sizes,
)
from reference.flash_attention.softmax import (
    merge,
    naive_softmax,
    online_normalizer,
    online_softmax,
    online_weighted_sum,
    safe_softmax,
)

__all__ = [
    "TwoLevelMemory",
    "flash2_elements",
    "flash2_forward",
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_forward",
    "flash_elements",
    "flash_forward",
    "merge",
    "naive_softmax",
    "online_normalizer",
    "online_softmax",
    "online_weighted_sum",
    "paged_attention",
    "safe_softmax",
    "split_k_attention",
    "standard_elements",
    "standard_forward",
    "tile_sizes",
]
