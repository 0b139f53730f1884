"""LayerNorm and RMSNorm: each token is brought to unit scale by statistics of its own features.

No token sees another, so training and inference, batch 1 and batch 1000, padding and none are
alike. RMSNorm drops the mean: it divides by the root mean square of x itself.

    LayerNorm   y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias      var divides by D
    RMSNorm     y = x / sqrt(mean(x^2) + eps) * weight

Shapes: D model width; everything before it is batch.
Papers: LayerNorm, 1607.06450, eq. 3 and 4; RMSNorm, 1910.07467, eq. 4.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def layer_norm(
    x: Float[Tensor, "... D"],
    weight: Float[Tensor, " D"] | None = None,
    bias: Float[Tensor, " D"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Tensor, "... D"]:
    """Centre each token, divide by its standard deviation, then scale and shift.

    Everything in float32 at least, rounded once to the dtype of `x`.

    Raises: ValueError for a weight or bias that is not (D,), TypeError for an integer `x`.
    Source: arXiv 1607.06450, eq. 4.
    """
    check_features(x, weight=weight, bias=bias)
    centred, _, rstd = centre(x, eps)
    return scale_and_shift(centred * rstd, weight, bias).to(x.dtype)


def rms_norm(
    x: Float[Tensor, "... D"],
    weight: Float[Tensor, " D"] | None = None,
    *,
    eps: float = 1e-6,
) -> Float[Tensor, "... D"]:
    """Divide each token by its root mean square, then scale; the mean stays where it is.

    The quotient is computed in float32 at least and rounded to the dtype of `x` before the weight
    multiplies it, as transformers' LlamaRMSNorm does; torch's own rms_norm rounds once, after. A
    weight in a wider dtype widens the result.

    Raises: ValueError for a weight that is not (D,), TypeError for an integer `x`.
    Source: arXiv 1910.07467, eq. 4.
    """
    check_features(x, weight=weight)
    wide = x.to(wide_dtype(x))
    y = (wide * rms_norm_statistic(wide, eps=eps)).to(x.dtype)
    return y if weight is None else weight * y


def layer_norm_statistics(
    x: Float[Tensor, "... D"], *, eps: float = 1e-5
) -> tuple[Float[Tensor, "... 1"], Float[Tensor, "... 1"]]:
    """Mean and 1 / sqrt(var + eps) of each token, in float32 at least: all that backward needs."""
    check_features(x)
    _, mean, rstd = centre(x, eps)
    return mean, rstd


def rms_norm_statistic(x: Float[Tensor, "... D"], *, eps: float = 1e-6) -> Float[Tensor, "... 1"]:
    """1 / sqrt(mean(x^2) + eps) of each token, in float32 at least."""
    check_features(x)
    return torch.rsqrt(x.to(wide_dtype(x)).pow(2).mean(-1, keepdim=True) + eps)


def centre(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x - mean, mean and 1 / sqrt(var + eps), in float32 at least.

    Centring first costs one pass more than E[x^2] - E[x]^2 and cannot cancel.
    """
    wide = x.to(wide_dtype(x))
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    return centred, mean, torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Where statistics are computed: float32 for half precision, else the dtype of `x`.

    A square overflows float16 from |x| = 256 on, and a sum of D squares loses bits in bfloat16.
    """
    return torch.promote_types(x.dtype, torch.float32)


def scale_and_shift(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y * weight + bias in one pass where both are there."""
    if weight is not None and bias is not None:
        return torch.addcmul(bias.to(y.dtype), y, weight.to(y.dtype))
    if weight is not None:
        return y * weight
    return y if bias is None else y + bias


def check_features(x: Tensor, **parameters: Tensor | None) -> None:
    """Refuse an `x` without features or of whole numbers, and parameters that are not (D,)."""
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}; x.float() makes one")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"x: expected (..., features) with at least one feature, got {tuple(x.shape)}"
        )
    for name, parameter in parameters.items():
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: expected shape {tuple(x.shape[-1:])}, got {tuple(parameter.shape)}; "
                "one value for each feature of x's last dimension"
            )


class LayerNorm(nn.Module):
    """`layer_norm` with its parameters; state dict and defaults as torch.nn.LayerNorm."""

    def __init__(self, dim: int, *, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return layer_norm(x, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, bias={self.bias is not None}"


class RMSNorm(nn.Module):
    """`rms_norm` with its weight; state dict and values as transformers' LlamaRMSNorm."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return rms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
