"""Oracles: peft on bitsandbytes' 4-bit layer, autograd on the dequantised weight, float64."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from reference.lora import LoRAConfig
from reference.quantization import (
    QLoRALinear,
    dequantize,
    double_quantize_4bit,
    frozen_linear,
    make_qlora,
    quantize_4bit,
    replace_linears,
)
from reference.transformer import Llama, LlamaConfig, next_token_loss
from tests.tolerances import TOLERANCE


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(weight, bias=None):
    layer = nn.Linear(*weight.shape[::-1], bias=bias is not None)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    return layer


def layer_with_adapter(weight, bias=None, *, rank=8, **options):
    layer = QLoRALinear(linear(weight, bias), LoRAConfig(rank=rank, alpha=16.0), **options)
    layer.adapter.a.data.copy_(draw(rank, weight.shape[1], seed=5))
    layer.adapter.b.data.copy_(draw(weight.shape[0], rank, seed=6))
    return layer


@pytest.mark.parametrize("is_double", [False, True])
def test_matches_peft_on_bitsandbytes(bnb, is_double):
    """Outputs and all gradients equal those of peft's Linear4bit, bit for bit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes as bitsandbytes
        from peft import LoraConfig, get_peft_model

    weight, bias, x = draw(64, 128) * 0.1, draw(64, seed=1), draw(2, 5, 128, seed=2)
    base = nn.ModuleDict({"fc": bitsandbytes.nn.Linear4bit(128, 64, compute_dtype=torch.float32)})
    base["fc"].weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=is_double
    )
    base["fc"].bias.data.copy_(bias)
    base.to("cpu")["fc"].support_avx512bf16_for_cpu = False
    base.is_loaded_in_4bit = True
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["fc"])
    theirs = get_peft_model(base, config).base_model.model["fc"]
    assert type(theirs).__name__ == "Linear4bit"
    ours = layer_with_adapter(weight, bias, is_double=is_double)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    A.data.copy_(ours.adapter.a), B.data.copy_(ours.adapter.b)
    grads = []
    for layer, parameters in ((ours, (ours.adapter.a, ours.adapter.b)), (theirs, (A, B))):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        grads.append((y, *torch.autograd.grad(y.sin().sum(), (leaf, *parameters))))
    for got, expected in zip(*grads, strict=True):
        assert_close(got, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_frozen_linear_matches_autograd_on_the_dequantized_weight(dtype):
    weight = double_quantize_4bit(draw(32, 64) * 0.1)
    values = dequantize(weight).to(dtype)
    x, bias = draw(3, 64, seed=1, dtype=dtype), draw(32, seed=2, dtype=dtype)
    outs = []
    for call in (lambda v: frozen_linear(v, weight, bias), lambda v: F.linear(v, values, bias)):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        (grad,) = torch.autograd.grad(y.float().square().sum(), leaf)
        outs.append((y, grad))
    for got, expected in zip(*outs, strict=True):
        assert got.dtype == dtype
        assert_close(got, expected, **TOLERANCE[dtype])


def test_gradcheck_through_the_frozen_base():
    weight = quantize_4bit(draw(4, 16), block_size=16)
    x = draw(3, 16, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: frozen_linear(v, weight), (x,))


def test_starts_as_the_quantized_layer():
    weight, bias, x = draw(32, 64), draw(32, seed=1), draw(5, 64, seed=2)
    layer = QLoRALinear(linear(weight, bias), LoRAConfig(rank=16, alpha=16.0))
    assert_close(layer(x), F.linear(x, dequantize(layer.quantized), bias))
    assert not layer.adapter.b.any() and layer.adapter.a.any()


def test_half_precision_input_meets_float32_adapters():
    layer, x = layer_with_adapter(draw(32, 64) * 0.1), draw(5, 64, seed=2, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), layer(x.float()), **TOLERANCE[torch.bfloat16])


def test_only_adapters_learn_and_nothing_wide_is_kept():
    weight, x = draw(256, 512), draw(4, 512, seed=1).requires_grad_()
    layer = layer_with_adapter(weight)
    assert sorted(name for name, _ in layer.named_parameters()) == ["adapter.a", "adapter.b"]
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert max(kept) < weight.numel() / 8
    y.sum().backward()
    assert x.grad.any() and all(parameter.grad.any() for parameter in layer.parameters())
    assert not any(buffer.requires_grad for buffer in layer.buffers())


@pytest.mark.parametrize("is_double", [False, True])
def test_state_is_saved_loaded_and_survives_a_cast(is_double):
    layer = layer_with_adapter(draw(16, 64), is_double=is_double)
    other = layer_with_adapter(draw(16, 64, seed=9), is_double=is_double)
    other.load_state_dict(layer.state_dict())
    x = draw(2, 64, seed=3)
    assert torch.equal(other(x), layer(x))
    cast = other.to(torch.bfloat16)
    assert cast.adapter.a.dtype == torch.bfloat16
    assert torch.equal(dequantize(cast.quantized), dequantize(layer.quantized))


def test_storage_is_four_and_an_eighth_bits():
    layer = layer_with_adapter(draw(512, 512), rank=1)
    stored = sum(buffer.nbytes for buffer in layer.buffers())
    # 4 + 8/64 + 32/(64 * 256), and one float32 for the mean of the scales.
    assert stored * 8 == 512 * 512 * (4 + 8 / 64 + 32 / (64 * 256)) + 32
    assert repr(layer).startswith("QLoRALinear(\n  512, 512, is_double=True\n")


def small_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, dim=64, hidden_dim=128, num_layers=2, num_heads=2, max_seq_len=32
    )
    return Llama(config)


def test_a_model_learns_through_its_four_bit_base():
    model = small_llama()
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    trained = make_qlora(model, LoRAConfig(rank=4, alpha=16.0))
    assert len(trained) == 2 * 2 * 7 and all(parameter.requires_grad for parameter in trained)
    assert type(model.lm_head) is nn.Linear and not model.embed_tokens.weight.requires_grad
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(30):
        loss = next_token_loss(model(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_rejects_bad_input():
    weight = quantize_4bit(draw(8, 64))
    with pytest.raises(ValueError, match=r"expected shape \(N, 32\) for x of shape \(2, 32\)"):
        frozen_linear(draw(2, 32), weight)
    with pytest.raises(ValueError, match=r"rank: expected at most 8 for a weight \(8, 64\)"):
        QLoRALinear(nn.Linear(64, 8), LoRAConfig(rank=9, alpha=16.0))
    with pytest.raises(ValueError, match="block_size: expected a divisor"):
        QLoRALinear(nn.Linear(5, 3), LoRAConfig(rank=1, alpha=16.0))
    with pytest.raises(ValueError, match="expected nn.Linear layers"):
        replace_linears(nn.Sequential(nn.ReLU()), lambda layer: layer)
