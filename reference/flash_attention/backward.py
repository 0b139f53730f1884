"""FlashAttention backward: the probabilities again, tile by tile, from q, k and the log-sum-exp.

Nothing quadratic is kept: P = exp(S - lse) is computed anew where it is needed. With dO the
gradient of the output and D = rowsum(dO * O), which equals rowsum(dP * P):

    dV = P^T dO        dP = dO V^T        dS = P * (dP - D)
    dQ = scale * dS K  dK = scale * dS^T Q

Five products a tile instead of the four of a backward pass that kept P: more FLOPs, less memory.

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, d head width.
Papers: FlashAttention, 2205.14135, alg. 4; FlashAttention-2, 2307.08691, alg. 2.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reference.attention.dot_product import Mask
from reference.flash_attention.forward import (
    Tiling,
    flash_attention_forward,
    fold,
    tile_scores,
    unfold,
)
from reference.flash_attention.softmax import shift


def flash_attention(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S dv"],
    mask: Mask | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    block_q: int = 256,
    block_k: int = 256,
) -> Float[Tensor, "B H T dv"]:
    """Exact attention in linear memory, differentiable in q, k and v (not in the mask).

    An `attend` of `reference.attention.Attention`. For long sequences prefer `is_causal` to a
    mask, which is itself quadratic; both may be given.

    Raises: ValueError for shapes or block sizes that do not fit or a mask that wants a gradient,
    TypeError for unequal dtypes.
    """
    if mask is not None and mask.requires_grad:
        raise ValueError("mask: expected no gradient, got requires_grad; use mask.detach()")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return FlashAttentionFunction.apply(q, k, v, mask, is_causal, scale, block_q, block_k)


class FlashAttentionFunction(torch.autograd.Function):
    """Keeps q, k, v, the output and one number a query: no probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
        block_q: int,
        block_k: int,
    ) -> Tensor:
        options: dict[str, Any] = dict(
            is_causal=is_causal, scale=scale, block_q=block_q, block_k=block_k
        )
        out, lse = flash_attention_forward(q, k, v, mask, **options)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.options = options
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, mask, out, lse = ctx.saved_tensors
        gradients = flash_attention_backward(grad, q, k, v, out, lse, mask, **ctx.options)
        return *gradients, None, None, None, None, None


def flash_attention_backward(
    grad: Float[Tensor, "B H T dv"],
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S dv"],
    out: Float[Tensor, "B H T dv"],
    lse: Float[Tensor, "B H T"],
    mask: Mask | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    block_q: int = 256,
    block_k: int = 256,
) -> tuple[
    Float[Tensor, "B H T d"],
    Float[Tensor, "B K S d"],
    Float[Tensor, "B K S dv"],
]:
    """Gradients of q, k, v, each in its dtype, summed in float32 at least.

    Key/value heads collect the gradients of all query heads that read them.
    """
    tiling = Tiling(q.shape[2], k.shape[2], block_q, block_k, is_causal)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    num_kv_heads, wide = k.shape[1], lse.dtype
    groups = (num_kv_heads, q.shape[1] // num_kv_heads)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=wide) for x in (k, v))
    for queries in tiling.query_blocks():
        tile, do, o = (fold(x[:, :, queries].to(wide), num_kv_heads) for x in (q, grad, out))
        tile = tile * scale
        d = (do * o).sum(-1, keepdim=True)
        row_lse = fold(shift(lse[:, :, queries])[..., None], num_kv_heads)
        dq_tile = torch.zeros_like(tile)
        for keys in tiling.key_blocks(queries):
            key, value = (finite(x[:, :, keys].to(wide)) for x in (k, v))
            p = tile_scores(tile, k, mask, tiling, queries, keys).sub_(row_lse).exp_()
            dv[:, :, keys] += p.mT @ do
            ds = (do @ value.mT).sub_(d).mul_(p)
            dq_tile += ds @ key
            dk[:, :, keys] += ds.mT @ tile
        dq[:, :, queries] = unfold(dq_tile * scale, groups).to(dq.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def finite(x: Tensor) -> Tensor:
    """NaN and inf as zeros: hidden, they count nothing; seen, they show in P or D all the same."""
    return x.nan_to_num(0.0, 0.0, 0.0)
