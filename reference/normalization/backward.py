"""The gradients of LayerNorm and RMSNorm, by hand.

Write x^ for the normalised token and g = weight * dL/dy. A normaliser forgets the scale of x, so
its gradient holds nothing along x^; LayerNorm forgets the mean too, so nothing along (1, ..., 1):

    LayerNorm   dL/dx = rstd * (g - mean(g) - x^ * mean(g x^))
    RMSNorm     dL/dx = rstd * (g           - x^ * mean(g x^))
    dL/dweight = sum over tokens of dL/dy x^        dL/dbias = sum over tokens of dL/dy

Autograd through the forward formulas keeps each intermediate. The functions at the end keep x and
one or two numbers a token, as torch's own kernels do.

Shapes: D model width; everything before it is batch.
Papers: LayerNorm, 1607.06450, eq. 4, differentiated; RMSNorm, 1910.07467, sec. 4.2.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from reference.normalization.per_token import (
    centre,
    check_features,
    rms_norm_statistic,
    scale_and_shift,
    wide_dtype,
)


def layer_norm_backward(
    grad_output: Float[Tensor, "... D"],
    x: Float[Tensor, "... D"],
    weight: Float[Tensor, " D"] | None,
    mean: Float[Tensor, "... 1"],
    rstd: Float[Tensor, "... 1"],
) -> tuple[Float[Tensor, "... D"], Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Gradients for x, weight and bias, from the two statistics that forward kept.

    Computed in float32 at least, under autocast too. The first has the dtype of `x`, the others
    that of `weight` (of `x` without one): they are what a weight of ones and a bias of zeros would
    receive.

    Raises: ValueError for shapes that do not fit, TypeError for an integer `x`.
    Source: arXiv 1607.06450, eq. 4, differentiated.
    """
    _check_shapes(x, weight, grad_output=grad_output, mean=mean, rstd=rstd)
    wide = wide_dtype(x)
    grad, normalised = grad_output.to(wide), (x.to(wide) - mean).mul_(rstd)
    product = grad * normalised
    grad_weight, grad_bias = _over_tokens(product), _over_tokens(grad)
    g, gx = _weighted(grad, product, weight)
    g = g - g.mean(-1, keepdim=True)
    grad_x = g.addcmul_(normalised, gx.mean(-1, keepdim=True), value=-1).mul_(rstd)
    dtype = x.dtype if weight is None else weight.dtype
    return grad_x.to(x.dtype), grad_weight.to(dtype), grad_bias.to(dtype)


def rms_norm_backward(
    grad_output: Float[Tensor, "... D"],
    x: Float[Tensor, "... D"],
    weight: Float[Tensor, " D"] | None,
    rstd: Float[Tensor, "... 1"],
) -> tuple[Float[Tensor, "... D"], Float[Tensor, " D"]]:
    """Gradients for x and weight, from the one statistic that forward kept.

    Dtypes as `layer_norm_backward`. In half precision the forward rounds the quotient before the
    weight; the gradient takes that rounding for the identity, and x / rms unrounded.

    Raises: ValueError for shapes that do not fit, TypeError for an integer `x`.
    Source: arXiv 1910.07467, sec. 4.2.
    """
    _check_shapes(x, weight, grad_output=grad_output, rstd=rstd)
    wide = wide_dtype(x)
    grad, normalised = grad_output.to(wide), x.to(wide) * rstd
    product = grad * normalised
    grad_weight = _over_tokens(product)
    g, gx = _weighted(grad, product, weight)
    grad_x = torch.addcmul(g, normalised, gx.mean(-1, keepdim=True), value=-1).mul_(rstd)
    dtype = x.dtype if weight is None else weight.dtype
    return grad_x.to(x.dtype), grad_weight.to(dtype)


class LayerNormFunction(torch.autograd.Function):
    """`layer_norm` that keeps x, mean and rstd alone: call .apply(x, weight, bias, eps).

    Differentiable once; torch refuses the second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        check_features(x, weight=weight, bias=bias)
        centred, mean, rstd = centre(x, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return scale_and_shift(centred * rstd, weight, bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = layer_norm_backward(grad_output, x, weight, mean, rstd)
        return (
            grad_x,
            None if weight is None else grad_weight,
            None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
            None,
        )


class RMSNormFunction(torch.autograd.Function):
    """`rms_norm` that keeps x and rstd alone: call .apply(x, weight, eps).

    Differentiable once; torch refuses the second derivative.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        check_features(x, weight=weight)
        wide = x.to(wide_dtype(x))
        rstd = rms_norm_statistic(wide, eps=eps)
        ctx.save_for_backward(x, weight, rstd)
        y = (wide * rstd).to(x.dtype)
        return y if weight is None else weight * y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = rms_norm_backward(grad_output, x, weight, rstd)
        return grad_x, None if weight is None else grad_weight, None


def _weighted(grad: Tensor, product: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """g and g x^, from dL/dy and dL/dy x^; the second is overwritten."""
    return (grad, product) if weight is None else (grad * weight, product.mul_(weight))


def _over_tokens(grad: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0)


def _check_shapes(
    x: Tensor, weight: Tensor | None, *, grad_output: Tensor, **statistics: Tensor
) -> None:
    check_features(x, weight=weight)
    if grad_output.shape != x.shape:
        raise ValueError(
            f"grad_output: expected shape {tuple(x.shape)}, got {tuple(grad_output.shape)}; "
            "it is the gradient of the output, which is shaped as x"
        )
    expected = (*x.shape[:-1], 1)
    for name, statistic in statistics.items():
        if statistic.shape != expected:
            raise ValueError(
                f"{name}: expected shape {expected}, got {tuple(statistic.shape)}; "
                "one number for each token, as layer_norm_statistics and rms_norm_statistic give"
            )
