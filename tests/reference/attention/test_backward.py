import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.attention import (
    AttentionFunction,
    attention_backward,
    attention_weights,
    causal_mask,
    scaled_dot_product_attention,
    softmax_backward,
)
from tests.tolerances import TOLERANCE


def make_inputs(heads, kv_heads, queries, keys, dim, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, queries, dim, generator=rng, dtype=dtype)
    k, v = (torch.randn(2, kv_heads, keys, dim, generator=rng, dtype=dtype) for _ in range(2))
    grad_out = torch.randn(q.shape, generator=rng, dtype=dtype)
    return grad_out, q, k, v


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99)
)
def test_matches_torch(kv_heads, group, queries, keys, seed):
    grad_out, q, k, v = make_inputs(kv_heads * group, kv_heads, queries, keys, 4, seed=seed)
    mask = causal_mask(queries, keys)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True)
    expected = torch.autograd.grad(out, inputs, grad_out)
    actual = attention_backward(grad_out, q.detach(), k.detach(), v.detach(), mask)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("mask", [None, causal_mask(3, 4), causal_mask(4, 3)[:3, [0, 1, 2, 2]]])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_gradcheck(kv_heads, mask):
    _, q, k, v = make_inputs(4, kv_heads, 3, 4, 2)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(AttentionFunction.apply, (*inputs, mask))


def test_gradgradcheck():
    _, q, k, v = make_inputs(4, 2, 3, 4, 2)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradgradcheck(AttentionFunction.apply, (*inputs, causal_mask(3, 4)))


def test_scale_is_passed_on():
    grad_out, q, k, v = make_inputs(4, 2, 3, 5, 4)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = scaled_dot_product_attention(*inputs, scale=0.1)
    expected = torch.autograd.grad(out, inputs, grad_out)
    actual = attention_backward(grad_out, *(x.detach() for x in inputs), scale=0.1)
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_matches_torch_in_lower_precision(dtype):
    grad_out, q, k, v = make_inputs(4, 2, 3, 5, 8, dtype=dtype)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*inputs, attn_mask=causal_mask(3, 5), enable_gqa=True)
    expected = torch.autograd.grad(out, inputs, grad_out)
    actual = attention_backward(grad_out, *(x.detach() for x in inputs), causal_mask(3, 5))
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])


def test_softmax_backward_matches_the_jacobian():
    scores = torch.randn(5, dtype=torch.float64)
    grad = torch.randn(5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: z.softmax(-1), scores)
    actual = softmax_backward(grad[None], scores.softmax(-1)[None])[0]
    torch.testing.assert_close(actual, jacobian.T @ grad, **TOLERANCE[torch.float64])


def test_invariant_row_means_need_no_probabilities():
    """rowsum(P * dP) = rowsum(dO * O), on which FlashAttention's backward rests."""
    grad_out, q, k, v = make_inputs(4, 4, 5, 6, 8)
    weights = attention_weights(q, k)
    left = (weights * (grad_out @ v.mT)).sum(-1)
    right = (grad_out * scaled_dot_product_attention(q, k, v)).sum(-1)
    torch.testing.assert_close(left, right, **TOLERANCE[torch.float64])


def test_invariant_empty_rows_have_no_gradient():
    grad_out, q, k, v = make_inputs(2, 2, 4, 2, 3)
    grad_q, _, _ = attention_backward(grad_out, q, k, v, causal_mask(4, 2))
    assert (grad_q[:, :, :2] == 0).all() and (grad_q[:, :, 3] != 0).all()


def test_rejects_grad_out():
    grad_out, q, k, v = make_inputs(2, 2, 4, 2, 3)
    with pytest.raises(ValueError, match=r"grad_out: expected shape \(2, 2, 4, 3\)"):
        attention_backward(grad_out[:, :1], q, k, v)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), ValueError, "divides q's 4, got 0"),
        (lambda q, k, v: (q[0], k[0], v[0]), ValueError, "split_heads makes it"),
        (lambda q, k, v: (q, k, v[:, :1]), ValueError, "v: expected shape .2, 2, 5, 'dv'."),
        (lambda q, k, v: (q, k, v.float()), TypeError, "v: expected torch.float64 as k"),
    ],
)
def test_rejects_what_forward_rejects(change, error, message):
    grad_out, *inputs = make_inputs(4, 2, 3, 5, 8)
    with pytest.raises(error, match=message):
        attention_backward(grad_out, *change(*inputs))


def test_rejects_a_mask_that_wants_a_gradient():
    _, q, k, v = make_inputs(2, 2, 3, 4, 2)
    bias = torch.zeros(3, 4, dtype=q.dtype, requires_grad=True)
    out = AttentionFunction.apply(q.requires_grad_(), k, v, bias)
    with pytest.raises(ValueError, match="mask: expected none that wants a gradient"):
        out.sum().backward()
    AttentionFunction.apply(q, k, v, bias.detach()).sum().backward()
    assert q.grad is not None
