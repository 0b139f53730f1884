"""torch's fused attention as a kernel for `Llama(..., attend=fused_causal_attention)`.

It never writes the T x T scores down, and skips the half that the causal mask hides; chapter 07
builds such a kernel. Equal to the eager one but for rounding.

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, d head width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reference.attention.dot_product import Mask, scaled_dot_product_attention
from reference.attention.weighted import is_finite
from reference.transformer.token_ids import has_values


def fused_causal_attention(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S d"],
    mask: Mask | None = None,
) -> Float[Tensor, "B H T d"]:
    """Attention by F.scaled_dot_product_attention; in and out as `scaled_dot_product_attention`.

    Where the mask is the causal one of a whole text, (T, T), the kernel skips what it hides; every
    other mask, such as a sliding window, is read. Without a mask every query sees every key. Where
    the kernel's result is not finite the eager one decides: behind a mask, torch's 0 * NaN is NaN.
    """
    is_causal = mask is not None and _is_causal(mask, q.shape[2])
    out = F.scaled_dot_product_attention(
        q, k, v, None if is_causal else mask, is_causal=is_causal, enable_gqa=True
    )
    if mask is None or not has_values(out) or is_finite(out):
        return out
    return scaled_dot_product_attention(q, k, v, mask)


def _is_causal(mask: Tensor, num_queries: int) -> bool:
    """Whether a mask is `causal_mask(T)`; one whose values cannot be looked at is not taken so."""
    if mask.shape != (num_queries, num_queries) or mask.dtype != torch.bool:
        return False
    return has_values(mask) and torch.equal(mask, torch.ones_like(mask).tril_())
