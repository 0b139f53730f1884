import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama import modeling_llama

from reference.attention import (
    Attention,
    FusedAttention,
    KVCache,
    additive_mask,
    causal_mask,
    grouped_query_attention,
    merge_heads,
    padding_mask,
    scaled_dot_product_attention,
    split_heads,
)
from tests.tolerances import TOLERANCE

DIM, HEADS, KV_HEADS, HEAD_DIM = 24, 6, 2, 8


def make_x(batch=2, seq_len=7, dim=DIM, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, seq_len, dim, generator=rng, dtype=dtype)


def make_layer(cls=Attention, seed=0, **kwargs):
    torch.manual_seed(seed)
    return cls(DIM, **{"num_heads": HEADS, "num_kv_heads": KV_HEADS, **kwargs})


def make_llama(bias=False):
    """transformers' eager Llama attention, and ours with its weights and its rotation."""
    config = LlamaConfig(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        attention_bias=bias,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = modeling_llama.LlamaAttention(config, layer_idx=0)
    ours = Attention(DIM, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, modeling_llama.LlamaRotaryEmbedding(config)


def rotate_by(cos, sin):
    return lambda x: modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_matches_llama_bit_for_bit(bias, kind):
    theirs, ours, rotary = make_llama(bias)
    x, position = make_x(), torch.arange(7)[None]
    cos, sin = rotary(x, position)
    mask = causal_mask(7)
    additive = additive_mask(mask, x.dtype)
    expected, _ = theirs(x, (cos, sin), additive[None, None])
    actual = ours(x, mask if kind == "boolean" else additive, rotate=rotate_by(cos, sin))
    assert torch.equal(actual, expected)
    names = dict(theirs.named_parameters())
    theirs_grad = torch.autograd.grad(expected.square().sum(), names.values())
    ours_grad = torch.autograd.grad(actual.square().sum(), ours.parameters())
    for name, a, e in zip(names, ours_grad, theirs_grad, strict=True):
        assert torch.equal(a, e), name


def test_matches_llama_with_a_dynamic_cache_bit_for_bit():
    theirs, ours, rotary = make_llama()
    x = make_x(seq_len=9)
    caches = DynamicCache(), DynamicCache()
    for start, stop in [(0, 5), (5, 8), (8, 9)]:
        piece = x[:, start:stop]
        cos, sin = rotary(piece, torch.arange(start, stop)[None])
        mask = causal_mask(stop - start, stop)
        additive = additive_mask(mask, x.dtype)[None, None]
        expected, _ = theirs(piece, (cos, sin), additive, past_key_values=caches[0])
        actual = ours(piece, mask, rotate=rotate_by(cos, sin), cache=caches[1])
        assert torch.equal(actual, expected)
    assert isinstance(caches[1], KVCache)
    assert torch.equal(caches[0].layers[0].keys, caches[1].layers[0].keys)


@pytest.mark.parametrize("bias", [False, True])
def test_matches_multihead_attention(bias):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(DIM, HEADS, bias=bias, batch_first=True).double()
    if bias:
        nn.init.normal_(theirs.in_proj_bias)
        nn.init.normal_(theirs.out_proj.bias)
    ours = FusedAttention(DIM, num_heads=HEADS, bias=bias).double()
    names = {"in_proj_": "qkv_proj.", "out_proj": "o_proj"}
    state = theirs.state_dict()
    for old, new in names.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    ours.load_state_dict(state)
    x, context = make_x(dtype=torch.float64), make_x(seq_len=4, dtype=torch.float64, seed=1)
    tolerance = TOLERANCE[torch.float64]
    lengths = torch.tensor([7, 3])
    is_real = padding_mask(lengths, 7)

    expected, _ = theirs(
        x, x, x, attn_mask=~causal_mask(7), key_padding_mask=~is_real[:, 0, 0], need_weights=False
    )
    torch.testing.assert_close(ours(x, causal_mask(7) & is_real), expected, **tolerance)

    expected, _ = theirs(x, context, context, need_weights=False)
    torch.testing.assert_close(ours(x, context=context), expected, **tolerance)


@pytest.mark.parametrize("bias", [False, True])
def test_fused_matches_separate(bias):
    separate, fused = (make_layer(cls, bias=bias) for cls in (Attention, FusedAttention))
    parts = [separate.q_proj, separate.k_proj, separate.v_proj]
    with torch.no_grad():
        fused.qkv_proj.weight.copy_(torch.cat([p.weight for p in parts]))
        if bias:
            fused.qkv_proj.bias.copy_(torch.cat([p.bias for p in parts]))
    fused.o_proj.load_state_dict(separate.o_proj.state_dict())
    x, context = make_x(), make_x(seq_len=3, seed=1)
    tolerance = TOLERANCE[torch.float32]
    torch.testing.assert_close(fused(x), separate(x), **tolerance)
    torch.testing.assert_close(fused(x, context=context), separate(x, context=context), **tolerance)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(7)), st.integers(0, 99))
def test_invariant_without_positions_order_is_lost(order, seed):
    layer, x = make_layer(seed=seed).double(), make_x(dtype=torch.float64, seed=seed)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], **TOLERANCE[x.dtype])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 99))
def test_invariant_pieces_through_a_cache_equal_the_whole(pieces, seed):
    layer = make_layer(seed=seed, layer=2).double()
    x = make_x(seq_len=sum(pieces), dtype=torch.float64, seed=seed)
    cache, start, outs = DynamicCache(), 0, []
    for length in pieces:
        stop = start + length
        outs.append(layer(x[:, start:stop], causal_mask(length, stop), cache=cache))
        start = stop
    whole = layer(x, causal_mask(start))
    torch.testing.assert_close(torch.cat(outs, 1), whole, **TOLERANCE[x.dtype])


def test_invariant_keys_are_rotated_before_they_are_cached():
    layer, x, cache = make_layer(), make_x(), DynamicCache()
    layer(x, rotate=lambda y: 2 * y, cache=cache)
    expected_k = 2 * split_heads(layer.k_proj(x), KV_HEADS)
    assert torch.equal(cache.layers[0].keys, expected_k)
    assert torch.equal(cache.layers[0].values, split_heads(layer.v_proj(x), KV_HEADS))


def test_attend_receives_kv_heads_unrepeated():
    layer, x, seen = make_layer(), make_x(), []

    def attend(q, k, v, mask):
        seen.extend([q.shape[1], k.shape[1], v.shape[1], mask])
        return grouped_query_attention(q, k, v, mask)

    mask = causal_mask(7)
    out = layer(x, mask, attend=attend)
    assert seen[:3] == [HEADS, KV_HEADS, KV_HEADS] and seen[3] is mask
    torch.testing.assert_close(out, layer(x, mask), **TOLERANCE[x.dtype])


def test_dropout_enters_through_attend():
    layer, x = make_layer(), make_x()
    drop = functools.partial(scaled_dot_product_attention, dropout_rate=0.5)
    first, again = (
        layer(x, attend=functools.partial(drop, generator=torch.Generator().manual_seed(0)))
        for _ in range(2)
    )
    assert torch.equal(first, again) and not torch.allclose(first, layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_runs_in_every_dtype(dtype):
    layer = make_layer().to(dtype)
    out = layer(make_x(dtype=dtype), causal_mask(7))
    assert out.dtype == dtype and out.isfinite().all()


def test_length_one_and_empty_batch():
    layer = make_layer()
    one = make_x(seq_len=1)
    values = split_heads(layer.v_proj(one), KV_HEADS).repeat_interleave(HEADS // KV_HEADS, 1)
    torch.testing.assert_close(
        layer(one), layer.o_proj(merge_heads(values)), **TOLERANCE[one.dtype]
    )
    assert layer(make_x(batch=0)).shape == (0, 7, DIM)


def test_heads_split_without_a_copy_and_merge_back():
    x = make_x()
    heads = split_heads(x, HEADS)
    assert heads.data_ptr() == x.data_ptr()
    assert torch.equal(heads[1, 3, 4], x[1, 4, 12:16])
    assert torch.equal(merge_heads(heads), x)


def test_head_width_may_differ_from_the_model_width():
    layer = make_layer(num_heads=5, num_kv_heads=1, head_dim=HEAD_DIM)
    assert layer.q_proj.weight.shape == (40, DIM) and layer.o_proj.weight.shape == (DIM, 40)
    assert layer(make_x()).shape == (2, 7, DIM)


def test_rejects_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="x: expected a width that 5 heads divide, got 24"):
        split_heads(make_x(), 5)
    with pytest.raises(ValueError, match="dim: expected a multiple of num_heads=5, got 24"):
        Attention(DIM, num_heads=5)


@pytest.mark.parametrize("num_kv_heads", [0, 4, 12])
def test_rejects_kv_heads(num_kv_heads):
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor of num_heads=6"):
        Attention(DIM, num_heads=HEADS, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize("num_heads", [0, -2])
def test_rejects_no_heads(num_heads):
    with pytest.raises(ValueError, match=f"num_heads: expected at least 1, got {num_heads}"):
        Attention(DIM, num_heads=num_heads, num_kv_heads=1)


def test_rejects_context_with_positions():
    layer, x = make_layer(), make_x()
    for extra in ({"cache": DynamicCache()}, {"rotate": torch.neg}):
        with pytest.raises(ValueError, match="context: expected no cache and no rotate"):
            layer(x, context=x, **extra)
