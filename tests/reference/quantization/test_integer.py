"""Oracles: torch's fake quantisation, bitsandbytes' vector-wise int8, torchao, bounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from reference.quantization import (
    IntegerTensor,
    dequantize_integer,
    quantize_absmax,
    quantize_zero_point,
    round_to_nearest,
)

seeds = st.integers(0, 2**16)


def draw(*shape, seed=0, dtype=torch.float32, mean=0.3):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_absmax_matches_torch_fake_quantization(bits):
    x, top = draw(5, 48), 2 ** (bits - 1) - 1
    scale = x.abs().amax(1) / top
    zeros = torch.zeros(5, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(x, scale, zeros, 0, -top, top)
    assert_close(round_to_nearest(x, bits=bits), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_point_matches_torch_fake_quantization(bits):
    x = draw(7, 32)
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    expected = torch.fake_quantize_per_tensor_affine(
        x, scale, (-low / scale).round().int(), 0, 2**bits - 1
    )
    got = round_to_nearest(x, bits=bits, granularity="tensor", is_symmetric=False)
    assert_close(got, expected, rtol=0, atol=1e-6)


def test_rows_match_bitsandbytes(bnb):
    x = draw(6, 256, dtype=torch.float16)
    codes, absmax, _ = bnb.int8_vectorwise_quant(x)
    got = quantize_absmax(x)
    assert_close(got.scale[:, 0] * 127, absmax.float(), rtol=1e-6, atol=0)
    # Theirs divides in another order: a code may differ by one where x / s is a half.
    assert (got.codes.int() - codes.int()).abs().max() <= 1
    assert (got.codes != codes).float().mean() < 1e-2


def test_asymmetric_groups_match_torchao(ao):
    weight = draw(12, 96)
    expected = ao.rounding(weight, ao.intx(4, 32, "ASYMMETRIC"))
    got = round_to_nearest(weight, bits=4, granularity=32, is_symmetric=False)
    assert_close(got, expected, rtol=0, atol=1e-6)


@given(seeds, st.sampled_from(["tensor", "channel", 4, 12]), st.integers(2, 8), st.booleans())
@settings(deadline=None, max_examples=40)
def test_invariant_error_within_half_a_step(seed, granularity, bits, is_symmetric):
    x = draw(3, 12, seed=seed, dtype=torch.float64)
    quantize = quantize_absmax if is_symmetric else quantize_zero_point
    quantized = quantize(x, bits=bits, granularity=granularity)
    width = {"tensor": 36, "channel": 12}.get(granularity, granularity)
    step = quantized.scale.flatten().repeat_interleave(width).view(3, 12)
    # A zero point is rounded too, and may push the ends half a step out of reach.
    allowed = 0.5 if is_symmetric else 1.0
    assert ((dequantize_integer(quantized) - x).abs() <= allowed * step + 1e-12).all()


@given(seeds, st.integers(2, 8), st.booleans())
@settings(deadline=None, max_examples=20)
def test_invariant_rounding_twice_is_rounding_once(seed, bits, is_symmetric):
    x = draw(2, 16, seed=seed, dtype=torch.float64, mean=0.0)
    once = round_to_nearest(x, bits=bits, is_symmetric=is_symmetric)
    assert_close(round_to_nearest(once, bits=bits, is_symmetric=is_symmetric), once)


def test_zero_is_exact_and_groups_of_zeros_stay_zero():
    x = torch.tensor([[0.0, 5.0, 7.0, 9.1], [0.0, 0.0, 0.0, 0.0]])
    for is_symmetric in (True, False):
        rounded = round_to_nearest(x, bits=4, is_symmetric=is_symmetric)
        assert rounded[0, 0] == 0 and torch.equal(rounded[1], x[1])


def test_an_outlier_spoils_its_own_group_only():
    x = draw(1, 256, seed=3)
    spoiled = x.clone()
    spoiled[0, 5] = 100.0
    errors = (round_to_nearest(spoiled, bits=8, granularity=64) - spoiled).abs()
    clean = (round_to_nearest(x, bits=8, granularity=64) - x).abs()
    assert torch.equal(errors[0, 64:], clean[0, 64:])
    assert errors[0, :64].mean() > 10 * clean[0, :64].mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_come_back_and_strides_do_not_matter(dtype):
    x = draw(16, 6, dtype=dtype).mT
    rounded = round_to_nearest(x, bits=8, granularity=8)
    assert rounded.dtype == dtype and rounded.shape == x.shape
    assert torch.equal(rounded, round_to_nearest(x.contiguous(), bits=8, granularity=8))


def test_bits_per_parameter_counts_the_scales():
    x = draw(8, 128)
    assert quantize_absmax(x, bits=4, granularity=32).bits_per_parameter == 4 + 16 / 32
    assert quantize_zero_point(x, bits=4, granularity=128).bits_per_parameter == 4 + 20 / 128
    assert quantize_absmax(x, granularity="tensor").bits_per_parameter == 8 + 16 / 1024


def test_rejects_bad_input():
    with pytest.raises(TypeError, match="floating dtype, got torch.int64"):
        quantize_absmax(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="bits: expected 2 to 8, got 9"):
        quantize_absmax(draw(2, 4), bits=9)
    for group in (0, -4, 3):
        with pytest.raises(ValueError, match=f"group size that divides 4, got {group}"):
            quantize_zero_point(draw(2, 4), granularity=group)
    with pytest.raises(ValueError, match="granularity: expected 'tensor'"):
        quantize_absmax(draw(2, 4), granularity="row")
    for bad in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="finite"):
            quantize_absmax(torch.tensor([[1.0, bad]]))
    with pytest.raises(ValueError, match=r"at least one row with values, got shape \(0, 4\)"):
        quantize_absmax(torch.empty(0, 4))


def test_rejects_codes_out_of_range():
    quantized = quantize_absmax(draw(2, 4), bits=8)
    wrong = IntegerTensor(quantized.codes, quantized.scale, None, 4, torch.float32)
    with pytest.raises(ValueError, match="codes: expected -8 to 7 for 4 bits"):
        dequantize_integer(wrong)
