"""What adapting costs: parameters, bytes of optimizer, FLOPs.

    LoRA on n matrices (F, D)     sum of r (D + F)
    prefix of p tokens            p L 2 K d
    bottleneck of width b         2 L (2 b D + b + D)
    full                          all

Adam keeps two float32 numbers for each trainable parameter, GaLore two for r / min(F, D) of them
and the projection.

Papers: LoRA, 2106.09685, sec. 4.2 and 5.1; GaLore, 2403.03507, sec. 4, table 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from reference.lora.adapt import lora_layers
from reference.lora.layer import LoRALinear

ADAM_NUMBERS = 2
FLOAT32_BYTES = 4


def lora_parameters(shapes: Iterable[tuple[int, int]], rank: int) -> int:
    """r (D + F) for each adapted matrix (F, D)."""
    return sum(rank * (fan_in + fan_out) for fan_out, fan_in in shapes)


def adam_bytes(num_trainable: int) -> int:
    """Momentum and variance, float32."""
    return ADAM_NUMBERS * FLOAT32_BYTES * num_trainable


def galore_bytes(shape: tuple[int, int], rank: int) -> int:
    """Momentum and variance of the projected gradient, and the projection, float32.

    The shorter side is projected to r, so two matrices (long, r), and one (short, r).
    """
    short, long = sorted(shape)
    return FLOAT32_BYTES * rank * (ADAM_NUMBERS * long + short)


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that an optimizer keeps, counts of steps (below 8 bytes) aside."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    )


def lora_flops(layer: LoRALinear, num_tokens: int) -> int:
    """FLOPs that the active adapters add to a forward pass: 2 r (D + F) a token each.

    The base's own, 2 D F a token, stay: LoRA makes no forward pass cheaper.
    """
    fan_out, fan_in = layer.weight.shape
    ranks = sum(layer.adapter(name).config.rank for name in layer.active)
    return 0 if layer._unmerged is not None else 2 * num_tokens * ranks * (fan_in + fan_out)


def adapter_flops(model: nn.Module, num_tokens: int) -> int:
    """The sum of lora_flops over a model's layers."""
    return sum(lora_flops(layer, num_tokens) for layer in lora_layers(model))
