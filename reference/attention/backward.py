"""The gradient of attention, derived by hand.

With P = softmax(s q k^T + mask), O = P v and the gradient dO of the output:

    dv = P^T dO        dP = dO v^T        dZ = P * (dP - rowsum(P * dP))
    dq = s dZ k        dk = s dZ^T q

A masked position has P = 0, hence dZ = 0: masks need no case of their own, empty rows included.
rowsum(P * dP) = rowsum(dO * O), the identity that lets FlashAttention work tile by tile.

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, d head width.
Paper: FlashAttention, arXiv 2205.14135, App. B.2.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reference.attention.dot_product import (
    Mask,
    attention_weights,
    check_queries,
    check_values,
    repeat_kv,
    scaled_dot_product_attention,
)


def attention_backward(
    grad_out: Float[Tensor, "B H T dv"],
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S dv"],
    mask: Mask | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H T d"], Float[Tensor, "B K S d"], Float[Tensor, "B K S dv"]]:
    """The gradients of q, k and v. A shared key/value head sums over the query heads it serves.

    P is computed again rather than kept; all products in the inputs' dtype. A mask gets none.

    Raises: as `scaled_dot_product_attention`; ValueError for a grad_out not shaped as the output.
    Source: arXiv 2205.14135, App. B.2.
    """
    scale = check_queries(q, k, mask, scale)
    check_values(k, v)
    expected = (*q.shape[:3], v.shape[3])
    if grad_out.shape != expected:
        raise ValueError(
            f"grad_out: expected shape {expected}, got {tuple(grad_out.shape)}; "
            "it is the gradient of the output"
        )
    group_size = q.shape[1] // k.shape[1]
    weights = attention_weights(q, k, mask, scale=scale)
    grad_v = weights.mT @ grad_out
    grad_weights = grad_out @ repeat_kv(v, group_size).mT
    grad_scores = softmax_backward(grad_weights, weights) * scale
    grad_q = grad_scores @ repeat_kv(k, group_size)
    grad_k = grad_scores.mT @ q
    return grad_q, _sum_groups(grad_k, group_size), _sum_groups(grad_v, group_size)


def softmax_backward(
    grad_weights: Float[Tensor, "... T S"], weights: Float[Tensor, "... T S"]
) -> Float[Tensor, "... T S"]:
    """The gradient of the scores: each row loses its mean, taken by the row's own probabilities."""
    mean = (grad_weights * weights).sum(-1, keepdim=True)
    return weights * (grad_weights - mean)


class AttentionFunction(torch.autograd.Function):
    """`scaled_dot_product_attention(q, k, v, mask)` whose backward is `attention_backward`.

    Differentiable twice. Call .apply(q, k, v, mask), with None for no mask.

    Raises: as `scaled_dot_product_attention`; in backward, ValueError where the mask wants a
    gradient, as a learned bias does.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        return scaled_dot_product_attention(q, k, v, mask)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.needs_input_grad[3]:
            raise ValueError(
                "mask: expected none that wants a gradient, since this backward has none for it; "
                "pass mask.detach(), or use scaled_dot_product_attention under autograd"
            )
        q, k, v, mask = ctx.saved_tensors
        return (*attention_backward(grad_outputs[0], q, k, v, mask), None)


def _sum_groups(x: Float[Tensor, "B H S d"], group_size: int) -> Float[Tensor, "B K S d"]:
    return x.unflatten(1, (x.shape[1] // group_size, group_size)).sum(2)
