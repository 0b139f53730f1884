"""Oracles: bitsandbytes (values bit for bit, codes but for its grid), exhaustive search, bounds."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from reference.quantization import (
    EightBitScales,
    dequantize,
    dequantize_4bit,
    dequantize_scales,
    double_quantize,
    double_quantize_4bit,
    dynamic_levels,
    nearest_level,
    quantize_4bit,
    quantize_scales,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scales(number, seed=0):
    return quantize_4bit(draw(number, 64, seed=seed)).absmax


@pytest.mark.parametrize("number", [1, 5, 256, 1000, 4096])
def test_scales_match_bitsandbytes_but_for_its_grid(bnb, number):
    absmax = scales(number)
    ours = quantize_scales(absmax)
    centred = absmax - absmax.mean()
    codes, state = bnb.quantize_blockwise(centred, blocksize=256)
    assert torch.equal(ours.absmax, state.absmax)
    # bitsandbytes looks x up in 65,536 entries: rounded to that grid, ours are its codes exactly.
    blocks = torch.nn.functional.pad(centred, (0, -number % 256)).view(-1, 256)
    scaled = blocks * (1.0 / ours.absmax.clamp(min=1e-38))[:, None]
    grid = ((scaled + 1) * 0.5 * 65535 + 0.5).floor() / 65535 * 2 - 1
    on_grid = nearest_level(grid, dynamic_levels()).flatten()[:number]
    if number > 1:  # one scale is its own mean: nothing is left to look up
        assert torch.equal(on_grid, codes)
        assert (ours.codes != codes).float().mean() <= 0.005


def test_invariant_no_scale_turns_the_sign_of_its_weights():
    """Scales from 0 to 10 in one block: the nearest level of a small one may lie below zero."""
    generator = torch.Generator().manual_seed(0)
    were_negative = 0
    for _ in range(300):
        absmax = torch.rand(256, generator=generator) ** 8 * 3
        absmax[:2] = torch.rand(2, generator=generator) * torch.tensor([10.0, 1e-3])
        ours = quantize_scales(absmax)
        assert bool((dequantize_scales(ours) >= 0).all())
        nearest = nearest_level((absmax - ours.offset) / ours.absmax, dynamic_levels())
        were_negative += int((dequantize_scales(replace(ours, codes=nearest)) < 0).any())
    assert were_negative > 10


@pytest.mark.parametrize("number", [5, 256, 1000])
def test_values_match_bitsandbytes_from_the_same_codes(bnb, number):
    absmax = scales(number)
    offset = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    expected = bnb.dequantize_blockwise(codes, state) + offset
    assert torch.equal(dequantize_scales(EightBitScales(codes, state.absmax, offset)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_match_bitsandbytes_with_compressed_statistics(bnb, dtype):
    x = (draw(96, 640) * 0.02).to(dtype)
    packed, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    ours = double_quantize_4bit(x)
    assert torch.equal(ours.weights.packed, packed.flatten())
    assert torch.equal(ours.scales.offset, state.offset)
    assert torch.equal(ours.scales.absmax, state.state2.absmax)
    theirs = replace(ours, scales=EightBitScales(state.absmax, state.state2.absmax, state.offset))
    assert torch.equal(dequantize(theirs), bnb.dequantize_4bit(packed, state))
    assert (ours.scales.codes != state.absmax).float().mean() <= 0.005


def test_invariant_error_of_a_scale_is_within_half_the_gap_of_its_levels():
    absmax = scales(2048, seed=4)
    quantized = quantize_scales(absmax)
    error = (dequantize_scales(quantized) - absmax).abs().view(-1, 256)
    widest = dynamic_levels().diff().max() / 2
    assert (error <= quantized.absmax[:, None] * widest + 1e-6).all()


def test_weights_are_quantized_once():
    """The codes of the weights are the same with and without; only the scales change."""
    x = draw(32, 256)
    single, double = quantize_4bit(x), double_quantize_4bit(x)
    assert torch.equal(single.packed, double.weights.packed)
    assert len(double.weights.absmax) == 0
    assert_close(dequantize(double), dequantize_4bit(single), rtol=0.05, atol=0)
    assert torch.equal(dequantize(single), dequantize_4bit(single))


def test_equal_scales_are_exact():
    x = torch.cat([torch.ones(4, 1), torch.zeros(4, 63)], 1)
    assert torch.equal(dequantize(double_quantize_4bit(x)), x)


def test_storage_is_8_bits_a_scale_and_32_for_256_of_them():
    double = double_quantize(quantize_4bit(draw(512, 64)))
    assert double.scales.codes.nbytes == 512 and double.scales.absmax.nbytes == 2 * 4


def test_rejects_bad_input():
    with pytest.raises(TypeError, match="absmax: expected dtype torch.float32, got torch.float16"):
        quantize_scales(torch.ones(4).half())
    for bad in (torch.ones(0), torch.ones(2, 2), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="one or more finite scales"):
            quantize_scales(bad)
    quantized = quantize_scales(scales(300))
    with pytest.raises(ValueError, match="absmax: expected 2 for 300 codes"):
        dequantize_scales(replace(quantized, absmax=quantized.absmax[:1]))
