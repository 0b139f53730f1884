"""Oracles: torchao's AWQ observer bit for bit, brute force in float64, exact invariances."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from reference.normalization import RMSNorm
from reference.quantization import (
    activation_magnitude,
    awq_round_model,
    fold_into_norm,
    round_to_nearest,
    scale_of,
    scaled_rounding,
    search_scale,
)
from reference.transformer import Llama, LlamaConfig

INT4 = partial(round_to_nearest, bits=4, granularity=32, is_symmetric=False)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def skewed(*shape, seed=1):
    """Activations of which a few channels are far larger than the others."""
    return draw(*shape, seed=seed) * draw(shape[-1], seed=seed + 1).mul(1.5).exp()


@pytest.mark.parametrize("bits, mapping", [(4, "SYMMETRIC"), (4, "ASYMMETRIC"), (3, "SYMMETRIC")])
def test_matches_torchao_with_its_rounding(ao, bits, mapping):
    weight, x, config = draw(48, 64), skewed(3, 20, 64), ao.intx(bits, 32, mapping)
    observer = ao.Observer(weight, None, config)
    observer(x, None)
    found = search_scale(weight, x, lambda w: ao.rounding(w, config))
    assert torch.equal(found.scale, observer.calculate_qparams())
    assert found.alpha > 0


def test_matches_torchao_with_our_rounding(ao):
    weight, x = draw(48, 64), skewed(3, 20, 64)
    observer = ao.Observer(weight, None, ao.intx(4, 32, "ASYMMETRIC"))
    observer(x, None)
    assert torch.equal(search_scale(weight, x, INT4).scale, observer.calculate_qparams())


def test_matches_brute_force_in_float64():
    weight, x = draw(24, 32).double(), skewed(40, 32).double()
    losses = []
    for i in range(20):
        s = x.abs().mean(0) ** (i / 20)
        s = s / (s.max() * s.min()).sqrt()
        scaled = (weight * s).view(24, 1, 32)
        low, high = scaled.amin(-1, True).clamp(max=0), scaled.amax(-1, True).clamp(min=0)
        step = (high - low) / 15
        zero = (-low / step).round()
        rounded = (((scaled / step).round() + zero).clamp(0, 15) - zero) * step
        error = x @ (rounded.view(24, 32) / s - weight).mT
        losses.append(error.square().mean().item())
    found = search_scale(weight, x, INT4)
    assert found.losses == pytest.approx(losses, rel=1e-9)
    assert found.alpha == min(range(20), key=losses.__getitem__) / 20


def test_alpha_zero_is_plain_rounding():
    weight, x = draw(8, 32), skewed(10, 32)
    found = search_scale(weight, x, INT4, num_alphas=1)
    assert found.alpha == 0 and torch.equal(found.scale, torch.ones(32))
    assert torch.equal(scaled_rounding(weight, found.scale, INT4), INT4(weight))


def test_invariant_never_worse_than_plain_rounding_and_better_on_skewed_input():
    weight, x = draw(64, 128), skewed(64, 128)
    found = search_scale(weight, x, INT4)
    assert min(found.losses) == found.losses[round(found.alpha * 20)]
    assert min(found.losses) < 0.7 * found.losses[0]


def test_invariant_without_rounding_scales_cancel():
    weight, x = draw(8, 32), skewed(10, 32)
    scale = scale_of(activation_magnitude(x), 0.5)
    assert_close(scaled_rounding(weight, scale, lambda w: w), weight)
    assert_close(F.linear(x / scale, weight * scale), F.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_scale_matches_the_formula_and_silent_channels_stay_finite():
    magnitude = torch.tensor([0.0, 1.0, 4.0, 100.0])
    assert torch.equal(scale_of(magnitude, 0.0), torch.ones(4))
    clamped = torch.tensor([1e-4, 1.0, 2.0, 10.0])
    assert_close(scale_of(magnitude, 0.5), clamped / (1e-3**0.5))


def test_folded_into_the_norm_nothing_is_divided_at_run_time():
    x, weight, norm = draw(6, 32), draw(8, 32, seed=1), RMSNorm(32)
    scale = scale_of(activation_magnitude(skewed(10, 32)), 0.6)
    rounded = INT4(weight * scale)
    expected = F.linear(norm(x) / scale, rounded)
    norm.weight.data = fold_into_norm(norm.weight.data, scale)
    assert_close(F.linear(norm(x), rounded), expected, rtol=1e-4, atol=1e-4)


def small_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, dim=64, hidden_dim=128, num_layers=2, num_heads=2, max_seq_len=32
    )
    return Llama(config)


def test_a_model_is_rounded_layer_by_layer_with_shared_scales():
    model, plain = small_llama(), small_llama()
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens)
    alphas = awq_round_model(model, tokens, INT4, num_alphas=5)
    assert len(alphas) == 14 and model.lm_head.weight.equal(plain.lm_head.weight)
    for layer in range(2):
        inside = f"layers.{layer}."
        assert len({alphas[f"{inside}self_attn.{p}_proj"] for p in "qkv"}) == 1
        assert alphas[f"{inside}mlp.gate_proj"] == alphas[f"{inside}mlp.up_proj"]
    for layer in plain.modules():
        if isinstance(layer, nn.Linear) and layer is not plain.lm_head:
            layer.weight.data = INT4(layer.weight.data)
    with torch.no_grad():
        awq_error = (model(tokens) - before).square().mean()
        plain_error = (plain(tokens) - before).square().mean()
    assert 0 < awq_error < plain_error


def test_rejects_bad_input():
    weight, x = draw(8, 32), skewed(10, 32)
    for bad in (x[:, 1:], x[0], x[:0]):
        with pytest.raises(ValueError, match="x: expected one or more tokens of 32 channels"):
            search_scale(weight, bad, INT4)
    with pytest.raises(ValueError, match="finite"):
        search_scale(weight, x * float("nan"), INT4)
    with pytest.raises(ValueError, match="num_alphas: expected at least 1, got 0"):
        search_scale(weight, x, INT4, num_alphas=0)
    with pytest.raises(ValueError, match=r"scale: expected shape \(32,\), got \(16,\)"):
        fold_into_norm(torch.ones(32), torch.ones(16))
    with pytest.raises(ValueError, match="expected nn.Linear layers"):
        awq_round_model(nn.ReLU(), torch.zeros(1, 2).long(), INT4)
