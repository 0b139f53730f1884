"""torch's fused attention as a kernel for `Llama(..., attend=fused_causal_attention)`.

It never writes the T x T scores down, and skips the half that the causal mask hides; chapter 07
builds such a kernel. Equal to the eager one but for rounding.

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, d head width.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reference.attention.dot_product import Mask


def fused_causal_attention(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S d"],
    mask: Mask | None = None,
) -> Float[Tensor, "B H T d"]:
    """Attention by F.scaled_dot_product_attention; in and out as `scaled_dot_product_attention`.

    A mask of shape (T, T) is taken to be the causal one, and is not read: so the kernel can skip
    what it hides. Every other shape is read: of padded texts, (B, 1, T, T), or of a chunk behind a
    cache, (T, S). A (T, T) mask that is not causal, such as a sliding window, belongs to another
    kernel. Without a mask every query sees every key.
    """
    is_square = mask is not None and mask.shape == (q.shape[2], q.shape[2])
    return F.scaled_dot_product_attention(
        q, k, v, None if is_square else mask, is_causal=is_square, enable_gqa=True
    )
