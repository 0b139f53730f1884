import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from autograder.spies import largest_new_tensor
from reference.attention import causal_mask
from reference.flash_attention import flash_attention
from tests.reference.flash_attention.test_forward import exact, inputs
from tests.tolerances import TOLERANCE


def gradients(function, tensors, seed=3):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    grad = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return torch.autograd.grad(out, leaves, grad.to(out.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_matches_gradients_of_sdpa_in_float64(dtype, is_causal):
    tensors = inputs(2, 4, 2, 33, 33, 16, dtype=dtype)
    mask = causal_mask(33) if is_causal else None
    ours = gradients(
        lambda q, k, v: flash_attention(q, k, v, is_causal=is_causal, block_q=8, block_k=16),
        tensors,
    )
    theirs = gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
        [x.double() for x in tensors],
    )
    tolerance = {"rtol": TOLERANCE[dtype]["rtol"], "atol": 4 * TOLERANCE[dtype]["atol"]}
    for got, expected in zip(ours, theirs, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected.to(dtype), **tolerance)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 25), st.integers(1, 25), st.integers(1, 30), st.integers(1, 30),
    st.sampled_from([(2, 2), (4, 2)]), st.booleans(),
)  # fmt: skip
def test_matches_sdpa_for_any_lengths_and_blocks(t, s, block_q, block_k, heads, is_causal):
    tensors = inputs(1, *heads, t, s, 4, 3)
    mask = causal_mask(t, s) if is_causal else None
    ours = gradients(
        lambda q, k, v: flash_attention(
            q, k, v, is_causal=is_causal, block_q=block_q, block_k=block_k
        ),
        tensors,
    )
    for got, expected in zip(ours, gradients(lambda *x: exact(*x, mask), tensors), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_passes_gradcheck():
    tensors = [x.requires_grad_() for x in inputs(1, 2, 1, 5, 7, 3, 2)]
    assert torch.autograd.gradcheck(
        lambda *x: flash_attention(*x, is_causal=True, block_q=2, block_k=3), tensors
    )


def test_matches_sdpa_with_a_mask():
    tensors = inputs(2, 4, 2, 9, 11, 4)
    mask = torch.rand(2, 1, 9, 11, generator=torch.Generator().manual_seed(0)) < 0.5
    ours = gradients(lambda *x: flash_attention(*x, mask, block_q=4, block_k=3), tensors)
    for got, expected in zip(ours, gradients(lambda *x: exact(*x, mask), tensors), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_a_query_without_keys_gives_no_gradient():
    tensors = inputs(1, 1, 1, 4, 2, 4)  # causal, bottom-right: the first two queries see nothing
    dq, dk, dv = gradients(lambda *x: flash_attention(*x, is_causal=True, block_q=1), tensors)
    assert dq[:, :, :2].eq(0).all()
    assert all(g.isfinite().all() for g in (dq, dk, dv))


def test_invariant_keeps_no_probabilities():
    tensors = [x.requires_grad_() for x in inputs(1, 1, 1, 512, 512, 8, dtype=torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = flash_attention(*tensors, is_causal=True, block_q=64, block_k=64)
    assert sum(x.numel() for x in kept) == 4 * 512 * 8 + 512  # q, k, v, out, lse
    with largest_new_tensor() as spy:
        out.sum().backward()
    assert spy.bytes < 512 * 512 * 4 / 8


def test_rejects_a_second_derivative():
    tensors = [x.requires_grad_() for x in inputs(1, 1, 1, 4, 4, 4)]
    (grad,) = torch.autograd.grad(
        flash_attention(*tensors).square().sum(), tensors[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
