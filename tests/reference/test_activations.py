"""Oracles: torch's kernels, LlamaMLP, Phi3MLP, float64, gradcheck, closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from reference import activations as ours
from reference.activations import (
    MLP,
    FusedSwiGLU,
    GatedMLP,
    SwiGLU,
    SwiGLUFunction,
    active_share,
    dead_units,
    feed_forward_flops,
    feed_forward_parameters,
    pack_gate_up,
    swiglu,
    swiglu_backward,
    swiglu_hidden_dim,
    unpack_gate_up,
)
from tests.tolerances import TOLERANCE

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
HALVES = DTYPES[2:]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def gelu_by_sigmoid(x):
    return x * torch.sigmoid(1.702 * x)


# name: (ours, the oracle, our slope)
CURVES = {
    "relu": (ours.relu, F.relu, ours.relu_slope),
    "leaky_relu": (ours.leaky_relu, F.leaky_relu, ours.leaky_relu_slope),
    "leaky_relu, 0.3": (
        lambda x: ours.leaky_relu(x, negative_slope=0.3),
        lambda x: F.leaky_relu(x, 0.3),
        lambda x: ours.leaky_relu_slope(x, negative_slope=0.3),
    ),
    "sigmoid": (ours.sigmoid, torch.sigmoid, ours.sigmoid_slope),
    "tanh": (ours.tanh, torch.tanh, ours.tanh_slope),
    "swish, 1.7": (
        lambda x: ours.swish(x, beta=1.7),
        lambda x: F.silu(1.7 * x.double()).div(1.7).to(x.dtype),
        lambda x: ours.swish_slope(x, beta=1.7),
    ),
    "silu": (ours.silu, F.silu, ours.silu_slope),
    "gelu": (ours.gelu, F.gelu, ours.gelu_slope),
    "gelu, tanh": (
        lambda x: ours.gelu(x, approximate="tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: ours.gelu_slope(x, approximate="tanh"),
    ),
    "gelu, sigmoid": (
        lambda x: ours.gelu(x, approximate="sigmoid"),
        gelu_by_sigmoid,
        lambda x: ours.gelu_slope(x, approximate="sigmoid"),
    ),
}
each_curve = pytest.mark.parametrize("name", CURVES)
GATES = {
    "glu": (ours.glu, torch.sigmoid, ours.glu_backward),
    "reglu": (ours.reglu, F.relu, ours.reglu_backward),
    "geglu": (ours.geglu, F.gelu, ours.geglu_backward),
    "swiglu": (ours.swiglu, F.silu, ours.swiglu_backward),
}
each_gate = pytest.mark.parametrize("name", GATES)


def draw(*shape, dtype=torch.float32, seed=0, std=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


@each_curve
class TestCurves:
    @each_dtype
    def test_matches_torch(self, name, dtype):
        mine, theirs, _ = CURVES[name]
        x = draw(7, 501, dtype=dtype)
        y = mine(x)
        assert y.dtype == dtype
        assert_close(y, theirs(x), **TOLERANCE[dtype])

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_half_precision_is_float32_rounded_once_for_every_number(self, name, dtype):
        mine, theirs, slope = CURVES[name]
        x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        x = x[x.isfinite()]
        assert torch.equal(mine(x), mine(x.float()).to(dtype))
        modest = x[x.abs() < 1e12]  # beyond, the cube of GELU's tanh form leaves float32
        assert torch.equal(slope(modest), slope(modest.float()).to(dtype))
        assert_close(mine(x), theirs(x.double()).to(dtype), **TOLERANCE[dtype])

    @each_dtype
    def test_gradient_matches_torch(self, name, dtype):
        mine, theirs, slope = CURVES[name]
        x, grad = draw(7, 51, dtype=dtype), draw(7, 51, dtype=dtype, seed=1)
        (a,), (b,) = leaves(x), leaves(x.double())
        (expected,) = torch.autograd.grad(theirs(b), b, grad.double())
        (by_autograd,) = torch.autograd.grad(mine(a), a, grad)
        assert_close(by_autograd, expected.to(dtype), **TOLERANCE[dtype])
        assert slope(x).dtype == dtype
        assert_close(grad * slope(x), expected.to(dtype), **TOLERANCE[dtype])

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    def test_extreme_inputs_stay_finite_with_gradients(self, name, dtype):
        mine, theirs, slope = CURVES[name]
        (x,) = leaves(torch.tensor([-1e4, -200.0, -20.0, 0.0, 20.0, 200.0, 1e4], dtype=dtype))
        y = mine(x)
        y.sum().backward()
        assert_close(y, theirs(x), **TOLERANCE[dtype])
        assert x.grad.isfinite().all()
        assert_close(slope(x), x.grad, **TOLERANCE[dtype])

    def test_gradient_at_zero_matches_torch(self, name):
        mine, theirs, slope = CURVES[name]
        (a,), (b,) = leaves(torch.zeros(3)), leaves(torch.zeros(3))
        mine(a).sum().backward()
        theirs(b).sum().backward()
        assert torch.equal(a.grad, b.grad) and torch.equal(slope(torch.zeros(3)), b.grad)

    def test_gradcheck_twice(self, name):
        (x,) = leaves(draw(9, dtype=torch.float64))
        mine = CURVES[name][0]
        assert gradcheck(mine, (x,))
        assert gradgradcheck(mine, (x,))

    @pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3)], ids=str)
    def test_takes_scalars_and_nothing(self, name, shape):
        mine, theirs, slope = CURVES[name]
        x = torch.full(shape, 0.7)
        assert_close(mine(x), theirs(x), **TOLERANCE[torch.float32])
        assert slope(x).shape == shape

    def test_non_contiguous_input(self, name):
        mine, theirs, _ = CURVES[name]
        x = draw(6, 5, 4).permute(2, 1, 0)[::2]
        assert_close(mine(x), theirs(x), **TOLERANCE[torch.float32])

    def test_not_a_number_passes(self, name):
        assert CURVES[name][0](torch.tensor([math.nan])).isnan().all()

    def test_rejects_integers(self, name):
        mine, _, slope = CURVES[name]
        for call in (mine, slope):
            with pytest.raises(TypeError, match="x: expected a floating dtype, got torch.int64"):
                call(torch.arange(3))


class TestShapesOfCurves:
    @given(st.floats(-40, 40))
    @settings(deadline=None, max_examples=60)
    def test_invariant_symmetries(self, value):
        x = torch.tensor(value, dtype=torch.float64)
        exact = {"rtol": 1e-12, "atol": 1e-12}
        assert_close(ours.sigmoid(x) + ours.sigmoid(-x), torch.ones_like(x), **exact)
        assert torch.equal(ours.tanh(-x), -ours.tanh(x))
        assert_close(ours.tanh(x), 2 * ours.sigmoid(2 * x) - 1, **exact)
        for gated in (ours.silu, ours.gelu, lambda t: ours.gelu(t, approximate="tanh")):
            assert_close(gated(x) - gated(-x), x, **exact)

    def test_tanh_keeps_its_digits_near_zero(self):
        x = torch.logspace(-30, -1, 60)
        assert_close(ours.tanh(x), x.double().tanh().float(), rtol=5e-7, atol=0)

    def test_slopes_keep_their_digits_where_the_curve_is_flat(self):
        x = torch.tensor([10.0, 20.0, 40.0])
        exact = 4 * torch.exp(-2 * x.double()) / (1 + torch.exp(-2 * x.double())) ** 2
        assert_close(ours.tanh_slope(x), exact.float(), rtol=1e-6, atol=0)
        assert torch.equal(1 - torch.tanh(x) ** 2, torch.zeros(3))

    def test_swish_between_half_of_x_and_relu(self):
        x = draw(200, dtype=torch.float64)
        assert_close(ours.swish(x, beta=0.0), x / 2, **TOLERANCE[torch.float64])
        assert_close(ours.swish(x, beta=1e6), F.relu(x), **TOLERANCE[torch.float64])
        assert_close(ours.swish(x, beta=1.702), ours.gelu(x, approximate="sigmoid"))

    def test_swish_trains_its_beta(self):
        x, beta = leaves(draw(5, 3, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0]).double())
        assert gradcheck(lambda a, b: ours.swish(a, beta=b), (x, beta))
        ours.swish(x, beta=beta).sum().backward()
        by_hand = ours.swish_beta_slope(x, beta=beta).sum(0)
        assert_close(beta.grad, by_hand, **TOLERANCE[torch.float64])

    def test_silu_is_swish_with_beta_one(self):
        x = draw(1000)
        assert_close(ours.silu(x), ours.swish(x), **TOLERANCE[torch.float32])

    def test_minimum_of_silu(self):
        """-0.27846 at -1.27846, where the slope is zero."""
        x = torch.linspace(-3, 0, 300_001, dtype=torch.float64)
        y = ours.silu(x)
        assert_close(y.min().item(), -0.27846, rtol=0, atol=5e-6)
        assert_close(x[y.argmin()].item(), -1.27846, rtol=0, atol=1e-5)
        assert abs(ours.silu_slope(x[y.argmin()])) < 1e-5

    @pytest.mark.parametrize(
        "approximate, error, where", [("tanh", 4.732e-4, 2.699), ("sigmoid", 2.0335e-2, 2.270)]
    )
    def test_errors_of_gelus_approximations(self, approximate, error, where):
        x = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
        gap = (ours.gelu(x, approximate=approximate) - F.gelu(x)).abs()
        assert_close(gap.max().item(), error, rtol=2e-4, atol=0)
        assert_close(abs(x[gap.argmax()].item()), where, rtol=0, atol=2e-3)

    def test_gelu_is_not_silu(self):
        x = draw(500)
        assert (ours.gelu(x) - ours.silu(x)).abs().max() > 0.19

    def test_rejects_unknown_approximation(self):
        for call in (ours.gelu, ours.gelu_slope):
            with pytest.raises(ValueError, match="expected 'none', 'tanh' or 'sigmoid', got 'erf'"):
                call(draw(3), approximate="erf")


@each_gate
class TestGates:
    @each_dtype
    def test_matches_torch(self, name, dtype):
        mine, curve, _ = GATES[name]
        gate, up = draw(3, 40, dtype=dtype), draw(3, 40, dtype=dtype, seed=1)
        # In float64: torch's float32 GELU cancels in its tail, on some processors beyond tolerance.
        expected = curve(gate.double()) * up.double()
        assert_close(mine(gate, up), expected.to(dtype), **TOLERANCE[dtype])

    @each_dtype
    @pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 4, 7), (0, 7)], ids=str)
    def test_backward_matches_torch(self, name, dtype, shape):
        _, curve, backward = GATES[name]
        gate, up, grad = (draw(*shape, dtype=dtype, seed=i, std=1.0) for i in range(3))
        a, b = leaves(gate.double(), up.double())
        expected = torch.autograd.grad(curve(a) * b, (a, b), grad.double())
        got = backward(grad, gate, up)
        assert [g.dtype for g in got] == [dtype, dtype]
        assert_close(got, tuple(e.to(dtype) for e in expected), **TOLERANCE[dtype])

    def test_gradcheck_twice(self, name):
        gate, up = leaves(draw(4, 3, dtype=torch.float64), draw(4, 3, dtype=torch.float64, seed=1))
        assert gradcheck(GATES[name][0], (gate, up))
        assert gradgradcheck(GATES[name][0], (gate, up))

    @given(st.floats(-5, 5), st.integers(0, 2**16))
    @settings(deadline=None, max_examples=20)
    def test_invariant_linear_in_up_and_not_in_the_gate(self, name, factor, seed):
        mine = GATES[name][0]
        gate, up = (draw(16, dtype=torch.float64, seed=seed + i) for i in range(2))
        assert_close(mine(gate, factor * up), factor * mine(gate, up), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(mine(-gate, up), -mine(gate, up))

    def test_rejects_shapes_that_would_broadcast(self, name):
        mine, _, backward = GATES[name]
        with pytest.raises(ValueError, match=r"up: expected the gate's shape \(3, 4\), got \(4,\)"):
            mine(draw(3, 4), draw(4))
        with pytest.raises(ValueError, match=r"grad_output: expected shape \(3, 4\), got \(4,\)"):
            backward(draw(4), draw(3, 4), draw(3, 4))


class TestGLU:
    @each_dtype
    def test_matches_torchs_glu_which_takes_up_first(self, dtype):
        gate, up = draw(3, 8, dtype=dtype), draw(3, 8, dtype=dtype, seed=1)
        expected = F.glu(torch.cat((up, gate), -1))
        assert_close(ours.glu(gate, up), expected, **TOLERANCE[dtype])


def llama_mlp(model_dim, hidden_dim, dtype):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=model_dim, intermediate_size=hidden_dim, num_attention_heads=2)
    return LlamaMLP(config).to(dtype)


class TestSwiGLU:
    @each_dtype
    @pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 7, 48), (0, 48)], ids=str)
    def test_matches_llama_bit_for_bit_with_gradients(self, dtype, shape):
        theirs, mine = llama_mlp(48, 128, dtype), SwiGLU(48, 128).to(dtype)
        mine.load_state_dict(theirs.state_dict())
        assert list(mine.state_dict()) == list(theirs.state_dict())
        x = draw(*shape, dtype=dtype)
        (a,), (b,) = leaves(x), leaves(x)
        y, expected = mine(a), theirs(b)
        assert torch.equal(y, expected)
        grad = draw(*shape, dtype=dtype, seed=3)
        y.backward(grad)
        expected.backward(grad)
        assert torch.equal(a.grad, b.grad)
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)

    def test_matches_float64_formula(self):
        layer = SwiGLU(6, 10).double()
        x = draw(4, 6, dtype=torch.float64)
        gate, up = x @ layer.gate_proj.weight.T, x @ layer.up_proj.weight.T
        expected = (gate / (1 + torch.exp(-gate)) * up) @ layer.down_proj.weight.T
        assert_close(layer(x), expected, **TOLERANCE[torch.float64])

    def test_has_no_biases(self):
        assert [n for n, _ in SwiGLU(6, 10).named_parameters()] == [
            "gate_proj.weight",
            "up_proj.weight",
            "down_proj.weight",
        ]

    @pytest.mark.parametrize("layer", [SwiGLU, FusedSwiGLU, GatedMLP, MLP])
    def test_rejects_no_width(self, layer):
        with pytest.raises(ValueError, match="hidden_dim: expected at least 1, got 0"):
            layer(6, 0)


class TestFusedSwiGLU:
    @each_dtype
    def test_matches_phi3_bit_for_bit(self, dtype):
        config = Phi3Config(hidden_size=48, intermediate_size=128, pad_token_id=0)
        theirs, mine = Phi3MLP(config).to(dtype), FusedSwiGLU(48, 128).to(dtype)
        mine.load_state_dict(theirs.state_dict())
        x = draw(2, 7, 48, dtype=dtype)
        assert torch.equal(mine(x), theirs(x))

    @each_dtype
    def test_matches_the_separate_form(self, dtype):
        separate = SwiGLU(48, 128).to(dtype)
        fused = FusedSwiGLU.from_separate(separate)
        x = draw(2, 7, 48, dtype=dtype)
        assert fused.gate_up_proj.weight.dtype == dtype
        assert_close(fused(x), separate(x), **TOLERANCE[dtype])
        assert torch.equal(separate.gate_proj.weight, fused.gate_up_proj.weight[:128])
        with torch.no_grad():
            fused.down_proj.weight.zero_()
        assert separate.down_proj.weight.any(), "the weights are copies"

    def test_packing_is_undone_without_copies(self):
        gate, up = draw(5, 3), draw(5, 3, seed=1)
        packed = pack_gate_up(gate, up)
        back = unpack_gate_up(packed)
        assert torch.equal(back[0], gate) and torch.equal(back[1], up)
        assert back[0].untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()

    def test_rejects_odd_rows_and_unequal_matrices(self):
        with pytest.raises(ValueError, match="gate_up_weight: expected an even number of rows"):
            unpack_gate_up(draw(5, 3))
        with pytest.raises(ValueError, match=r"up: expected the gate's shape \(5, 3\)"):
            pack_gate_up(draw(5, 3), draw(4, 3))


class TestFunction:
    @each_dtype
    def test_equals_the_plain_form(self, dtype):
        gate, up = draw(3, 16, dtype=dtype), draw(3, 16, dtype=dtype, seed=1)
        a, b = leaves(gate, up)
        y = SwiGLUFunction.apply(a, b)
        assert torch.equal(y, swiglu(gate, up))
        grad = draw(3, 16, dtype=dtype, seed=2)
        y.backward(grad)
        assert_close((a.grad, b.grad), swiglu_backward(grad, gate, up), rtol=0, atol=0)

    def test_passes_gradcheck_and_refuses_a_second_derivative(self):
        gate, up = leaves(draw(2, 5, dtype=torch.float64), draw(2, 5, dtype=torch.float64, seed=1))
        assert gradcheck(SwiGLUFunction.apply, (gate, up))
        y = SwiGLUFunction.apply(gate, up)
        (grad,) = torch.autograd.grad(y.square().sum(), gate, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    def test_keeps_two_tensors_instead_of_three(self):
        gate, up = leaves(draw(6, 32), draw(6, 32, seed=1))
        one = 4 * 6 * 32
        assert _saved_bytes(lambda: SwiGLUFunction.apply(gate, up)) == 2 * one
        assert _saved_bytes(lambda: swiglu(gate, up)) == 3 * one


class TestOtherLayers:
    def test_mlp_matches_torch(self):
        torch.manual_seed(0)
        up, down = nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False)
        mine = MLP(6, 10, curve=ours.gelu)
        mine.load_state_dict({"up_proj.weight": up.weight, "down_proj.weight": down.weight})
        x = draw(4, 6)
        assert_close(mine(x), down(F.gelu(up(x))), **TOLERANCE[torch.float32])

    @each_gate
    def test_gated_mlp_takes_any_gate(self, name):
        mine, curve, _ = GATES[name]
        layer = GatedMLP(6, 10, gate_function=mine).double()
        x = draw(4, 6, dtype=torch.float64)
        expected = layer.down_proj(curve(layer.gate_proj(x)) * layer.up_proj(x))
        assert_close(layer(x), expected, **TOLERANCE[torch.float64])


class TestUnits:
    @given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**16), st.floats(-4, 2))
    @settings(deadline=None, max_examples=30)
    def test_invariant_dead_units_are_those_without_gradient(self, inputs, units, seed, shift):
        torch.manual_seed(seed)
        layer = nn.Linear(5, units)
        with torch.no_grad():
            layer.bias.add_(shift)
        pre = layer(draw(inputs, 5, seed=seed, std=1.0))
        # Positive gradients cannot cancel to zero.
        (F.relu(pre) * (1 + torch.rand_like(pre))).sum().backward()
        assert torch.equal(dead_units(pre), layer.bias.grad == 0)

    def test_share_of_inputs_that_reach_each_unit(self):
        pre = torch.tensor([[[1.0, -1.0, 0.0]], [[-2.0, -1.0, 0.0]]])
        assert_close(active_share(pre), torch.tensor([0.5, 0.0, 0.0]))
        assert dead_units(pre).tolist() == [False, True, True]

    def test_one_input_in_many_is_enough(self):
        pre = torch.full((1000, 1), -1.0)
        assert dead_units(pre).all()
        pre[17] = 0.1
        assert not dead_units(pre).any()

    def test_inactive_share_of_random_units_is_half_and_none_is_dead(self):
        pre = draw(2000, 64)
        assert abs(active_share(pre).mean() - 0.5) < 0.01 and not dead_units(pre).any()

    @pytest.mark.parametrize("shape", [(), (0, 4), (3, 0)], ids=str)
    def test_rejects_no_inputs(self, shape):
        with pytest.raises(ValueError, match="with at least one input"):
            active_share(torch.zeros(shape))


class TestWidth:
    @pytest.mark.parametrize(
        "model_dim, multiplier, multiple_of, published",
        [
            (4096, 1.0, 256, 11008),  # Llama 1 and 2, 7B
            (5120, 1.0, 256, 13824),  # 13B
            (6656, 1.0, 256, 17920),  # Llama 1, 33B
            (8192, 1.0, 256, 22016),  # Llama 1, 65B
            (8192, 1.3, 4096, 28672),  # Llama 2 and 3, 70B
            (4096, 1.3, 1024, 14336),  # Llama 3, 8B
            (2048, 1.5, 256, 8192),  # Llama 3.2, 1B
            (3072, 1.0, 256, 8192),  # Llama 3.2, 3B
            (16384, 1.2, 4096, 53248),  # Llama 3.1, 405B
        ],
    )
    def test_matches_published_llama_widths(self, model_dim, multiplier, multiple_of, published):
        width = swiglu_hidden_dim(model_dim, multiplier=multiplier, multiple_of=multiple_of)
        assert width == published

    @given(st.integers(1, 20_000), st.sampled_from([1, 64, 256, 4096]))
    @settings(deadline=None)
    def test_invariant_next_multiple_above_two_thirds(self, model_dim, multiple_of):
        width = swiglu_hidden_dim(model_dim, multiple_of=multiple_of)
        assert width % multiple_of == 0
        assert 8 * model_dim // 3 <= width < 8 * model_dim / 3 + multiple_of

    @given(st.integers(1, 5000))
    def test_invariant_two_thirds_keep_the_parameters(self, thirds):
        model_dim = 3 * thirds
        width = swiglu_hidden_dim(model_dim, multiple_of=1)
        gated = feed_forward_parameters(model_dim, width, is_gated=True)
        assert gated == feed_forward_parameters(model_dim, 4 * model_dim, is_gated=False)

    @pytest.mark.parametrize("layer, is_gated", [(MLP, False), (SwiGLU, True), (FusedSwiGLU, True)])
    def test_counts_match_the_modules(self, layer, is_gated):
        count = sum(p.numel() for p in layer(24, 56).parameters())
        assert feed_forward_parameters(24, 56, is_gated=is_gated) == count

    def test_flops_match_torchs_counter(self):
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            SwiGLU(24, 56)(draw(5, 24))
        flops = feed_forward_flops(24, 56, is_gated=True, num_tokens=5)
        assert flops == counter.get_total_flops()

    def test_rejects_what_is_not_positive(self):
        with pytest.raises(ValueError, match="model_dim: expected at least 1, got 0"):
            swiglu_hidden_dim(0)
        with pytest.raises(ValueError, match="multiple_of: expected at least 1, got 0"):
            swiglu_hidden_dim(64, multiple_of=0)
        with pytest.raises(ValueError, match="multiplier: expected more than 0, got 0"):
            swiglu_hidden_dim(64, multiplier=0)


def _saved_bytes(call):
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(storages.values())
