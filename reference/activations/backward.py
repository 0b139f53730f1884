"""The slopes of the activations, and the gradients of the gates, by hand.

Backward through a curve is one product: dL/dx = dL/dy * slope(x). With s = sigmoid(beta x):

    sigmoid  s (1 - s)             tanh   1 - tanh(x)^2 = 4 s(2x) s(-2x)
    Swish    s + beta x s (1 - s)  GELU   Phi(x) + x phi(x)
    gate     dL/dgate = dL/dy * up * slope(gate)        dL/dup = dL/dy * curve(gate)

1 - s is sigmoid(-x): written so, no digits cancel where the curve is flat. Everything is computed
in float32 at least and rounded once to the dtype of the input.

Shapes: F hidden width; everything before it is batch.
Papers: Swish, 1710.05941; GELU, 1606.08415; the gates, 2002.05202, sec. 2, differentiated.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from reference.activations.gated import check_gate_and_up, swiglu
from reference.activations.pointwise import (
    GELU_SIGMOID_SLOPE,
    GELU_TANH_CUBIC,
    Curve,
    check_floating,
    gelu,
    gelu_share,
    relu,
    sigmoid,
    widen,
)


def relu_slope(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """1 where x is positive, else 0, also at 0 itself.

    Raises: TypeError for an integer `x`, as every slope.
    """
    check_floating(x)
    return (x > 0).to(x.dtype)


def leaky_relu_slope(
    x: Float[Tensor, "..."], *, negative_slope: float = 0.01
) -> Float[Tensor, "..."]:
    """1 where x is positive, else negative_slope."""
    check_floating(x)
    return torch.where(x > 0, 1.0, torch.full_like(x, negative_slope))


def sigmoid_slope(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """sigmoid(x) sigmoid(-x): 1/4 at 0, and less elsewhere."""
    check_floating(x)
    wide = widen(x)
    return (torch.sigmoid(wide) * torch.sigmoid(-wide)).to(x.dtype)


def tanh_slope(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """1 - tanh(x)^2, as four times the slope of sigmoid at 2x: 1 at 0, and less elsewhere."""
    check_floating(x)
    return (4 * sigmoid_slope(2 * widen(x))).to(x.dtype)


def swish_slope(x: Float[Tensor, "..."], *, beta: float | Tensor = 1.0) -> Float[Tensor, "..."]:
    """s + beta x s (1 - s): the product rule. Negative left of the minimum, 1 far to the right."""
    check_floating(x)
    wide = widen(x)
    scaled = beta * wide
    return (torch.sigmoid(scaled) + scaled * sigmoid_slope(scaled)).to(x.dtype)


def swish_beta_slope(
    x: Float[Tensor, "..."], *, beta: float | Tensor = 1.0
) -> Float[Tensor, "..."]:
    """x^2 s (1 - s): what each input contributes to the gradient of a trained beta."""
    check_floating(x)
    wide = widen(x)
    return (wide * wide * sigmoid_slope(beta * wide)).to(x.dtype)


def silu_slope(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`swish_slope` with beta = 1."""
    return swish_slope(x)


def gelu_slope(x: Float[Tensor, "..."], *, approximate: str = "none") -> Float[Tensor, "..."]:
    """Phi(x) + x Phi'(x), of the form that `approximate` names.

    Raises: ValueError for a name that `gelu` does not know.
    """
    check_floating(x)
    wide = widen(x)
    share = gelu_share(wide, approximate)
    if approximate == "none":
        density = torch.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    elif approximate == "tanh":
        inner = wide + GELU_TANH_CUBIC * wide * wide * wide
        inner_slope = 1 + 3 * GELU_TANH_CUBIC * wide * wide
        scale = math.sqrt(2 / math.pi)
        density = 0.5 * tanh_slope(scale * inner) * scale * inner_slope
    else:
        density = GELU_SIGMOID_SLOPE * sigmoid_slope(GELU_SIGMOID_SLOPE * wide)
    return (share + wide * density).to(x.dtype)


def glu_backward(
    grad_output: Float[Tensor, "... F"], gate: Float[Tensor, "... F"], up: Float[Tensor, "... F"]
) -> tuple[Float[Tensor, "... F"], Float[Tensor, "... F"]]:
    """Gradients for gate and up of `glu`.

    Raises: ValueError where shapes differ, as every function of this group.
    """
    return _gated_backward(sigmoid, sigmoid_slope, grad_output, gate, up)


def reglu_backward(
    grad_output: Float[Tensor, "... F"], gate: Float[Tensor, "... F"], up: Float[Tensor, "... F"]
) -> tuple[Float[Tensor, "... F"], Float[Tensor, "... F"]]:
    """Gradients for gate and up of `reglu`: where the gate is shut, neither gets any."""
    return _gated_backward(relu, relu_slope, grad_output, gate, up)


def geglu_backward(
    grad_output: Float[Tensor, "... F"], gate: Float[Tensor, "... F"], up: Float[Tensor, "... F"]
) -> tuple[Float[Tensor, "... F"], Float[Tensor, "... F"]]:
    """Gradients for gate and up of `geglu`."""
    return _gated_backward(gelu, gelu_slope, grad_output, gate, up)


def swiglu_backward(
    grad_output: Float[Tensor, "... F"], gate: Float[Tensor, "... F"], up: Float[Tensor, "... F"]
) -> tuple[Float[Tensor, "... F"], Float[Tensor, "... F"]]:
    """Gradients for gate and up of `swiglu`; one sigmoid serves value and slope."""
    _check_gradient(grad_output, gate, up)
    grad, wide = widen(grad_output), widen(gate)
    share = torch.sigmoid(wide)
    value = wide * share
    grad_gate = grad * widen(up) * (share + value * (1 - share))
    return grad_gate.to(gate.dtype), (grad * value).to(up.dtype)


def _gated_backward(
    curve: Curve, slope: Curve, grad_output: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    _check_gradient(grad_output, gate, up)
    grad, wide = widen(grad_output), widen(gate)
    grad_gate = grad * widen(up) * slope(wide)
    return grad_gate.to(gate.dtype), (grad * curve(wide)).to(up.dtype)


def _check_gradient(grad_output: Tensor, gate: Tensor, up: Tensor) -> None:
    check_gate_and_up(gate, up)
    if grad_output.shape != gate.shape:
        raise ValueError(
            f"grad_output: expected shape {tuple(gate.shape)}, got {tuple(grad_output.shape)}"
        )


class SwiGLUFunction(torch.autograd.Function):
    """`swiglu` that keeps gate and up for backward, and computes silu(gate) anew.

    Plain autograd keeps silu(gate) as well: F more numbers a token in each layer.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        return swiglu_backward(grad_outputs[0], *ctx.saved_tensors)
