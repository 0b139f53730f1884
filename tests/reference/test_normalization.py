"""Oracles: torch's kernels, transformers' LlamaRMSNorm, float64, gradcheck, closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from reference.normalization import (
    BatchNorm,
    DeepNorm,
    LayerNorm,
    LayerNormFunction,
    PostNorm,
    PreNorm,
    RMSNorm,
    RMSNormFunction,
    SandwichNorm,
    batch_norm,
    deepnorm_constants,
    deepnorm_encoder_decoder_constants,
    layer_norm,
    layer_norm_backward,
    layer_norm_statistics,
    rms_norm,
    rms_norm_backward,
    rms_norm_statistic,
)
from tests.tolerances import TOLERANCE

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Statistics over n values round differently for each order of summation.
SUMS = {"rtol": 2e-5, "atol": 2e-5}


def draw(*shape, dtype=torch.float32, seed=0, mean=0.7, std=2.3):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std + mean).to(dtype)


def parameters(dim, dtype=torch.float32):
    return draw(dim, dtype=dtype, seed=1), draw(dim, dtype=dtype, seed=2)


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


# Leading shapes with every edge: no batch, one token, empty batch; strides from permutations.
leading_shapes = st.lists(st.integers(0, 4), max_size=3)
seeds = st.integers(0, 2**16)


class TestLayerNorm:
    @each_dtype
    def test_matches_torch(self, dtype):
        x, (weight, bias) = draw(3, 5, 96, dtype=dtype), parameters(96, dtype)
        expected = F.layer_norm(x, (96,), weight, bias, 1e-5)
        assert_close(layer_norm(x, weight, bias, eps=1e-5), expected, **TOLERANCE[dtype])

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_half_precision_is_float32_rounded_once(self, dtype):
        x, (weight, bias) = draw(4, 64, dtype=dtype), parameters(64, dtype)
        expected = layer_norm(x.float(), weight.float(), bias.float()).to(dtype)
        assert torch.equal(layer_norm(x, weight, bias), expected)

    @pytest.mark.parametrize("has_weight", [False, True])
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_matches_torch_with_parameters_left_out(self, has_weight, has_bias):
        x, (weight, bias) = draw(4, 24), parameters(24)
        weight, bias = (weight if has_weight else None), (bias if has_bias else None)
        expected = F.layer_norm(x, (24,), weight, bias)
        assert_close(layer_norm(x, weight, bias), expected, **TOLERANCE[torch.float32])

    def test_float32_parameters_on_half_input_keep_the_dtype_of_x(self):
        x, (weight, bias) = draw(4, 24, dtype=torch.bfloat16), parameters(24)
        y = layer_norm(x, weight, bias)
        assert y.dtype == torch.bfloat16
        assert_close(y, F.layer_norm(x, (24,), weight, bias), **TOLERANCE[torch.bfloat16])

    @given(leading_shapes, st.integers(1, 33), seeds)
    @settings(deadline=None, max_examples=40)
    def test_invariant_zero_mean_and_unit_variance(self, leading, dim, seed):
        x = draw(*leading, dim, dtype=torch.float64, seed=seed)
        y = layer_norm(x, eps=0.0 if dim > 1 else 1e-5)
        assert y.shape == x.shape
        assert_close(y, F.layer_norm(x, (dim,), eps=0.0 if dim > 1 else 1e-5), rtol=1e-9, atol=1e-9)
        if dim > 1:
            assert_close(y.mean(-1), torch.zeros(leading, dtype=x.dtype), rtol=0, atol=1e-9)
            assert_close(y.square().mean(-1), torch.ones(leading, dtype=x.dtype), rtol=1e-9, atol=0)

    @given(seeds, st.floats(0.1, 10), st.floats(-5, 5))
    @settings(deadline=None, max_examples=20)
    def test_invariant_to_scale_and_shift_of_a_token(self, seed, scale, shift):
        x = draw(3, 16, dtype=torch.float64, seed=seed)
        assert_close(layer_norm(scale * x + shift, eps=0.0), layer_norm(x, eps=0.0))

    def test_large_offset_does_not_cancel(self):
        x = draw(8, 64, dtype=torch.float64, mean=0.0, std=1.0)
        got = layer_norm((x + 4096).float())
        # The mean near 4096 is right to 2.4e-4; E[x^2] - E[x]^2 would be wrong by hundreds.
        assert_close(got.double(), layer_norm((x + 4096).float().double()), rtol=0, atol=1e-3)

    def test_constant_token_gives_the_bias(self):
        bias = draw(8)
        assert torch.equal(layer_norm(torch.full((2, 8), 3.0), None, bias), bias.expand(2, 8))

    def test_float16_values_whose_squares_overflow(self):
        x = torch.tensor([[3000.0, -3000.0, 1000.0, -1000.0]], dtype=torch.float16)
        assert_close(layer_norm(x), F.layer_norm(x.float(), (4,)).half())

    def test_non_contiguous_input(self):
        x = draw(6, 5, 4).permute(2, 1, 0)
        assert_close(layer_norm(x), F.layer_norm(x, (6,)), **TOLERANCE[torch.float32])

    def test_gradcheck_twice(self):
        x, weight, bias = leaves(draw(2, 5, dtype=torch.float64), *parameters(5, torch.float64))
        assert gradcheck(layer_norm, (x, weight, bias))
        assert gradgradcheck(layer_norm, (x, weight, bias))

    def test_module_loads_and_matches_torch(self):
        theirs = nn.LayerNorm(12)
        nn.init.normal_(theirs.weight), nn.init.normal_(theirs.bias)
        ours = LayerNorm(12)
        ours.load_state_dict(theirs.state_dict())
        x = draw(3, 12)
        assert_close(ours(x), theirs(x), **TOLERANCE[torch.float32])
        assert list(LayerNorm(12, bias=False).state_dict()) == ["weight"]
        assert repr(ours) == "LayerNorm(12, eps=1e-05, bias=True)"

    def test_statistics_match_torch(self):
        x = draw(3, 4, 10)
        _, mean, rstd = torch.native_layer_norm(x, (10,), None, None, 1e-5)
        assert_close(layer_norm_statistics(x), (mean, rstd), **TOLERANCE[torch.float32])


class TestRMSNorm:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_matches_torch_bit_for_bit(self, dtype):
        x, (weight, _) = draw(3, 5, 96, dtype=dtype), parameters(96, dtype)
        assert torch.equal(rms_norm(x, weight, eps=1e-6), F.rms_norm(x, (96,), weight, 1e-6))

    @each_dtype
    def test_matches_torch(self, dtype):
        x, (weight, _) = draw(3, 5, 96, dtype=dtype), parameters(96, dtype)
        expected = F.rms_norm(x, (96,), weight, 1e-6)
        assert_close(rms_norm(x, weight, eps=1e-6), expected, **TOLERANCE[dtype])

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    @pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=str)
    def test_matches_llama_bit_for_bit_with_gradients(self, dtype, weight_dtype):
        weight_dtype = weight_dtype or dtype
        theirs = LlamaRMSNorm(48, eps=1e-5).to(weight_dtype)
        theirs.weight.data = draw(48, dtype=weight_dtype, seed=1)
        ours = RMSNorm(48, eps=1e-5).to(weight_dtype)
        ours.load_state_dict(theirs.state_dict())
        (x,), (z,) = leaves(draw(2, 7, 48, dtype=dtype)), leaves(draw(2, 7, 48, dtype=dtype))
        y, expected = ours(x), theirs(z)
        assert y.dtype == expected.dtype and torch.equal(y, expected)
        y.backward(grad := draw(2, 7, 48, dtype=y.dtype, seed=3))
        expected.backward(grad)
        assert torch.equal(x.grad, z.grad)
        assert torch.equal(ours.weight.grad, theirs.weight.grad)

    def test_float64_stays_float64_where_llama_rounds(self):
        x = draw(4, 32, dtype=torch.float64)
        exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        assert_close(rms_norm(x), exact, **TOLERANCE[torch.float64])
        assert (LlamaRMSNorm(32)(x) - exact).abs().max() > 1e-9

    def test_half_precision_rounds_before_the_weight(self):
        x, (weight, _) = draw(64, 96, dtype=torch.bfloat16), parameters(96, torch.bfloat16)
        rounded_once = F.rms_norm(x, (96,), weight, 1e-6)
        assert not torch.equal(rms_norm(x, weight), rounded_once)
        assert torch.equal(rms_norm(x), F.rms_norm(x, (96,), None, 1e-6))

    @given(leading_shapes, st.integers(1, 33), seeds)
    @settings(deadline=None, max_examples=40)
    def test_invariant_unit_mean_square(self, leading, dim, seed):
        x = draw(*leading, dim, dtype=torch.float64, seed=seed)
        y = rms_norm(x, eps=0.0)
        assert y.shape == x.shape
        ones = torch.ones(leading, dtype=x.dtype)
        assert_close(y.square().mean(-1), ones, rtol=1e-9, atol=1e-9)

    @given(seeds, st.floats(0.1, 10), st.permutations(range(3)))
    @settings(deadline=None, max_examples=20)
    def test_invariant_to_scale_and_equivariant_to_strides(self, seed, scale, order):
        x = draw(3, 4, 5, dtype=torch.float64, seed=seed).permute(order)
        assert_close(rms_norm(scale * x, eps=0.0), rms_norm(x.contiguous(), eps=0.0))

    def test_is_not_invariant_to_shift(self):
        x = draw(4, 16)
        assert (rms_norm(x + 3) - rms_norm(x)).abs().max() > 0.5

    def test_layer_norm_is_rms_norm_of_the_centred_token(self):
        x = draw(4, 16, dtype=torch.float64)
        centred = x - x.mean(-1, keepdim=True)
        assert_close(layer_norm(x, eps=1e-5), rms_norm(centred, eps=1e-5))

    def test_zero_token_gives_zero_and_finite_gradient(self):
        (x,) = leaves(torch.zeros(2, 8))
        y = rms_norm(x)
        y.sum().backward()
        assert not y.any() and x.grad.isfinite().all()

    def test_float16_values_whose_squares_overflow(self):
        x = torch.tensor([[3000.0, -1000.0]], dtype=torch.float16)
        assert rms_norm(x).isfinite().all()
        assert not torch.rsqrt(x.square().mean(-1)).any(), "in float16 the mean square is infinite"

    def test_gradcheck_twice(self):
        x, weight = leaves(draw(2, 5, dtype=torch.float64), draw(5, dtype=torch.float64, seed=1))
        assert gradcheck(rms_norm, (x, weight))
        assert gradgradcheck(rms_norm, (x, weight))

    def test_module_shows_itself(self):
        assert repr(RMSNorm(12)) == "RMSNorm(12, eps=1e-06)"


class TestBackward:
    @pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 4, 7), (0, 7), (5, 1)], ids=str)
    def test_layer_norm_backward_matches_torch(self, shape):
        x, grad = draw(*shape, dtype=torch.float64), draw(*shape, dtype=torch.float64, seed=3)
        weight, bias = parameters(shape[-1], torch.float64)
        got = layer_norm_backward(grad, x, weight, *layer_norm_statistics(x))
        x, weight, bias = leaves(x, weight, bias)
        y = F.layer_norm(x, shape[-1:], weight, bias)
        expected = torch.autograd.grad(y, (x, weight, bias), grad)
        assert_close(got, expected, **TOLERANCE[torch.float64])

    @pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 4, 7), (0, 7), (5, 1)], ids=str)
    def test_rms_norm_backward_matches_torch(self, shape):
        x, grad = draw(*shape, dtype=torch.float64), draw(*shape, dtype=torch.float64, seed=3)
        weight, _ = parameters(shape[-1], torch.float64)
        got = rms_norm_backward(grad, x, weight, rms_norm_statistic(x))
        x, weight = leaves(x, weight)
        y = F.rms_norm(x, shape[-1:], weight, 1e-6)
        expected = torch.autograd.grad(y, (x, weight), grad)
        assert_close(got, expected, **TOLERANCE[torch.float64])

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_half_precision_matches_float64(self, dtype):
        x, grad = draw(3, 32, dtype=dtype), draw(3, 32, dtype=dtype, seed=3)
        weight, bias = parameters(32, dtype)
        wide = [t.double() for t in (grad, x, weight)]
        for got, expected in (
            (
                layer_norm_backward(grad, x, weight, *layer_norm_statistics(x)),
                layer_norm_backward(*wide, *layer_norm_statistics(wide[1])),
            ),
            (
                rms_norm_backward(grad, x, weight, rms_norm_statistic(x)),
                rms_norm_backward(*wide, rms_norm_statistic(wide[1])),
            ),
        ):
            assert_close(got, tuple(t.to(dtype) for t in expected), **TOLERANCE[dtype])

    @given(seeds, st.integers(3, 24))
    @settings(deadline=None, max_examples=20)
    def test_invariant_no_gradient_along_what_is_forgotten(self, seed, dim):
        x = draw(4, dim, dtype=torch.float64, seed=seed)
        grad = draw(4, dim, dtype=torch.float64, seed=seed + 1)
        grad_x = rms_norm_backward(grad, x, None, rms_norm_statistic(x, eps=0.0))[0]
        zero = torch.zeros(4, dtype=torch.float64)
        assert_close((grad_x * x).sum(-1), zero, rtol=0, atol=1e-7)
        grad_x = layer_norm_backward(grad, x, None, *layer_norm_statistics(x, eps=0.0))[0]
        assert_close((grad_x * x).sum(-1), zero, rtol=0, atol=1e-7)
        assert_close(grad_x.sum(-1), zero, rtol=0, atol=1e-7)

    def test_functions_pass_gradcheck(self):
        x, weight, bias = leaves(draw(2, 3, 5, dtype=torch.float64), *parameters(5, torch.float64))
        assert gradcheck(lambda *a: LayerNormFunction.apply(*a, 1e-5), (x, weight, bias))
        assert gradcheck(lambda *a: RMSNormFunction.apply(*a, 1e-6), (x, weight))
        assert gradcheck(lambda a: LayerNormFunction.apply(a, None, None, 1e-5), (x,))
        assert gradcheck(lambda a: RMSNormFunction.apply(a, None, 1e-6), (x,))

    @each_dtype
    def test_functions_equal_the_plain_forms(self, dtype):
        x, (weight, bias) = draw(3, 16, dtype=dtype), parameters(16, dtype)
        plain = layer_norm(x, weight, bias, eps=1e-5)
        assert torch.equal(LayerNormFunction.apply(x, weight, bias, 1e-5), plain)
        assert torch.equal(RMSNormFunction.apply(x, weight, 1e-6), rms_norm(x, weight))

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_functions_match_the_plain_gradients_with_a_float32_weight(self, dtype):
        for plain, by_hand, number in (
            (layer_norm, lambda *a: LayerNormFunction.apply(*a, 1e-5), 3),
            (rms_norm, lambda *a: RMSNormFunction.apply(*a, 1e-6), 2),
        ):
            gradients = []
            for norm in (plain, by_hand):
                inputs = leaves(*(draw(6, 32, dtype=dtype), *parameters(32))[:number])
                y = norm(*inputs)
                grad = draw(6, 32, dtype=y.dtype, seed=3)
                gradients.append(torch.autograd.grad(y, inputs, grad))
            assert [g.dtype for g in gradients[1]] == [dtype, *[torch.float32] * (number - 1)]
            assert_close(gradients[1], gradients[0], **TOLERANCE[dtype])

    def test_autocast_changes_no_gradient(self):
        x, weight, grad = draw(6, 32), draw(32, seed=1), draw(6, 32, seed=3)
        for backward, statistics in (
            (layer_norm_backward, layer_norm_statistics(x)),
            (rms_norm_backward, (rms_norm_statistic(x),)),
        ):
            expected = backward(grad, x, weight, *statistics)
            with torch.autocast("cpu", torch.bfloat16):
                got = backward(grad, x, weight, *statistics)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    def test_functions_keep_the_input_and_one_or_two_numbers_a_token(self):
        x, weight, bias = leaves(draw(6, 32), *parameters(32))
        assert _saved_bytes(lambda: RMSNormFunction.apply(x, weight, 1e-6)) == 4 * (6 * 32 + 6 + 32)
        kept = _saved_bytes(lambda: LayerNormFunction.apply(x, weight, bias, 1e-5))
        assert kept == 4 * (6 * 32 + 2 * 6 + 32)
        assert _saved_bytes(lambda: rms_norm(x, weight)) > 2 * 4 * 6 * 32

    def test_functions_refuse_a_second_derivative(self):
        x, weight = leaves(draw(2, 5), draw(5))
        y = RMSNormFunction.apply(x, weight, 1e-6)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    def test_rejects_gradient_of_another_shape(self):
        x, message = draw(3, 4), r"grad_output: expected shape \(3, 4\), got \(4, 3\)"
        with pytest.raises(ValueError, match=message):
            rms_norm_backward(draw(4, 3), x, None, rms_norm_statistic(x))
        with pytest.raises(ValueError, match=message):
            layer_norm_backward(draw(4, 3), x, None, *layer_norm_statistics(x))

    def test_rejects_statistics_that_would_broadcast(self):
        x = draw(4, 4)
        mean, rstd = layer_norm_statistics(x)
        with pytest.raises(ValueError, match=r"rstd: expected shape \(4, 1\), got \(4,\)"):
            rms_norm_backward(x, x, None, rstd[:, 0])
        with pytest.raises(ValueError, match=r"mean: expected shape \(4, 1\), got \(4,\)"):
            layer_norm_backward(x, x, None, mean[:, 0], rstd)


class TestBatchNorm:
    @each_dtype
    @pytest.mark.parametrize("shape", [(6, 5), (3, 5, 4), (2, 5, 3, 2), (1, 5, 4)], ids=str)
    def test_matches_torch_in_training(self, dtype, shape):
        x, (weight, bias) = draw(*shape, dtype=dtype), parameters(5)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight, bias, mean, var = (t.to(wide) for t in (weight, bias, bias, weight.abs()))
        result = batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3)
        their_mean, their_var = mean.clone(), var.clone()
        y = F.batch_norm(x, their_mean, their_var, weight, bias, True, 0.3)
        assert_close(result.y, y, **TOLERANCE[dtype])
        # torch's kernel for halves rounds its batch statistics; ours stay in float32.
        tolerance = TOLERANCE[dtype if dtype in HALVES else wide]
        assert_close(result[1:], (their_mean, their_var), **tolerance)

    @each_dtype
    def test_matches_torch_in_evaluation(self, dtype):
        x, (mean, bias) = draw(3, 5, 4, dtype=dtype), parameters(5)
        weight, var = draw(5, seed=3), draw(5, seed=4).abs()
        if dtype == torch.float64:
            mean, var, weight, bias = (t.double() for t in (mean, var, weight, bias))
        expected = F.batch_norm(x, mean, var, weight, bias)
        result = batch_norm(x, mean, var, weight, bias)
        assert_close(result.y, expected, **TOLERANCE[dtype])
        assert torch.equal(result.running_mean, mean) and torch.equal(result.running_var, var)

    def test_matches_torch_without_anything_optional(self):
        x = draw(6, 5)
        result = batch_norm(x, training=True)
        assert_close(result.y, F.batch_norm(x, None, None, training=True), **SUMS)
        assert result.running_mean is None and result.running_var is None

    def test_changes_no_input(self):
        x, mean, var = draw(6, 5), torch.zeros(5), torch.ones(5)
        batch_norm(x, mean, var, training=True)
        assert torch.equal(mean, torch.zeros(5)) and torch.equal(var, torch.ones(5))

    @pytest.mark.parametrize("momentum", [0.1, 1.0, None])
    def test_module_matches_torch_over_many_batches(self, momentum):
        ours, theirs = BatchNorm(5, momentum=momentum), nn.BatchNorm1d(5, momentum=momentum)
        nn.init.normal_(theirs.weight), nn.init.normal_(theirs.bias)
        ours.load_state_dict(theirs.state_dict())
        for seed in range(4):
            x = draw(4, 5, 3, seed=seed)
            assert_close(ours(x), theirs(x), **SUMS)
        for (name, a), (other, b) in zip(
            ours.state_dict().items(), theirs.state_dict().items(), strict=True
        ):
            assert name == other
            assert_close(a, b, **SUMS)
        assert_close(ours.eval()(x), theirs.eval()(x), **SUMS)
        assert repr(ours) == f"BatchNorm(5, momentum={momentum}, eps=1e-05)"

    def test_running_statistics_carry_no_graph(self):
        norm = BatchNorm(5)
        (x,) = leaves(draw(6, 5))
        norm(x)
        result = batch_norm(x, torch.zeros(5), torch.ones(5), training=True)
        assert result.y.requires_grad
        assert not norm.running_mean.requires_grad and not result.running_var.requires_grad

    @pytest.mark.parametrize("training", [False, True])
    def test_gradcheck(self, training):
        x, weight, bias = leaves(draw(4, 3, 2, dtype=torch.float64), *parameters(3, torch.float64))
        mean, var = draw(3, dtype=torch.float64), draw(3, dtype=torch.float64).abs() + 1

        def y(*args):
            return batch_norm(args[0], mean, var, *args[1:], training=training).y

        assert gradcheck(y, (x, weight, bias))

    @given(st.integers(2, 6), st.integers(1, 5), st.lists(st.integers(1, 3), max_size=2), seeds)
    @settings(deadline=None, max_examples=30)
    def test_invariant_zero_mean_and_unit_variance_over_the_batch(self, n, c, rest, seed):
        x = draw(n, c, *rest, dtype=torch.float64, seed=seed)
        y = batch_norm(x, training=True, eps=0.0).y
        over = [d for d in range(y.ndim) if d != 1]
        assert_close(y.mean(over), torch.zeros(c, dtype=y.dtype), rtol=0, atol=1e-8)
        assert_close(y.var(over, correction=0), torch.ones(c, dtype=y.dtype), rtol=1e-8, atol=0)

    def test_non_contiguous_input(self):
        x = draw(4, 3, 5).transpose(1, 2)
        assert_close(
            batch_norm(x, training=True).y, F.batch_norm(x, None, None, training=True), **SUMS
        )

    def test_empty_batch_in_evaluation(self):
        assert batch_norm(torch.empty(0, 3), torch.zeros(3), torch.ones(3)).y.shape == (0, 3)

    @pytest.mark.parametrize("shape", [(1, 5), (0, 5), (1, 5, 1)], ids=str)
    def test_rejects_one_value_per_channel_in_training(self, shape):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            batch_norm(torch.zeros(shape), training=True)

    def test_rejects_evaluation_without_statistics(self):
        with pytest.raises(ValueError, match="evaluation needs both"):
            batch_norm(draw(4, 5), torch.zeros(5), None)

    def test_rejects_parameters_of_another_length(self):
        with pytest.raises(ValueError, match=r"running_var: expected shape \(5,\), got \(4,\)"):
            batch_norm(draw(4, 5), torch.zeros(5), torch.ones(4))

    def test_rejects_missing_channels_and_integers(self):
        with pytest.raises(ValueError, match=r"expected \(examples, channels, ...\), got \(5,\)"):
            batch_norm(draw(5), training=True)
        with pytest.raises(TypeError, match="x: expected a floating dtype, got torch.int64"):
            batch_norm(torch.ones(4, 5, dtype=torch.int64), training=True)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
class TestRefusals:
    def test_rejects_weight_of_another_length(self, norm):
        with pytest.raises(ValueError, match=r"weight: expected shape \(8,\), got \(4,\)"):
            norm(draw(2, 8), draw(4))

    def test_rejects_weight_that_would_broadcast(self, norm):
        with pytest.raises(ValueError, match=r"weight: expected shape \(8,\), got \(1,\)"):
            norm(draw(2, 8), draw(1))

    def test_rejects_integers(self, norm):
        with pytest.raises(TypeError, match="x: expected a floating dtype, got torch.int64"):
            norm(torch.ones(2, 8, dtype=torch.int64))

    @pytest.mark.parametrize("shape", [(), (3, 0)], ids=str)
    def test_rejects_input_without_features(self, norm, shape):
        with pytest.raises(ValueError, match="at least one feature"):
            norm(torch.zeros(shape))


def test_layer_norm_rejects_bias_of_another_length():
    with pytest.raises(ValueError, match=r"bias: expected shape \(8,\), got \(4,\)"):
        layer_norm(draw(2, 8), draw(8), draw(4))


class TestPlacement:
    def setup_method(self):
        torch.manual_seed(0)
        self.linear, self.x = nn.Linear(8, 8), draw(3, 8)
        self.norm, self.after = nn.LayerNorm(8), nn.LayerNorm(8)
        nn.init.normal_(self.norm.weight), nn.init.normal_(self.after.weight)

    def test_matches_torch_encoder_layer(self):
        for norm_first in (False, True):
            layer = nn.TransformerEncoderLayer(
                8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first
            )
            x = draw(2, 5, 8)
            place = PreNorm if norm_first else PostNorm
            attend = place(layer._sa_block, layer.norm1)
            feed = place(layer._ff_block, layer.norm2)
            got = feed(attend(x, attn_mask=None, key_padding_mask=None))
            assert torch.equal(got, layer(x))

    def test_matches_the_formulas(self):
        f, norm, after, x = self.linear, self.norm, self.after, self.x
        assert torch.equal(PostNorm(f, norm)(x), norm(x + f(x)))
        assert torch.equal(PreNorm(f, norm)(x), x + f(norm(x)))
        assert torch.equal(SandwichNorm(f, norm, after)(x), x + after(f(norm(x))))
        assert torch.equal(DeepNorm(f, norm, alpha=2.5)(x), norm(2.5 * x + f(x)))

    def test_deepnorm_with_alpha_one_is_post_ln(self):
        assert torch.equal(
            DeepNorm(self.linear, self.norm, alpha=1.0)(self.x),
            PostNorm(self.linear, self.norm)(self.x),
        )

    def test_sublayer_arguments_pass_through(self):
        def scaled(x, factor, *, shift):
            return x * factor + shift

        for place in (
            PostNorm(scaled, self.norm),
            PreNorm(scaled, self.norm),
            SandwichNorm(scaled, self.norm, self.after),
            DeepNorm(scaled, self.norm, alpha=2.0),
        ):
            assert place(self.x, 3.0, shift=1.0).shape == self.x.shape

    def test_alpha_is_a_constant(self):
        block = DeepNorm(self.linear, self.norm, alpha=deepnorm_constants(12).alpha)
        assert set(block.state_dict()) == {
            "sublayer.weight", "sublayer.bias", "norm.weight", "norm.bias"
        }  # fmt: skip
        assert "alpha=2.2134" in repr(block)


class TestDeepNormConstants:
    @pytest.mark.parametrize(
        "num_layers, alpha, beta",
        [(12, 2.213, 0.3195), (100, 3.761, 0.1880), (500, 5.623, 0.1257)],
    )
    def test_matches_published_values(self, num_layers, alpha, beta):
        constants = deepnorm_constants(num_layers)
        assert math.isclose(constants.alpha, alpha, abs_tol=5e-4)
        assert math.isclose(constants.beta, beta, abs_tol=5e-5)

    def test_matches_published_encoder_decoder_values(self):
        encoder, decoder = deepnorm_encoder_decoder_constants(6, 6)
        expected = (1.418, 0.497, 2.060, 0.343)
        for got, value in zip((*encoder, *decoder), expected, strict=True):
            assert math.isclose(got, value, abs_tol=5e-4)

    def test_invariant_update_bound(self):
        """DeepNet, sec. 4.3: 2 N (v^2 + w^2) / alpha^2 = 1 with v = w = beta at every depth."""
        for num_layers in (1, 6, 48, 1000):
            alpha, beta = deepnorm_constants(num_layers)
            assert math.isclose(2 * num_layers * 2 * beta**2 / alpha**2, 1)

    def test_rejects_no_layers(self):
        with pytest.raises(ValueError, match="num_layers: expected at least 1, got 0"):
            deepnorm_constants(0)
        with pytest.raises(ValueError, match="num_decoder_layers: expected at least 1, got 0"):
            deepnorm_encoder_decoder_constants(6, 0)


def _saved_bytes(call):
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(storages.values())
