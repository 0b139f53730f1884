"""Scaled dot-product attention: softmax(q k^T / sqrt(d)) v.

Unit-variance q and k have products of variance d; dividing by sqrt(d) brings the scores back to
variance 1, where the softmax still listens to all keys. Fewer key/value heads than query heads
(K < H) serve G = H / K query heads each: query head h reads key/value head h // G.

    P = softmax(q k^T / sqrt(d) + mask)        O = dropout(P) v

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, d head width.
Papers: Attention is all you need (MHA), 1706.03762, eq. 1; MQA, 1911.02150; GQA, 2305.13245.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reference.attention.weighted import weighted_sum

# True (or 0) where a query sees a key; broadcasts to (B, H, T, S).
Mask = Bool[Tensor, "..."] | Float[Tensor, "..."]


def scaled_dot_product_attention(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S dv"],
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B H T dv"]:
    """Average `v` by the softmax of the scaled products of `q` and `k`.

    Key/value heads are repeated for the query heads that share them. A query that sees no key gets
    zeros, and what it does not see does not reach it, be it NaN. Products and result in the dtype
    of `q` (under autocast in autocast's, as torch's own); the softmax in float32 at least. In
    float16 the product overflows at 65504 before it is scaled: for inputs so large pass `q * s` and
    `scale=1`.

    Raises: ValueError for shapes that do not fit, TypeError for unequal or integer dtypes.
    Source: arXiv 1706.03762, eq. 1.
    """
    weights = attention_weights(q, k, mask, scale=scale)
    check_values(k, v)
    weights = dropout(weights, dropout_rate, generator)
    return weighted_sum(weights, repeat_kv(v, q.shape[1] // v.shape[1]))


def single_head_attention(
    q: Float[Tensor, "*B T d"],
    k: Float[Tensor, "*B S d"],
    v: Float[Tensor, "*B S dv"],
    mask: Mask | None = None,
    *,
    scale: float | None = None,
) -> Float[Tensor, "*B T dv"]:
    """The same without a dimension for heads: any dimensions, or none, before length and width.

    The mask broadcasts to (*B, T, S).

    Raises: as `scaled_dot_product_attention`.
    Source: arXiv 1706.03762, eq. 1.
    """
    if q.ndim < 2 or q.shape[:-2] != k.shape[:-2]:
        raise ValueError(
            f"q, k: expected (..., length, width) alike in front, got {tuple(q.shape)} and "
            f"{tuple(k.shape)}"
        )
    batch = q.shape[:-2]
    if mask is not None and mask.ndim > 2:
        mask = mask.expand(*batch, *mask.shape[-2:]).flatten(0, -3)[:, None]
    q, k, v = (x.reshape(-1, 1, *x.shape[-2:]) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return out.view(*batch, *out.shape[-2:])


def grouped_query_attention(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S dv"],
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B H T dv"]:
    """The same function without a copy of k and v: the G queries of a group share one product.

    Grouping the query heads instead of repeating the key/value heads leaves a cache where it is:
    each key is read once for G queries, which is the point of having few of them.

    Raises: as `scaled_dot_product_attention`.
    Source: arXiv 2305.13245, sec. 2.2.
    """
    scale = check_queries(q, k, mask, scale)
    check_values(k, v)
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    groups = (num_kv_heads, num_heads // num_kv_heads)
    scores = torch.einsum("bkgtd,bksd->bkgts", q.unflatten(1, groups), k) * scale
    weights = masked_softmax(scores.flatten(1, 2), mask)  # (B, H, T, S)
    weights = dropout(weights, dropout_rate, generator).unflatten(1, groups)
    rows = weighted_sum(weights.flatten(2, 3), v)  # (B, K, G * T, dv)
    return rows.unflatten(2, weights.shape[2:4]).flatten(1, 2)


def attention_weights(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    mask: Mask | None = None,
    *,
    scale: float | None = None,
) -> Float[Tensor, "B H T S"]:
    """The probabilities P alone: what an attention map shows.

    Raises: as `scaled_dot_product_attention`.
    """
    scale = check_queries(q, k, mask, scale)
    k = repeat_kv(k, q.shape[1] // k.shape[1])
    return masked_softmax(q @ k.mT * scale, mask)


def masked_softmax(
    scores: Float[Tensor, "... T S"], mask: Mask | None = None
) -> Float[Tensor, "... T S"]:
    """Softmax over the keys that the mask leaves; zeros, also as gradient, where it leaves none.

    Computed in float32 (float64 for float64 scores), returned in the dtype of `scores`.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is None:
        return wide.softmax(-1).to(scores.dtype)
    is_seen = mask if mask.dtype == torch.bool else mask != -torch.inf
    is_empty = ~is_seen.any(-1, keepdim=True)
    if mask.dtype != torch.bool:
        wide = wide + mask
    # An empty row is all zeros for a moment: softmax of -inf alone is NaN, in backward as well.
    # Hidden scores are replaced and not added to, since NaN - inf is NaN.
    hidden = wide.new_zeros(is_empty.shape).masked_fill(~is_empty, -torch.inf)
    wide = torch.where(is_seen, wide, hidden)
    return wide.softmax(-1).masked_fill(is_empty, 0).to(scores.dtype)


def dropout(
    x: Float[Tensor, "..."], rate: float, generator: torch.Generator | None = None
) -> Float[Tensor, "..."]:
    """Zero elements at random, whatever their sign, with probability `rate`; scale up the rest.

    Raises: ValueError for a rate outside [0, 1).
    Source: Srivastava et al. 2014, JMLR 15, sec. 4 and 10 (inverted scaling).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate: expected a probability in [0, 1), got {rate}")
    if rate == 0:
        return x
    is_kept = torch.rand(x.shape, generator=generator, device=x.device) >= rate
    return x * is_kept / (1 - rate)


def repeat_kv(x: Float[Tensor, "B K S d"], group_size: int) -> Float[Tensor, "B H S d"]:
    """Give each of G query heads in a group its own copy: heads 0 0 0 1 1 1 ..., not 0 1 0 1 0 1.

    Raises: ValueError for a group size below 1.
    """
    if group_size < 1:
        raise ValueError(
            f"group_size: expected at least 1, got {group_size}; it is num_heads // num_kv_heads"
        )
    return x if group_size == 1 else x.repeat_interleave(group_size, dim=1)


def check_queries(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> float:
    """Refuse queries, keys and masks that do not fit; return the scale to use."""
    if q.ndim != 4 or k.ndim != 4:
        got = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(
            f"q, k: expected (batch, heads, length, head_dim), got {got}; split_heads makes it"
        )
    if not q.is_floating_point() or q.dtype != k.dtype:
        raise TypeError(f"k: expected the floating dtype of q, got {q.dtype} and {k.dtype}")
    batch, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1], k.shape[2]
    if k.shape[0] != batch or k.shape[3] != head_dim:
        expected = (batch, "K", "S", head_dim)
        raise ValueError(f"k: expected shape {expected} to fit q, got {tuple(k.shape)}")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"k: expected a number of heads that divides q's {num_heads}, got {num_kv_heads}"
        )
    _check_mask(mask, (batch, num_heads, num_queries, num_keys))
    return 1 / math.sqrt(head_dim) if scale is None else scale


def _check_mask(mask: Tensor | None, scores_shape: tuple[int, ...]) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"mask: expected torch.bool or a floating dtype, got {mask.dtype}; "
            "for ones and zeros write mask.bool()"
        )
    fits = mask.ndim <= 4 and all(
        m in (1, s) for m, s in zip(reversed(mask.shape), reversed(scores_shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"mask: expected a shape that broadcasts to {scores_shape}, got {tuple(mask.shape)}; "
            "its last two dimensions are queries and keys"
        )


def check_values(k: Tensor, v: Tensor) -> None:
    """Refuse values that do not fit the keys."""
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        expected = (*k.shape[:3], "dv")
        raise ValueError(f"v: expected shape {expected} to fit k, got {tuple(v.shape)}")
    if v.dtype != k.dtype:
        raise TypeError(f"v: expected {k.dtype} as k, got {v.dtype}; cast one of them")
