"""Int8 matrix products, and the few input channels that break them.

Weights quantise well; activations do not, since some input channels are 20 times larger than the
rest, in every token. One scale a token is then set by them, and the others round to nothing.
LLM.int8() multiplies the outlier channels in 16 bits and everything else in 8:

    y = x[:, O] W[:, O]^T  +  s_x s_w (q_x q_w^T)        O = {channels with some |x| > threshold}

Shapes: B tokens, D input channels, N output channels.
Papers: LLM.int8(), 2208.07339, sec. 3 (vector-wise), 3.2 (decomposition, threshold 6.0).
"""

from jaxtyping import Bool, Float
from torch import Tensor, int32

from reference.quantization.integer import IntegerTensor, quantize_absmax


def int8_linear(
    x: Float[Tensor, "... D"], weight: IntegerTensor, bias: Float[Tensor, " N"] | None = None
) -> Float[Tensor, "... N"]:
    """x W^T with both in int8: a scale a token, a scale an output channel, int32 in between.

    The sum over D of products of int8 is exact; the only errors are the two roundings. Returns the
    dtype of `x`.

    Raises: ValueError for a weight that is not (N, D) int8 by absmax a channel.
    Source: arXiv 2208.07339, sec. 3.1.
    """
    _check_weight(x, weight)
    tokens = quantize_absmax(x, bits=8, granularity="channel")
    total = tokens.codes.to(int32) @ weight.codes.to(int32).mT
    y = total.to(tokens.scale.dtype) * tokens.scale * weight.scale[:, 0]
    y = y if bias is None else y + bias
    return y.to(x.dtype)


def outlier_channels(x: Float[Tensor, "... D"], *, threshold: float = 6.0) -> Bool[Tensor, " D"]:
    """Input channels in which some token exceeds the threshold.

    Source: arXiv 2208.07339, sec. 3.2.
    """
    return (x.abs() > threshold).flatten(0, -2).any(0)


def mixed_int8_linear(
    x: Float[Tensor, "... D"],
    weight: IntegerTensor,
    outlier_weight: Float[Tensor, "N O"],
    is_outlier: Bool[Tensor, " D"],
    bias: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "... N"]:
    """`int8_linear` of the ordinary channels plus a product in x's dtype of the others.

    `outlier_weight` are the columns of the weight where `is_outlier`, not quantised.

    Raises: ValueError for shapes that do not fit.
    Source: arXiv 2208.07339, eq. 8.
    """
    num_outliers = int(is_outlier.sum())
    if outlier_weight.shape != (weight.codes.shape[0], num_outliers):
        raise ValueError(
            f"outlier_weight: expected shape ({weight.codes.shape[0]}, {num_outliers}), got "
            f"{tuple(outlier_weight.shape)}; pass weight[:, is_outlier]"
        )
    ordinary = int8_linear(x.masked_fill(is_outlier, 0), weight, bias)
    return ordinary + x[..., is_outlier] @ outlier_weight.to(x.dtype).mT


def _check_weight(x: Tensor, weight: IntegerTensor) -> None:
    num_rows = weight.codes.shape[0]
    if weight.bits != 8 or weight.zero_point is not None or weight.scale.shape != (num_rows, 1):
        raise ValueError(
            "weight: expected int8 by absmax, one scale a row; make it with "
            "quantize_absmax(weight, bits=8, granularity='channel')"
        )
    if x.shape[-1] != weight.codes.shape[1]:
        raise ValueError(
            f"x: expected {weight.codes.shape[1]} channels as the weight has, got {x.shape[-1]}"
        )
