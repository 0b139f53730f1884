"""Oracles: float64 arithmetic on the codes, bitsandbytes' int8 product, torch's float product."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from reference.quantization import (
    dequantize_integer,
    int8_linear,
    mixed_int8_linear,
    outlier_channels,
    quantize_absmax,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_matches_the_product_of_dequantized_values():
    x, weight, bias = draw(2, 5, 96), quantize_absmax(draw(7, 96, seed=1)), draw(7, seed=2)
    rounded = dequantize_integer(quantize_absmax(x)).double()
    expected = F.linear(rounded, dequantize_integer(weight).double(), bias.double())
    assert_close(int8_linear(x, weight, bias), expected.float(), rtol=1e-5, atol=1e-5)


def test_matches_bitsandbytes(bnb):
    x, weight = draw(16, 64).half(), draw(24, 64, seed=1).half()
    x_codes, x_absmax, _ = bnb.int8_vectorwise_quant(x)
    w_codes, w_absmax, _ = bnb.int8_vectorwise_quant(weight)
    expected = bnb.int8_mm_dequant(bnb.int8_linear_matmul(x_codes, w_codes), x_absmax, w_absmax)
    got = int8_linear(x, quantize_absmax(weight))
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()


def test_sum_is_exact_beyond_float32():
    """127 * 127 * 4096 needs 26 bits; float32 has 24."""
    x, weight = torch.full((1, 4096), 127.0), torch.full((1, 4096), 127.0)
    x[0, 0] = 126.0
    assert int8_linear(x.double(), quantize_absmax(weight.double())).item() == pytest.approx(
        127 * 127 * 4095 + 126 * 127, rel=1e-13
    )


def test_outliers_in_16_bits_rescue_the_product():
    x, weight = draw(32, 128), draw(64, 128, seed=1)
    x[:, [3, 77]] *= 60
    is_outlier = outlier_channels(x)
    assert is_outlier.nonzero().flatten().tolist() == [3, 77]
    exact, quantized = F.linear(x, weight), quantize_absmax(weight)
    plain = (int8_linear(x, quantized) - exact).square().mean()
    mixed = mixed_int8_linear(x, quantized, weight[:, is_outlier], is_outlier)
    assert (mixed - exact).square().mean() < plain / 50


def test_no_outliers_is_the_plain_product():
    x, weight = draw(4, 16), draw(3, 16, seed=1)
    is_outlier, quantized = outlier_channels(x), quantize_absmax(weight)
    mixed = mixed_int8_linear(x, quantized, weight[:, is_outlier], is_outlier)
    assert torch.equal(mixed, int8_linear(x, quantized))


def test_rejects_bad_input():
    x, weight = draw(4, 16), draw(3, 16, seed=1)
    with pytest.raises(ValueError, match="weight: expected int8 by absmax"):
        int8_linear(x, quantize_absmax(weight, bits=4))
    with pytest.raises(ValueError, match="x: expected 16 channels as the weight has, got 15"):
        int8_linear(x[:, 1:], quantize_absmax(weight))
    with pytest.raises(ValueError, match=r"outlier_weight: expected shape \(3, 0\)"):
        mixed_int8_linear(x, quantize_absmax(weight), weight, outlier_channels(x))
