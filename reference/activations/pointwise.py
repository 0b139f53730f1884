"""Activations: one curve, applied to each number by itself.

Without a curve between them two linear layers are one. Which curve decides what survives on the
way back: a gradient is multiplied by the slope at every unit of every layer.

    ReLU        max(x, 0)                          leaky ReLU   x where x > 0, else slope * x
    sigmoid     1 / (1 + e^-x)                     tanh         2 sigmoid(2x) - 1
    Swish       x sigmoid(beta x)                  SiLU         Swish with beta = 1
    GELU        x Phi(x), Phi the normal distribution: erf, or one of two approximations

Every function computes in float32 at least and rounds once to the dtype of x, as torch does.
`sigmoid` and `tanh` show how to write them without overflow; what is built on them here takes
torch.sigmoid and torch.tanh, the same numbers in one kernel.

Papers: Swish, 1710.05941; GELU and SiLU, 1606.08415, sec. 2.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Curve = Callable[[Tensor], Tensor]
GELU_TANH_CUBIC = 0.044715
GELU_SIGMOID_SLOPE = 1.702


def relu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x where it is positive, else 0; the slope at 0 is 0.

    Raises: TypeError for an integer `x`, as every function of this file.
    """
    check_floating(x)
    return torch.where(x <= 0, 0, x)


def leaky_relu(x: Float[Tensor, "..."], *, negative_slope: float = 0.01) -> Float[Tensor, "..."]:
    """x where it is positive, else negative_slope * x, so that no unit loses its gradient."""
    check_floating(x)
    return torch.where(x > 0, x, (widen(x) * negative_slope).to(x.dtype))


def sigmoid(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """1 / (1 + e^-x), written so that the exponent is never positive and nothing overflows."""
    check_floating(x)
    wide = widen(x)
    is_positive = wide >= 0
    decay = torch.exp(torch.where(is_positive, -wide, wide))
    return (torch.where(is_positive, 1, decay) / (1 + decay)).to(x.dtype)


def tanh(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """(1 - e^-2x) / (1 + e^-2x); expm1 keeps the digits that 1 - e^-2x loses near 0."""
    check_floating(x)
    wide = widen(x)
    is_positive = wide >= 0
    decay = torch.expm1(torch.where(is_positive, -2 * wide, 2 * wide))  # e^-2|x| - 1
    size = -decay / (2 + decay)
    return torch.where(is_positive, size, -size).to(x.dtype)


def swish(x: Float[Tensor, "..."], *, beta: float | Tensor = 1.0) -> Float[Tensor, "..."]:
    """x sigmoid(beta x). beta = 0 is x / 2, a large beta is nearly ReLU.

    `beta` may be a tensor that broadcasts with `x`, a trained parameter for instance.

    Source: arXiv 1710.05941, sec. 2.
    """
    check_floating(x)
    wide = widen(x)
    return (wide * torch.sigmoid(beta * wide)).to(x.dtype)


def silu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`swish` with beta = 1: x sigmoid(x), in torch's one kernel, so that Llama's bits are met.

    Source: arXiv 1606.08415, sec. 2, which names it.
    """
    check_floating(x)
    return F.silu(x)


def gelu(x: Float[Tensor, "..."], *, approximate: str = "none") -> Float[Tensor, "..."]:
    """x Phi(x): x weighted by the share of a normal distribution that lies below it.

    "none" takes Phi from erf, "tanh" and "sigmoid" are the paper's two approximations. A
    checkpoint is trained with one of them: GPT-2 with "tanh", BERT with "none".

    Raises: ValueError for another name.
    Source: arXiv 1606.08415, sec. 2.
    """
    check_floating(x)
    wide = widen(x)
    return (wide * gelu_share(wide, approximate)).to(x.dtype)


def gelu_share(x: Tensor, approximate: str) -> Tensor:
    """Phi(x), exactly or approximately."""
    match approximate:
        case "none":
            return 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        case "tanh":
            inner = x + GELU_TANH_CUBIC * x * x * x
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * inner))
        case "sigmoid":
            return torch.sigmoid(GELU_SIGMOID_SLOPE * x)
    raise ValueError(f"approximate: expected 'none', 'tanh' or 'sigmoid', got {approximate!r}")


def widen(x: Tensor) -> Tensor:
    """`x` in the dtype of computation: float32 for half precision, else its own."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_floating(x: Tensor) -> None:
    """Refuse whole numbers, on which a curve would be cut to steps."""
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}; x.float() makes one")
