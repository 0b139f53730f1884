"""Weights in 4 bits: a table of 16 levels, and one scale for each block of 64 numbers.

    absmax_b = max |x| over block b        code = argmin_i |x / absmax_b - level_i|
    x^ = level[code] * absmax_b

The tensor is read as one row; blocks do not know of rows. Nothing computes in 4 bits: a product
dequantises first. 4 bits for the code and 32 / 64 for the absmax make 4.5 bits a parameter;
quantising the absmax in turn (`double_quantization`) makes 4.127.

Papers: QLoRA, 2305.14314, sec. 2 (block-wise), sec. 3 (NF4).
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from reference.quantization.levels import float4_levels, integer4_levels, normal_float_levels

LevelName = Literal["nf4", "fp4", "int4"]
TABLES = {"nf4": normal_float_levels, "fp4": float4_levels, "int4": integer4_levels}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Blocks worked on at a time: their intermediate results stay in the cache.
CHUNK_NUMBERS = 1 << 17
SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class FourBitTensor:
    """A tensor in 4 bits: packed codes, one absmax a block, and what it was."""

    packed: UInt8[Tensor, " half"]
    absmax: Float[Tensor, " blocks"]
    levels: LevelName
    block_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def to(self, dtype: torch.dtype) -> "FourBitTensor":
        """The same codes, to be dequantised to another dtype."""
        return replace(self, dtype=dtype)


def quantize_4bit(
    x: Float[Tensor, "..."], *, levels: LevelName = "nf4", block_size: int = 64
) -> FourBitTensor:
    """The nearest level for each number of x / absmax, packed two a byte; ties go down.

    Computed in float32; the absmax is float32. Bit for bit what bitsandbytes stores, but for blocks
    below the smallest normal number, which it rounds to other levels.

    Raises: TypeError for dtypes but float32, float16, bfloat16; ValueError for a block size that
        is not positive and even or does not divide the number of values, for values that are not
        finite, for unknown levels.
    Source: arXiv 2305.14314, eq. 1 and sec. 3.
    """
    _check_input(x, levels, block_size)
    blocks = x.contiguous().view(-1, block_size)
    packed = torch.empty(len(blocks), block_size // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(len(blocks), device=x.device)
    order, midpoints = _decision_points(levels)
    rows = max(1, CHUNK_NUMBERS // block_size)
    for start in range(0, len(blocks), rows):
        part = slice(start, start + rows)
        chunk = blocks[part].float()
        torch.amax(chunk.abs(), -1, out=absmax[part])
        codes = _rank(_scaled(chunk, absmax[part, None]), midpoints)
        codes = codes if order is None else order.to(x.device)[codes.int()]
        torch.bitwise_or(codes[:, ::2] << 4, codes[:, 1::2], out=packed[part])
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError("x: expected finite values, got inf or nan; find the layer that made them")
    return FourBitTensor(packed.view(-1), absmax, levels, block_size, tuple(x.shape), x.dtype)


def dequantize_4bit(quantized: FourBitTensor) -> Float[Tensor, "..."]:
    """level[code] * absmax in float32, then the dtype that was quantised.

    A byte is looked up whole: a table of 256 pairs of levels costs half the look-ups of codes.

    Raises: TypeError, ValueError for storage that does not fit its shape.
    """
    _check_storage(quantized)
    packed, absmax = quantized.packed, quantized.absmax
    pairs = _pair_table(quantized.levels).to(packed.device)
    out = torch.empty(prod(quantized.shape), dtype=quantized.dtype, device=packed.device)
    step = max(1, CHUNK_NUMBERS // quantized.block_size)
    bytes_a_block = quantized.block_size // 2
    for start in range(0, len(absmax), step):
        scale = absmax[start : start + step, None]
        first = start * bytes_a_block
        codes = packed[first : first + len(scale) * bytes_a_block]
        values = pairs.index_select(0, codes.int()).view(torch.float32).view(len(scale), -1)
        torch.mul(values, scale, out=out[2 * first :][: values.numel()].view_as(values))
    return out.view(quantized.shape)


def four_bit_round(
    x: Float[Tensor, "..."], *, levels: LevelName = "nf4", block_size: int = 64
) -> Float[Tensor, "..."]:
    """x as its 4-bit codes give it back. Raises: as `quantize_4bit`."""
    return dequantize_4bit(quantize_4bit(x, levels=levels, block_size=block_size))


def _scaled(blocks: Tensor, absmax: Tensor) -> Tensor:
    """x / absmax. By the reciprocal, as bitsandbytes: a division rounds otherwise now and then.

    The reciprocal of a subnormal absmax may be infinite: such blocks are first lifted by 2^64.
    """
    scaled = blocks * (1.0 / absmax.clamp(min=SMALLEST))
    is_tiny = (absmax < SMALLEST) & (absmax > 0)
    if bool(is_tiny.any()):
        scaled = torch.where(is_tiny, (blocks * 2.0**64) / (absmax * 2.0**64), scaled)
    return scaled


def _rank(scaled: Tensor, midpoints: list[float]) -> Tensor:
    """How many decision points lie below each number, uint8.

    Fifteen comparisons beat a search of four steps. In floats, in place: torch's kernel from floats
    to booleans is three times slower.
    """
    rank, is_above = torch.zeros_like(scaled), torch.empty_like(scaled)
    for midpoint in midpoints:
        rank += is_above.copy_(scaled).gt_(midpoint)
    return rank.to(torch.uint8)


def _decision_points(levels: LevelName) -> tuple[Tensor | None, list[float]]:
    """Codes in ascending order of their levels (None: they ascend), and the 15 points between."""
    table = TABLES[levels]()
    order = torch.argsort(table, stable=True)
    ascending = table[order]
    midpoints = ((ascending[:-1] + ascending[1:]) / 2).tolist()
    return (None if torch.equal(ascending, table) else order.to(torch.uint8)), midpoints


def _pair_table(levels: LevelName) -> Tensor:
    """(256,) of 8 bytes each: the two float32 levels that a packed byte stands for."""
    table = TABLES[levels]()
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], -1)
    return pairs.view(torch.int64).flatten()


def _check_input(x: Tensor, levels: str, block_size: int) -> None:
    if levels not in TABLES:
        raise ValueError(f"levels: expected one of {sorted(TABLES)}, got {levels!r}")
    if x.dtype not in DTYPES:
        raise TypeError(
            f"x: expected dtype float32, float16 or bfloat16, got {x.dtype}; convert it with "
            ".float()"
        )
    if block_size < 2 or block_size % 2:
        raise ValueError(f"block_size: expected a positive even number, got {block_size}")
    if x.numel() % block_size:
        raise ValueError(
            f"block_size: expected a divisor of the {x.numel()} values of shape "
            f"{tuple(x.shape)}, got {block_size}; pad x or choose another"
        )


def _check_storage(quantized: FourBitTensor) -> None:
    numel, block_size = prod(quantized.shape), quantized.block_size
    if quantized.packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected dtype torch.uint8, got {quantized.packed.dtype}")
    if quantized.packed.shape != (numel // 2,):
        raise ValueError(
            f"packed: expected shape ({numel // 2},) for a tensor of shape {quantized.shape}, got "
            f"{tuple(quantized.packed.shape)}; a byte holds two codes"
        )
    if block_size < 2 or numel % block_size or len(quantized.absmax) != numel // block_size:
        raise ValueError(
            f"absmax: expected {numel / max(block_size, 1):g} of them for {numel} values in blocks "
            f"of {block_size}, got {len(quantized.absmax)}"
        )
