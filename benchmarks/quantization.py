"""4-bit storage beside bitsandbytes' CPU code, on one weight of 4096 x 4096 of a 7B model.
Time alone: what bitsandbytes allocates inside of its operations cannot be seen from here.

The last rows are a layer of 1024 x 1024 on 32 tokens: our frozen NF4 base, whose weight is
dequantised in forward and again in backward, against the same layer in float32. That is the price
in time of what is saved in bytes; a GPU kernel hides part of it.
"""

import warnings

import torch
import torch.nn.functional as F

from benchmarks.measure import Row, compare
from reference.quantization import (
    dequantize,
    dequantize_4bit,
    double_quantize_4bit,
    frozen_linear,
    quantize_4bit,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as bnb

SIZE, NUM_TOKENS = 4096, 32


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator) * 0.02
    measured = []
    for levels in ("nf4", "fp4"):
        packed, state = bnb.quantize_4bit(weight, quant_type=levels)
        ours = quantize_4bit(weight, levels=levels)
        measured += compare(
            f"{levels} quantise {SIZE} x {SIZE}",
            lambda name=levels: quantize_4bit(weight, levels=name).packed,
            lambda name=levels: bnb.quantize_4bit(weight, quant_type=name)[0],
        )[:1]
        measured += compare(
            f"{levels} dequantise {SIZE} x {SIZE}",
            lambda quantized=ours: dequantize_4bit(quantized),
            lambda packed=packed, state=state: bnb.dequantize_4bit(packed, state),
        )[:1]
    return [*measured, *_double(weight), *_layer(generator)]


def _double(weight: torch.Tensor) -> list[Row]:
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = double_quantize_4bit(weight)
    return compare(
        f"nf4 with double quantisation, dequantise {SIZE} x {SIZE}",
        lambda: dequantize(ours),
        lambda: bnb.dequantize_4bit(packed, state),
    )[:1]


def _layer(generator: torch.Generator) -> list[Row]:
    weight = torch.randn(1024, 1024, generator=generator) * 0.02
    x = torch.randn(NUM_TOKENS, 1024, generator=generator).requires_grad_()
    quantized = double_quantize_4bit(weight)
    return compare(
        f"frozen NF4 layer 1024 x 1024, {NUM_TOKENS} tokens, against the float32 layer",
        lambda: frozen_linear(x, quantized),
        lambda: F.linear(x, weight),
        (x,),
    )
