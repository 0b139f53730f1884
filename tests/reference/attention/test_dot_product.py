import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_lower_right

from autograder.spies import largest_new_tensor
from reference.attention import (
    additive_mask,
    attention_weights,
    causal_mask,
    dropout,
    grouped_query_attention,
    masked_softmax,
    padding_mask,
    repeat_kv,
    scaled_dot_product_attention,
)
from tests.tolerances import TOLERANCE

FORMS = [scaled_dot_product_attention, grouped_query_attention]
both_forms = pytest.mark.parametrize("attend", FORMS, ids=["repeat_kv", "grouped"])


def make_qkv(
    batch=2, heads=6, kv_heads=3, queries=5, keys=7, dim=8, *, dtype=torch.float64, seed=0
):
    rng = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, queries, dim)] + 2 * [(batch, kv_heads, keys, dim)]
    return tuple(torch.randn(s, generator=rng, dtype=torch.float64).to(dtype) for s in shapes)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE[expected.dtype])


@both_forms
@pytest.mark.parametrize("kv_heads", [6, 3, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("masked", ["none", "boolean", "additive", "is_causal"])
def test_matches_torch_with_gradients(attend, kv_heads, masked):
    q, k, v = make_qkv(kv_heads=kv_heads)
    mask = causal_mask(5, 7, offset=0)
    ours = {"none": None, "additive": additive_mask(mask, q.dtype)}.get(masked, mask)
    theirs = {"is_causal": True} if masked == "is_causal" else {"attn_mask": ours}
    outcomes = []
    for function in (
        functools.partial(attend, mask=ours),
        functools.partial(F.scaled_dot_product_attention, enable_gqa=True, **theirs),
    ):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*inputs)
        outcomes.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for actual, expected in zip(*outcomes, strict=True):
        assert_close(actual, expected)


@both_forms
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_torch_in_every_dtype(attend, dtype):
    q, k, v = make_qkv(dtype=dtype)
    mask = causal_mask(5, 7)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    actual = attend(q, k, v, mask)
    assert actual.dtype == dtype
    assert_close(actual, expected)


@both_forms
def test_matches_torch_lower_right(attend):
    q, k, v = make_qkv(kv_heads=6)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(5, 7))
    assert_close(attend(q, k, v, causal_mask(5, 7)), expected)


@both_forms
def test_matches_the_definition_one_query_at_a_time(attend):
    q, k, v = make_qkv()
    out = torch.empty_like(q)
    for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(5)):
        keys, values = k[b, h // 2], v[b, h // 2]
        scores = torch.stack([q[b, h, t].dot(key) for key in keys]) / 8**0.5
        out[b, h, t] = (scores.softmax(0)[:, None] * values).sum(0)
    assert_close(attend(q, k, v), out)


@both_forms
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_fully_masked_rows_match_torch(attend, kind):
    """torch 2.13 gives zeros and zero gradients, in both kinds of mask."""
    q, k, v = make_qkv(kv_heads=6)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    mask = mask if kind == "boolean" else additive_mask(mask, q.dtype)
    outcomes = []
    for function in (attend, F.scaled_dot_product_attention):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*inputs, mask)
        outcomes.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for actual, expected in zip(*outcomes, strict=True):
        assert_close(actual, expected)
    assert (outcomes[0][0][:, :, 2] == 0).all() and (outcomes[0][1][:, :, 2] == 0).all()


@both_forms
@pytest.mark.parametrize("mask", [None, causal_mask(5, 0)], ids=["none", "causal"])
def test_no_keys_at_all_give_zeros(attend, mask):
    q, k, v = make_qkv(keys=0)
    assert torch.equal(attend(q, k, v, mask), torch.zeros_like(q))


@both_forms
def test_learned_bias_gets_the_gradient_that_torch_gives(attend):
    q, k, v = make_qkv(kv_heads=6)
    bias = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    bias[:, 2, 4:] = -torch.inf
    outcomes = []
    for function in (attend, F.scaled_dot_product_attention):
        leaf = bias.clone().requires_grad_()
        out = function(q, k, v, leaf)
        outcomes.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for actual, expected in zip(*outcomes, strict=True):
        assert_close(actual, expected)


@both_forms
def test_matches_torch_under_autocast(attend):
    q, k, v = make_qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = attend(q, k, v, causal_mask(5, 7))
        expected = F.scaled_dot_product_attention(
            q, k, v, attn_mask=causal_mask(5, 7), enable_gqa=True
        )
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert_close(actual, expected)


@both_forms
def test_values_may_have_a_width_of_their_own(attend):
    q, k, _ = make_qkv()
    v = torch.randn(2, 3, 7, 5, dtype=q.dtype)
    assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@both_forms
def test_scale_is_passed_on(attend):
    q, k, v = make_qkv()
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    assert_close(attend(q, k, v, scale=0.3), expected)


@both_forms
def test_non_contiguous_inputs(attend):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make_qkv())
    assert not k.is_contiguous()
    assert_close(attend(q, k, v), attend(*(x.contiguous() for x in (q, k, v))))


@both_forms
def test_large_half_precision_scores_stay_finite(attend):
    """The softmax is in float32; a mask of float16's lowest number would overflow in float16."""
    q, k, v = make_qkv(kv_heads=6, dtype=torch.float16)
    lowest = torch.zeros(5, 7, dtype=torch.float16)
    lowest[:, 4:] = torch.finfo(torch.float16).min
    out = attend(-40 * q.abs(), 40 * k.abs(), v, lowest)
    assert out.isfinite().all()


@both_forms
def test_queries_scaled_first_avoid_overflow_in_half_precision(attend):
    q, k, v = (torch.full((1, 1, 3, 64), 40.0, dtype=torch.float16) for _ in range(3))
    assert attend(q, k, v).isnan().all()
    expected = F.scaled_dot_product_attention(q, k, v)
    assert_close(attend(q / 8, k, v, scale=1.0), expected)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    queries=st.integers(0, 5),
    keys=st.integers(1, 6),
    dim=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_invariant_both_forms_and_masks_agree(batch, kv_heads, group, queries, keys, dim, seed):
    q, k, v = make_qkv(batch, kv_heads * group, kv_heads, queries, keys, dim, seed=seed)
    mask = torch.rand(batch, 1, queries, keys, generator=torch.Generator().manual_seed(seed)) > 0.4
    expected = scaled_dot_product_attention(q, k, v, mask)
    assert expected.shape == q.shape and expected.isfinite().all()
    for attend in FORMS:
        assert_close(attend(q, k, v, mask), expected)
        assert_close(attend(q, k, v, additive_mask(mask, q.dtype)), expected)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(7)), st.integers(0, 99))
def test_invariant_order_of_keys_does_not_matter(order, seed):
    q, k, v = make_qkv(seed=seed)
    permuted = scaled_dot_product_attention(q, k[:, :, order], v[:, :, order])
    assert_close(permuted, scaled_dot_product_attention(q, k, v))


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 99))
def test_invariant_queries_are_independent(order, seed):
    q, k, v = make_qkv(seed=seed)
    permuted = scaled_dot_product_attention(q[:, :, order], k, v)
    assert_close(permuted, scaled_dot_product_attention(q, k, v)[:, :, order])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(0, 99))
def test_invariant_the_future_has_no_influence(seen, seed):
    q, k, v = make_qkv(queries=8, keys=8, seed=seed)
    before = scaled_dot_product_attention(q, k, v, causal_mask(8))[:, :, :seen]
    k[:, :, seen:], v[:, :, seen:] = 1e3, -1e3
    after = scaled_dot_product_attention(q, k, v, causal_mask(8))[:, :, :seen]
    assert torch.equal(before, after)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=2, max_size=2), st.sampled_from(["left", "right"]))
def test_invariant_ragged_lengths_equal_each_sequence_alone(lengths, side):
    q, k, v = make_qkv()
    out = scaled_dot_product_attention(q, k, v, padding_mask(torch.tensor(lengths), 7, side=side))
    for b, length in enumerate(lengths):
        real = slice(0, length) if side == "right" else slice(7 - length, 7)
        alone = scaled_dot_product_attention(q[b, None], k[b, None, :, real], v[b, None, :, real])
        assert_close(out[b, None], alone)


def test_invariant_one_query_in_the_cache_equals_the_last_row():
    q, k, v = make_qkv(queries=7)
    full = scaled_dot_product_attention(q, k, v, causal_mask(7))
    step = scaled_dot_product_attention(q[:, :, -1:], k, v, causal_mask(1, 7))
    assert_close(step, full[:, :, -1:])


def test_invariant_weights_are_probabilities():
    q, k, _ = make_qkv()
    weights = attention_weights(q, k, causal_mask(5, 7))
    assert (weights >= 0).all() and (weights[..., 0, 3:] == 0).all()
    assert_close(weights.sum(-1), torch.ones(2, 6, 5, dtype=q.dtype))


def test_invariant_softmax_ignores_a_constant():
    scores = torch.randn(4, 6, dtype=torch.float64)
    assert_close(masked_softmax(scores + 1e4), masked_softmax(scores))


def test_invariant_grouped_form_allocates_no_keys_or_values():
    q, k, v = make_qkv(batch=1, heads=8, kv_heads=2, queries=1, keys=512, dim=64)
    with largest_new_tensor() as repeated:
        scaled_dot_product_attention(q, k, v)
    with largest_new_tensor() as grouped:
        grouped_query_attention(q, k, v)
    assert repeated.bytes >= 4 * k.nbytes
    assert grouped.bytes < k.nbytes / 4


def test_repeat_kv_matches_torch_and_not_tile():
    x = torch.randn(2, 3, 4, 5)
    repeated = repeat_kv(x, 2)
    assert torch.equal(repeated, torch.repeat_interleave(x, 2, dim=1))
    assert not torch.equal(repeated, x.repeat(1, 2, 1, 1))
    assert repeat_kv(x, 1) is x


def test_dropout_keeps_the_mean_and_either_sign():
    x = torch.randn(400, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = dropout(x, 0.25, torch.Generator().manual_seed(1))
    for of_sign in (x > 0, x < 0):
        assert abs((out[of_sign] == 0).double().mean() - 0.25) < 0.01
    kept = out != 0
    assert_close(out[kept], x[kept] / 0.75)
    assert torch.equal(out, dropout(x, 0.25, torch.Generator().manual_seed(1)))
    assert dropout(x, 0.0) is x


@both_forms
def test_dropout_falls_on_probabilities(attend):
    q, k, v = make_qkv()
    ones = torch.ones_like(v)
    out = attend(q, k, ones, dropout_rate=0.5, generator=torch.Generator().manual_seed(3))
    weights = dropout(attention_weights(q, k), 0.5, torch.Generator().manual_seed(3))
    assert_close(out, weights.sum(-1, keepdim=True).expand_as(out))
    assert not torch.allclose(out, torch.ones_like(out))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rejects_dropout_rate(rate):
    with pytest.raises(ValueError, match=r"rate: expected a probability in \[0, 1\)"):
        dropout(torch.ones(2), rate)


def test_rejects_group_size():
    with pytest.raises(ValueError, match="group_size: expected at least 1, got 0"):
        repeat_kv(torch.ones(1, 1, 1, 1), 0)


def shapes(q, k, v):
    return [torch.ones(s) for s in (q, k, v)]


@both_forms
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (shapes((2, 5, 8), (2, 5, 8), (2, 5, 8)), "q, k: expected .* split_heads makes it"),
        (shapes((2, 4, 5, 8), (2, 4, 5, 6), (2, 4, 5, 8)), "k: expected shape .2, 'K', 'S', 8."),
        (shapes((2, 4, 5, 8), (1, 4, 5, 8), (1, 4, 5, 8)), "k: expected shape .2, 'K', 'S', 8."),
        (shapes((2, 4, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)), "divides q's 4, got 3"),
        (shapes((2, 4, 5, 8), (2, 0, 5, 8), (2, 0, 5, 8)), "divides q's 4, got 0"),
        (shapes((2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 6, 8)), "v: expected shape .2, 4, 5, 'dv'."),
    ],
)
def test_rejects_shapes(attend, inputs, message):
    with pytest.raises(ValueError, match=message):
        attend(*inputs)


@both_forms
def test_rejects_dtypes(attend):
    q, k, v = make_qkv()
    with pytest.raises(TypeError, match="k: expected the floating dtype of q"):
        attend(q, k.float(), v)
    with pytest.raises(TypeError, match="k: expected the floating dtype of q"):
        attend(q.long(), k.long(), v.long())
    with pytest.raises(TypeError, match="v: expected torch.float64 as k, got torch.float32"):
        attend(q, k, v.float())


@both_forms
def test_rejects_masks(attend):
    q, k, v = make_qkv()
    with pytest.raises(TypeError, match="mask: expected torch.bool .* got torch.int64"):
        attend(q, k, v, torch.ones(5, 7, dtype=torch.int64))
    for shape in [(7, 5), (3, 5, 7), (1, 2, 6, 5, 7)]:
        with pytest.raises(ValueError, match="mask: expected a shape that broadcasts to"):
            attend(q, k, v, torch.ones(shape, dtype=torch.bool))
