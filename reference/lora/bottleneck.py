"""Bottleneck adapters: a narrow detour after each sublayer, inside of its residual branch.

    y = sublayer(x);  y + W_up gelu(W_down y)         W_down (b, D), W_up (D, b) zero at the start

They stay in the forward pass: unlike LoRA's product, a nonlinear detour cannot be merged.

Source: Houlsby et al., 1902.00751, sec. 2.1.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reference.transformer import Llama


class Bottleneck(nn.Module):
    """x + W_up gelu(W_down x), the identity at the start. Raises: ValueError for width < 1."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width: expected at least 1, got {width}")
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return x + self.up(F.gelu(self.down(x)))


class Followed(nn.Module):
    """A sublayer with a bottleneck after it."""

    def __init__(self, sublayer: nn.Module, dim: int, width: int) -> None:
        super().__init__()
        self.sublayer, self.bottleneck = sublayer, Bottleneck(dim, width)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.bottleneck(self.sublayer(*args, **kwargs))
        return out


def add_bottlenecks(model: Llama, width: int) -> Llama:
    """Freeze the model and put a bottleneck after attention and after the MLP of each block.

    Source: arXiv 1902.00751, fig. 2.
    """
    model.requires_grad_(False)
    dim = model.config.dim
    for block in model.layers:
        for name in ("self_attn", "mlp"):
            setattr(block, name, Followed(block.get_submodule(name), dim, width))
    return model
