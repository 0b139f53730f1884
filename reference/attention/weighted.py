"""Sums in which a weight of zero counts nothing, whatever it is multiplied with.

    out_t = sum over s with w_ts != 0 of w_ts v_s

Behind a mask the weight is exactly 0, and yet 0 * NaN = NaN and 0 * inf = NaN: one bad value in a
padded or reused slot would reach every query that must not see it. A product that comes out finite
had no such term, so that only the others are computed again.

Shapes: T queries, S keys, dv width of the values.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def weighted_sum(
    weights: Float[Tensor, "... T S"], values: Float[Tensor, "... S dv"]
) -> Float[Tensor, "... T dv"]:
    """weights @ values, in which values of weight zero do not count, NaN and inf among them.

    Gradients are those of the product, and flow past what does not count.
    """
    out = weights @ values
    if not _can_be_read(out) or is_finite(out):
        return out
    is_bad = ~values.isfinite()
    finite = weights @ values.masked_fill(is_bad, 0)
    is_reached = (weights != 0).to(out.dtype) @ is_bad.to(out.dtype) > 0
    return torch.where(is_reached, out.detach(), finite)


def mean_pool(
    x: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"] | Int[Tensor, "B S"]
) -> Float[Tensor, "B D"]:
    """The mean of the rows that the mask keeps (True or 1); zeros where it keeps none.

    Averaged in float32 at least, returned in the dtype of x. What is behind the mask does not
    count, NaN among it.
    """
    weights = mask.to(torch.promote_types(x.dtype, torch.float32))
    share = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
    return weighted_sum(share[:, None], x.to(share.dtype))[:, 0].to(x.dtype)


def is_finite(x: Float[Tensor, "..."]) -> bool:
    """Whether no element is NaN or inf; one pass where the sum says so already."""
    return bool(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()) or bool(
        x.isfinite().all()
    )


def _can_be_read(tensor: Tensor) -> bool:
    """Not on the meta device, nor while being traced."""
    return type(tensor) is Tensor and not (tensor.is_meta or torch.compiler.is_compiling())
