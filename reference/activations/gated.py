"""Gated feed-forward layers: one projection decides how much of another passes.

    GLU      sigmoid(gate) * up        ReGLU    relu(gate) * up
    GEGLU    gelu(gate) * up           SwiGLU   silu(gate) * up
    layer    y = W_down (f(W_gate x) * (W_up x)),    without biases

The curve is on the gate alone; `up` stays linear. Three matrices instead of two, so the hidden
width shrinks to 2/3 for the same number of parameters.

Shapes: D model width, F hidden width; everything before the width is batch.
Papers: GLU, 1612.08083; ReGLU, GEGLU, SwiGLU and the 2/3 rule, 2002.05202, sec. 2.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reference.activations.pointwise import Curve, gelu, relu, sigmoid, silu

Gate = Callable[[Tensor, Tensor], Tensor]


def glu(gate: Float[Tensor, "... F"], up: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
    """sigmoid(gate) * up. torch's F.glu takes both in one tensor, `up` first.

    Raises: ValueError where the two shapes differ, as every function of this group.
    Source: arXiv 2002.05202, eq. 2.
    """
    return gated(sigmoid, gate, up)


def reglu(gate: Float[Tensor, "... F"], up: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
    """relu(gate) * up. Source: arXiv 2002.05202, sec. 2."""
    return gated(relu, gate, up)


def geglu(gate: Float[Tensor, "... F"], up: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
    """gelu(gate) * up, with erf. Source: arXiv 2002.05202, sec. 2."""
    return gated(gelu, gate, up)


def swiglu(gate: Float[Tensor, "... F"], up: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
    """silu(gate) * up. Source: arXiv 2002.05202, sec. 2."""
    return gated(silu, gate, up)


def gated(curve: Curve, gate: Tensor, up: Tensor) -> Tensor:
    """curve(gate) * up; the curve's value is rounded to its dtype first, as Llama does."""
    check_gate_and_up(gate, up)
    return curve(gate) * up


def check_gate_and_up(gate: Tensor, up: Tensor) -> None:
    """Refuse a gate that would broadcast over `up`."""
    if gate.shape != up.shape:
        raise ValueError(
            f"up: expected the gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}; "
            "both come from the same token, through matrices of the same size"
        )


def pack_gate_up(
    gate_weight: Float[Tensor, "F D"], up_weight: Float[Tensor, "F D"]
) -> Float[Tensor, "2*F D"]:
    """One matrix for both projections: the rows of the gate first, then those of up.

    Raises: ValueError where the two shapes differ.
    """
    check_gate_and_up(gate_weight, up_weight)
    return torch.cat((gate_weight, up_weight))


def unpack_gate_up(
    gate_up_weight: Float[Tensor, "twoF D"],
) -> tuple[Float[Tensor, "F D"], Float[Tensor, "F D"]]:
    """The inverse of `pack_gate_up`: views of the gate's rows and of up's.

    Raises: ValueError for an odd number of rows.
    """
    if gate_up_weight.shape[0] % 2:
        raise ValueError(
            f"gate_up_weight: expected an even number of rows, got {gate_up_weight.shape[0]}"
        )
    gate_weight, up_weight = gate_up_weight.chunk(2)
    return gate_weight, up_weight


class MLP(nn.Module):
    """The feed-forward layer without a gate: W_down curve(W_up x), without biases."""

    def __init__(self, model_dim: int, hidden_dim: int, *, curve: Curve = relu) -> None:
        super().__init__()
        check_widths(model_dim=model_dim, hidden_dim=hidden_dim)
        self.curve = curve
        self.up_proj = nn.Linear(model_dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, model_dim, bias=False)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return self.down_proj(self.curve(self.up_proj(x)))


class GatedMLP(nn.Module):
    """W_down gate_function(W_gate x, W_up x), without biases; parameters named as in Llama."""

    def __init__(self, model_dim: int, hidden_dim: int, *, gate_function: Gate = swiglu) -> None:
        super().__init__()
        check_widths(model_dim=model_dim, hidden_dim=hidden_dim)
        self.gate_function = gate_function
        self.gate_proj = nn.Linear(model_dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(model_dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, model_dim, bias=False)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return self.down_proj(self.gate_function(self.gate_proj(x), self.up_proj(x)))


class SwiGLU(GatedMLP):
    """Llama's feed-forward layer; state dict and values as transformers' LlamaMLP.

    Raises: ValueError for a width below 1.
    """

    def __init__(self, model_dim: int, hidden_dim: int) -> None:
        super().__init__(model_dim, hidden_dim, gate_function=swiglu)


class FusedSwiGLU(nn.Module):
    """`SwiGLU` with gate and up in one matrix, one product; state dict as transformers' Phi3MLP."""

    def __init__(self, model_dim: int, hidden_dim: int) -> None:
        super().__init__()
        check_widths(model_dim=model_dim, hidden_dim=hidden_dim)
        self.gate_up_proj = nn.Linear(model_dim, 2 * hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, model_dim, bias=False)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(swiglu(gate, up))

    @classmethod
    def from_separate(cls, layer: SwiGLU) -> "FusedSwiGLU":
        """A fused layer with copies of the weights of `layer`."""
        hidden_dim, model_dim = layer.gate_proj.weight.shape
        fused = cls(model_dim, hidden_dim).to(layer.gate_proj.weight)
        packed = pack_gate_up(layer.gate_proj.weight, layer.up_proj.weight)
        fused.gate_up_proj.weight.data.copy_(packed)
        fused.down_proj.weight.data.copy_(layer.down_proj.weight)
        return fused


def check_widths(**widths: int) -> None:
    """Refuse a width below 1."""
    for name, width in widths.items():
        if width < 1:
            raise ValueError(f"{name}: expected at least 1, got {width}")
