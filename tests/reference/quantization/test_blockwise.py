"""Oracles: bitsandbytes bit for bit, exhaustive search in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from reference.quantization import (
    dequantize_4bit,
    four_bit_round,
    integer4_levels,
    normal_float_levels,
    quantize_4bit,
    unpack,
)

each_type = pytest.mark.parametrize("levels", ["nf4", "fp4"])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_equals_bitsandbytes(bnb, x, levels, block_size):
    packed, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type=levels)
    ours = quantize_4bit(x, levels=levels, block_size=block_size)
    assert torch.equal(ours.packed, packed.flatten())
    assert torch.equal(ours.absmax, state.absmax)
    theirs = bnb.dequantize_4bit(packed, state)
    values = dequantize_4bit(ours)
    assert values.dtype == x.dtype and torch.equal(values, theirs.reshape(x.shape))


@each_type
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_matches_bitsandbytes(bnb, levels, dtype, block_size):
    assert_equals_bitsandbytes(bnb, draw(33, 512, dtype=dtype), levels, block_size)


@each_type
def test_matches_bitsandbytes_over_many_chunks(bnb, levels):
    assert_equals_bitsandbytes(bnb, draw(700, 640, seed=2) * 0.02, levels, 64)


@each_type
def test_matches_bitsandbytes_on_ties_and_edges(bnb, levels):
    """Every float32 around every decision point, both zeros, tiny numbers, a block of zeros."""
    table = bnb.get_4bit_type(levels, device="cpu").sort().values
    midpoints = (table[:-1] + table[1:]) / 2
    around = [midpoints]
    for direction in (2.0, -2.0):
        step = midpoints
        for _ in range(3):
            step = torch.nextafter(step, torch.full_like(step, direction))
            around.append(step)
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-45, 1.0, -1.0])
    values = torch.cat([*around, table, special])
    blocks = torch.zeros(-(-len(values) // 63), 63)
    blocks.view(-1)[: len(values)] = values
    x = torch.cat([torch.ones(len(blocks), 1), blocks], 1)
    x = torch.cat([x, torch.zeros(1, 64), x * 1.2e-38, x * 1e38, x * 0.037])
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type=levels)
    ours = quantize_4bit(x, levels=levels)
    assert torch.equal(ours.packed, packed.flatten())
    assert torch.equal(dequantize_4bit(ours), bnb.dequantize_4bit(packed, state))


@each_type
@pytest.mark.parametrize("largest", [1e-38, 1e-39, 3e-42])
def test_invariant_subnormal_blocks_have_the_codes_of_any_other(levels, largest):
    """bitsandbytes divides by 1e-38 at least, and loses 92% of a block of 1e-39.

    A power of two moves the block among normal numbers and no code.
    """
    x = draw(4, 64).clamp(-1, 1) * largest
    normal = x.double() * 2.0**100
    assert torch.equal(
        quantize_4bit(x, levels=levels).packed, quantize_4bit(normal.float(), levels=levels).packed
    )


@given(st.integers(0, 2**16), st.floats(1e-6, 1e6))
@settings(deadline=None, max_examples=25)
def test_matches_exhaustive_search(seed, size):
    x = draw(8, 64, seed=seed) * size
    table = normal_float_levels().double()
    absmax = x.double().abs().amax(1, keepdim=True)
    distances = ((x.double() / absmax)[..., None] - table).abs()
    codes = unpack(quantize_4bit(x).packed).view(8, 64).long()
    chosen = distances.gather(-1, codes[..., None])[..., 0]
    assert_close(chosen, distances.amin(-1), rtol=0, atol=1e-6)


def test_int4_matches_rounding():
    x = draw(16, 64)
    absmax = x.abs().amax(1, keepdim=True)
    expected = (x / absmax * 7).round() / 7 * absmax
    assert_close(four_bit_round(x, levels="int4"), expected, rtol=0, atol=1e-6)
    assert len(integer4_levels()) == 16 and len(integer4_levels().unique()) == 15


def test_invariant_absmax_and_zero_survive():
    x = draw(4, 64)
    x[:, 7] = 0
    rounded = four_bit_round(x)
    assert torch.equal(rounded[:, 7], x[:, 7])
    assert_close(rounded.abs().amax(1), x.abs().amax(1), rtol=1e-6, atol=0)


def test_invariant_zero_block_empty_tensor_and_strides():
    assert torch.equal(four_bit_round(torch.zeros(2, 64)), torch.zeros(2, 64))
    assert four_bit_round(torch.empty(0, 64)).shape == (0, 64)
    x = draw(64, 6).mT
    assert torch.equal(four_bit_round(x), four_bit_round(x.contiguous()))


def test_storage_is_half_a_byte_a_number_and_a_scale_a_block():
    quantized = quantize_4bit(draw(128, 64))
    assert quantized.packed.nbytes == 128 * 64 // 2 and quantized.absmax.nbytes == 128 * 4
    assert quantized.to(torch.bfloat16).dtype == torch.bfloat16


def test_rejects_bad_input():
    x = draw(2, 64)
    for block_size in (0, -64, 63):
        with pytest.raises(ValueError, match=f"positive even number, got {block_size}"):
            quantize_4bit(x, block_size=block_size)
    with pytest.raises(ValueError, match=r"divisor of the 128 values of shape \(2, 64\), got 48"):
        quantize_4bit(x, block_size=48)
    with pytest.raises(TypeError, match="got torch.float64; convert it with .float()"):
        quantize_4bit(x.double())
    with pytest.raises(ValueError, match="levels: expected one of"):
        quantize_4bit(x, levels="nf3")
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[1, 3] = bad
        with pytest.raises(ValueError, match="x: expected finite values"):
            quantize_4bit(x)


def test_rejects_storage_that_does_not_fit():
    quantized = quantize_4bit(draw(2, 64))
    with pytest.raises(ValueError, match=r"packed: expected shape \(64,\)"):
        dequantize_4bit(replace(quantized, packed=quantized.packed[:-1]))
    with pytest.raises(ValueError, match=r"packed: expected shape \(64,\) .* got \(2, 32\)"):
        dequantize_4bit(replace(quantized, packed=quantized.packed.view(2, 32)))
    with pytest.raises(TypeError, match="packed: expected dtype torch.uint8, got torch.int32"):
        dequantize_4bit(replace(quantized, packed=quantized.packed.int()))
    with pytest.raises(ValueError, match="absmax: expected 2 of them for 128 values"):
        dequantize_4bit(replace(quantized, absmax=quantized.absmax[:1]))
    with pytest.raises(ValueError, match="absmax: expected"):
        dequantize_4bit(replace(quantized, block_size=0))
