"""QLoRA: a frozen base in NF4, trained through, with low-rank adapters that learn.

    Y = X dequantise(W)^T + (alpha / r) X A^T B^T          A, B: an adapter of reference.lora

Forward dequantises W, multiplies in the dtype of X and forgets; backward dequantises again for
dX = dY W. Nothing computes in 4 bits and W has no gradient. What autograd keeps is X (for A's
gradient), the narrow X A^T and the packed codes, which are there anyway.

Shapes: N output, D input channels, r rank.
Papers: QLoRA, 2305.14314, eq. 5 and 6; LoRA, 2106.09685, sec. 4.1.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reference.lora.layer import Adapter, LoRAConfig
from reference.quantization.blockwise import FourBitTensor, quantize_4bit
from reference.quantization.double_quantization import (
    DoubleQuantized,
    EightBitScales,
    dequantize,
    double_quantize,
)


class FrozenLinearFunction(torch.autograd.Function):
    """x W^T for a quantised W: call .apply(x, weight). Only x gets a gradient, once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FourBitTensor | DoubleQuantized) -> Tensor:
        ctx.weight = weight
        return x @ _values(weight, x.dtype).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output @ _values(ctx.weight, grad_output.dtype), None


def frozen_linear(
    x: Float[Tensor, "... D"],
    weight: FourBitTensor | DoubleQuantized,
    bias: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "... N"]:
    """x W^T + bias in the dtype of x; W is dequantised to that dtype, here and in backward.

    Raises: ValueError for a weight that is not (N, D) for the D of x.
    Source: arXiv 2305.14314, sec. 3, eq. 5.
    """
    shape = _storage(weight).shape
    if len(shape) != 2 or shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight: expected shape (N, {x.shape[-1]}) for x of shape {tuple(x.shape)}, got "
            f"{shape}"
        )
    y = FrozenLinearFunction.apply(x, weight)
    return y if bias is None else y + bias


class QLoRALinear(nn.Module):
    """A linear layer whose weight is NF4 (double-quantised by default) with one adapter on top.

    Buffers hold the codes, so that they are saved, moved and loaded with the module; the adapter's
    `a` and `b` are its only parameters, and its input is cast to their dtype.

    Raises: as `Adapter` and `quantize_4bit`.
    Source: arXiv 2305.14314, eq. 5.
    """

    def __init__(
        self, base: nn.Linear, config: LoRAConfig, *, block_size: int = 64, is_double: bool = True
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = base.out_features, base.in_features
        self.block_size, self.is_double = block_size, is_double
        self.adapter = Adapter(base, config)
        self._keep(quantize_4bit(base.weight.detach(), levels="nf4", block_size=block_size))
        self.bias = None if base.bias is None else nn.Buffer(base.bias.detach().clone())
        self.train(base.training)

    def _keep(self, weight: FourBitTensor) -> None:
        self.weight_dtype = weight.dtype
        self.packed = nn.Buffer(weight.packed)
        # Scales as bytes: module.to(dtype) casts floating buffers, and would round them.
        if self.is_double:
            scales = double_quantize(weight).scales
            self.scale_codes = nn.Buffer(scales.codes)
            self.absmax = nn.Buffer(
                torch.cat([scales.absmax, scales.offset[None]]).view(torch.uint8)
            )
        else:
            self.absmax = nn.Buffer(weight.absmax.view(torch.uint8))

    @property
    def quantized(self) -> FourBitTensor | DoubleQuantized:
        """The base weight as it is stored."""
        shape, absmax = (self.out_features, self.in_features), self.absmax.view(torch.float32)
        stored = FourBitTensor(
            self.packed, absmax, "nf4", self.block_size, shape, self.weight_dtype
        )
        if not self.is_double:
            return stored
        scales = EightBitScales(self.scale_codes, absmax[:-1], absmax[-1])
        return DoubleQuantized(replace(stored, absmax=absmax[:0]), scales)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... N"]:
        y = frozen_linear(x, self.quantized, self.bias)
        return y + self.adapter(x.to(self.adapter.a.dtype)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, is_double={self.is_double}"


def replace_linears(
    model: nn.Module,
    make: Callable[[nn.Linear], nn.Module],
    *,
    skip: tuple[str, ...] = ("lm_head",),
) -> list[str]:
    """Put make(layer) in the place of every nn.Linear whose own name is not in `skip`.

    In place; returns the full names. QLoRA adapts all linear layers: `make_qlora`.

    Raises: ValueError where nothing was replaced.
    Source: arXiv 2305.14314, sec. 4 (adapters on all layers reach 16-bit quality).
    """
    found = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] not in skip
    ]
    if not found:
        raise ValueError("model: expected nn.Linear layers to replace, found none")
    for name, layer in found:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, make(layer))
    return [name for name, _ in found]


def make_qlora(model: nn.Module, config: LoRAConfig) -> list[nn.Parameter]:
    """Freeze a model, replace its linear layers by `QLoRALinear`, return what is to be trained.

    In place; every linear layer but the head, whatever `config.targets` says, as QLoRA has it.
    Embeddings, norms and the head stay as they are, frozen.

    Raises: as `replace_linears` and `QLoRALinear`.
    """
    model.requires_grad_(False)
    replace_linears(model, lambda layer: QLoRALinear(layer, config))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _storage(weight: FourBitTensor | DoubleQuantized) -> FourBitTensor:
    return weight.weights if isinstance(weight, DoubleQuantized) else weight


def _values(weight: FourBitTensor | DoubleQuantized, dtype: torch.dtype) -> Tensor:
    """W in the dtype that the product is computed in."""
    values = dequantize(weight)
    return values.to(dtype)
