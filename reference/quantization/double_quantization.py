"""The scales of blocks are numbers as well: quantise them too, in 8 bits.

    scales c_1 of blocks of 64, float32            32 / 64            = 0.5   bits a parameter
    c_1 - mean(c_1) in 8 bits, in blocks of 256,    8 / 64
    with float32 scales c_2                       + 32 / (64 * 256)   = 0.127 bits a parameter

The weights are quantised once, as before; it is their scales that are quantised. All of c_1 are
positive, so their mean is taken off first, and the signed 8-bit code is used on both sides.

Papers: QLoRA, 2305.14314, sec. 3, "Double Quantization".
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from reference.quantization.blockwise import FourBitTensor, dequantize_4bit, quantize_4bit
from reference.quantization.levels import dynamic_levels, nearest_level

BLOCK_SIZE = 256


@dataclass(frozen=True)
class EightBitScales:
    """Scales in 8 bits: codes, one scale for each 256 of them, and the mean that was taken off."""

    codes: UInt8[Tensor, " blocks"]
    absmax: Float[Tensor, " outer"]
    offset: Float[Tensor, ""]


@dataclass(frozen=True)
class DoubleQuantized:
    """A `FourBitTensor` whose absmax is left empty, and its scales in 8 bits."""

    weights: FourBitTensor
    scales: EightBitScales


def quantize_scales(absmax: Float[Tensor, " blocks"]) -> EightBitScales:
    """8-bit codes for float32 scales, in blocks of 256 (the last may be shorter).

    Each code is the exact nearest of 256 dynamic levels, but never one that makes a scale negative:
    that would turn the sign of a whole block's weights, and the next level up is taken instead.
    bitsandbytes' CPU code first rounds to a grid of 65,536 points; its codes differ where a value
    lies that close to halfway.

    Raises: TypeError for a dtype other than float32; ValueError for no scales or scales that are
        not finite.
    Source: arXiv 2305.14314, sec. 3.
    """
    if absmax.dtype != torch.float32:
        raise TypeError(f"absmax: expected dtype torch.float32, got {absmax.dtype}")
    if absmax.ndim != 1 or not len(absmax) or not bool(torch.isfinite(absmax).all()):
        raise ValueError(
            f"absmax: expected one or more finite scales in a row, got shape {tuple(absmax.shape)}"
        )
    offset = absmax.mean()
    blocks = _in_blocks(absmax - offset)
    outer = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / outer.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    levels = dynamic_levels().to(absmax.device)
    codes = nearest_level(scaled, levels)
    is_negative = levels[codes.int()] * outer[:, None] + offset < 0
    codes = codes + (is_negative & (absmax.min() >= 0)).to(codes.dtype)
    return EightBitScales(codes.flatten()[: len(absmax)], outer, offset)


def dequantize_scales(scales: EightBitScales) -> Float[Tensor, " blocks"]:
    """level[code] * absmax + offset, float32.

    Raises: ValueError where the number of absmax does not fit the codes.
    """
    expected = -(-len(scales.codes) // BLOCK_SIZE)
    if len(scales.absmax) != expected:
        raise ValueError(
            f"absmax: expected {expected} for {len(scales.codes)} codes in blocks of "
            f"{BLOCK_SIZE}, got {len(scales.absmax)}"
        )
    levels = dynamic_levels().to(scales.codes.device)[scales.codes.int()]
    values = _in_blocks(levels) * scales.absmax[:, None]
    return values.flatten()[: len(scales.codes)] + scales.offset


def double_quantize(quantized: FourBitTensor) -> DoubleQuantized:
    """The same codes with their scales in 8 bits. Raises: as `quantize_scales`."""
    scales = quantize_scales(quantized.absmax)
    return DoubleQuantized(replace(quantized, absmax=quantized.absmax[:0]), scales)


def single(quantized: DoubleQuantized) -> FourBitTensor:
    """With float32 scales again, the rounded ones: ready for `dequantize_4bit`."""
    return replace(quantized.weights, absmax=dequantize_scales(quantized.scales))


def dequantize(quantized: FourBitTensor | DoubleQuantized) -> Float[Tensor, "..."]:
    """The values, whether the scales were quantised or not. Raises: as `dequantize_4bit`."""
    return dequantize_4bit(
        single(quantized) if isinstance(quantized, DoubleQuantized) else quantized
    )


def double_quantize_4bit(x: Float[Tensor, "..."], *, block_size: int = 64) -> DoubleQuantized:
    """NF4 with double quantisation: QLoRA's storage. Raises: as `quantize_4bit`."""
    return double_quantize(quantize_4bit(x, levels="nf4", block_size=block_size))


def _in_blocks(x: Tensor) -> Tensor:
    """(outer, 256), the last block filled up with zeros."""
    missing = -len(x) % BLOCK_SIZE
    return torch.cat([x, x.new_zeros(missing)]).view(-1, BLOCK_SIZE)
