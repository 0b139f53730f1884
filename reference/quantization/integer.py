"""Integers for weights: codes q that a scale s, shared by many numbers, turns back into values.

    absmax       s = max|x| / (2^(b-1) - 1)          q = round(x / s)           x^ = s q
    zero point   s = (max x - min x) / (2^b - 1)     q = round(x / s) + z       x^ = s (q - z)

The largest number of those that share a scale sets the step for all of them. So who shares is what
matters: a whole tensor, one row (the weights of one output channel), or a group within a row. An
outlier spoils its own group only.

Shapes: N output channels, D input channels, G groups a row.
Papers: LLM.int8(), 2208.07339, sec. 2 (absmax, zero point, vector-wise).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

Granularity = Literal["tensor", "channel"] | int


@dataclass(frozen=True)
class IntegerTensor:
    """Codes shaped as the tensor, and what turns them back.

    scale, zero_point: () for one scale a tensor, (..., 1) for one a row, (..., G) for G groups a
    row. Codes are int8 without a zero point, uint8 with one; whatever the bits, each takes a byte
    here: `packing.pack` puts two of 4 bits into one.
    """

    codes: Int8[Tensor, "... D"] | UInt8[Tensor, "... D"]
    scale: Float[Tensor, "..."]
    zero_point: Float[Tensor, "..."] | None
    bits: int
    dtype: torch.dtype

    @property
    def bits_per_parameter(self) -> float:
        """Bits of a code, plus each scale's 16 and each zero point's `bits`, shared out."""
        overhead = 16 if self.zero_point is None else 16 + self.bits
        return self.bits + overhead * self.scale.numel() / max(self.codes.numel(), 1)


def quantize_absmax(
    x: Float[Tensor, "... D"], *, bits: int = 8, granularity: Granularity = "channel"
) -> IntegerTensor:
    """Symmetric: zero is code 0, the codes are -(2^(b-1) - 1) ... 2^(b-1) - 1.

    Computed in float32 at least. All-zero groups keep a scale of zero and come back as zeros.

    Raises: TypeError where x holds no floats; ValueError for bits outside 2 ... 8, a group that
        does not divide the last dimension, values that are not finite.
    Source: arXiv 2208.07339, sec. 2.1.
    """
    wide = _check(x, bits, granularity)
    groups = _share(wide, granularity)
    largest_code = 2 ** (bits - 1) - 1
    low, high = groups.aminmax(dim=-1)
    scale = _finite(torch.maximum(high, -low)) / largest_code
    codes = _divide(groups, scale).round_().clamp_(-largest_code, largest_code)
    return IntegerTensor(codes.to(torch.int8).reshape(x.shape), scale, None, bits, x.dtype)


def quantize_zero_point(
    x: Float[Tensor, "... D"], *, bits: int = 8, granularity: Granularity = "channel"
) -> IntegerTensor:
    """Asymmetric: the codes 0 ... 2^b - 1 span min(x, 0) ... max(x, 0), and zero stays exact.

    The zero point z is the code of zero, itself an integer: padding, ReLU's zeros and dropped
    weights come back as zeros. Computed in float32 at least.

    Raises: as `quantize_absmax`.
    Source: arXiv 2208.07339, sec. 2.1.
    """
    wide = _check(x, bits, granularity)
    groups = _share(wide, granularity)
    largest_code = 2**bits - 1
    low, high = groups.aminmax(dim=-1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _finite(high - low) / largest_code
    zero_point = -_divide(low[..., None], scale)[..., 0].round_()
    codes = _divide(groups, scale).round_().add_(zero_point[..., None]).clamp_(0, largest_code)
    return IntegerTensor(codes.to(torch.uint8).reshape(x.shape), scale, zero_point, bits, x.dtype)


def dequantize_integer(quantized: IntegerTensor) -> Float[Tensor, "... D"]:
    """s q, or s (q - z), in the dtype that was quantised.

    Raises: ValueError for codes that the bits do not have.
    """
    codes, bits = quantized.codes, quantized.bits
    is_signed = quantized.zero_point is None
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)
    if codes.numel() and not (low <= int(codes.min()) and int(codes.max()) <= high):
        raise ValueError(
            f"codes: expected {low} to {high} for {bits} bits, got {int(codes.min())} to "
            f"{int(codes.max())}; pass codes that quantize_* of the same bits made"
        )
    values = codes.to(quantized.scale.dtype)
    groups = values if quantized.scale.ndim == 0 else _split(values, quantized.scale.shape[-1])
    if quantized.zero_point is not None:
        groups.sub_(_spread(quantized.zero_point))
    return groups.mul_(_spread(quantized.scale)).reshape(codes.shape).to(quantized.dtype)


def round_to_nearest(
    x: Float[Tensor, "... D"],
    *,
    bits: int,
    granularity: Granularity = "channel",
    is_symmetric: bool = True,
) -> Float[Tensor, "... D"]:
    """x as its codes give it back: what a model computes with after weight-only quantisation.

    Raises: as `quantize_absmax`.
    """
    quantize = quantize_absmax if is_symmetric else quantize_zero_point
    return dequantize_integer(quantize(x, bits=bits, granularity=granularity))


def _share(x: Tensor, granularity: Granularity) -> Tensor:
    """(..., G, D / G): the numbers along the last dimension share one scale."""
    if granularity == "tensor":
        return x.flatten()
    return _split(x, 1 if granularity == "channel" else x.shape[-1] // int(granularity))


def _split(x: Tensor, num_groups: int) -> Tensor:
    return x.unflatten(-1, (num_groups, x.shape[-1] // num_groups))


def _spread(shared: Tensor) -> Tensor:
    return shared if shared.ndim == 0 else shared[..., None]


def _divide(groups: Tensor, scale: Tensor) -> Tensor:
    """x / s, and 0 where the scale is: all of such a group is zero."""
    return groups / torch.where(scale == 0, 1, scale)[..., None]


def _finite(extent: Tensor) -> Tensor:
    """The extent of each group, where inf or nan among its numbers shows."""
    if not bool(torch.isfinite(extent).all()):
        raise ValueError(
            "x: expected finite values whose range is finite as well, got inf or nan; find the "
            "layer that made them"
        )
    return extent


def _check(x: Tensor, bits: int, granularity: Granularity) -> Tensor:
    """x in float32 at least, after the checks that every quantiser shares."""
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}; convert it with .float()")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: expected 2 to 8, got {bits}; a code is kept in one byte")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"x: expected at least one row with values, got shape {tuple(x.shape)}")
    if isinstance(granularity, str):
        if granularity not in ("tensor", "channel"):
            raise ValueError(
                f"granularity: expected 'tensor', 'channel' or a group size, got {granularity!r}"
            )
    elif granularity < 1 or x.shape[-1] % granularity:
        raise ValueError(
            f"granularity: expected a positive group size that divides {x.shape[-1]}, got "
            f"{granularity}"
        )
    return x.to(torch.promote_types(x.dtype, torch.float32))
