import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from autograder.spies import largest_new_tensor
from reference.attention import Attention, causal_mask
from reference.flash_attention import flash_attention, flash_attention_forward
from tests.tolerances import TOLERANCE

CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def inputs(b, h, kv, t, s, d, dv=None, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, h, t, d), (b, kv, s, d), (b, kv, s, d if dv is None else dv)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in shapes]  # fmt: skip


def exact(q, k, v, mask=None):
    """PyTorch in float64; rows that see nothing are zero."""
    out = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, enable_gqa=True)
    if mask is not None and mask.dtype == torch.bool:
        out = out.masked_fill(~mask.any(-1, keepdim=True).expand(*out.shape[:3], 1), 0.0)
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_matches_sdpa(dtype, is_causal):
    q, k, v = inputs(2, 4, 2, 50, 50, 16, dtype=dtype)
    out, _ = flash_attention_forward(q, k, v, is_causal=is_causal, block_q=16, block_k=24)
    expected = exact(q, k, v, causal_mask(50) if is_causal else None)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected.to(dtype), **TOLERANCE[dtype])


def test_matches_the_log_sum_exp_of_torchs_flash_kernel():
    q, k, v = inputs(2, 3, 3, 40, 40, 8, dtype=torch.float32)
    for is_causal in (False, True):
        out, lse = CPU_FLASH(q, k, v, 0.0, is_causal)
        got, got_lse = flash_attention_forward(q, k, v, is_causal=is_causal, block_q=7, block_k=9)
        torch.testing.assert_close(got, out, **TOLERANCE[torch.float32])
        torch.testing.assert_close(got_lse, lse, **TOLERANCE[torch.float32])


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 50), st.integers(1, 50),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.booleans(),
)  # fmt: skip
def test_matches_sdpa_for_any_lengths_and_blocks(t, s, block_q, block_k, heads, is_causal):
    q, k, v = inputs(2, *heads, t, s, 4, 3)
    mask = causal_mask(t, s) if is_causal else None
    out, lse = flash_attention_forward(
        q, k, v, is_causal=is_causal, block_q=block_q, block_k=block_k
    )
    torch.testing.assert_close(out, exact(q, k, v, mask), **TOLERANCE[torch.float64])
    scores = q @ k.repeat_interleave(heads[0] // heads[1], 1).mT / 2
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), **TOLERANCE[torch.float64])


@pytest.mark.parametrize("shape", [(1, 1, 1, 20), (1, 1, 15, 20), (2, 4, 15, 20), (2, 1, 15, 1)])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_matches_sdpa_with_a_mask(shape, kind):
    q, k, v = inputs(2, 4, 2, 15, 20, 8)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(shape, generator=generator) < 0.6
    if kind == "additive":
        mask = torch.randn(shape, generator=generator, dtype=torch.float64)
    out, _ = flash_attention_forward(q, k, v, mask, block_q=4, block_k=6)
    torch.testing.assert_close(out, exact(q, k, v, mask), **TOLERANCE[torch.float64])


def test_a_mask_and_is_causal_combine():
    q, k, v = inputs(1, 2, 2, 12, 12, 8)
    mask = torch.ones(12, 12, dtype=torch.bool)
    mask[:, 3] = False
    out, _ = flash_attention_forward(q, k, v, mask, is_causal=True, block_q=5, block_k=5)
    expected = exact(q, k, v, mask & causal_mask(12))
    torch.testing.assert_close(out, expected, **TOLERANCE[torch.float64])


def test_large_scores_do_not_overflow():
    q, k, v = inputs(1, 1, 1, 30, 30, 16, dtype=torch.float16)
    out, lse = flash_attention_forward(30 * q, 30 * k, v, block_q=8, block_k=8)
    assert out.isfinite().all() and lse.max() > 1000
    torch.testing.assert_close(out, exact(30 * q, 30 * k, v).half(), **TOLERANCE[torch.float16])


def test_edges_empty_batch_one_token_strided_input():
    q, k, v = inputs(0, 2, 2, 3, 3, 4)
    assert flash_attention_forward(q, k, v)[0].shape == (0, 2, 3, 4)
    q, k, v = inputs(1, 2, 2, 1, 1, 4)
    torch.testing.assert_close(flash_attention_forward(q, k, v, is_causal=True)[0], v)
    q, k, v = (x.mT.contiguous().mT for x in inputs(1, 2, 1, 9, 9, 4))
    out = flash_attention_forward(q, k, v, is_causal=True, block_q=4, block_k=4)[0]
    torch.testing.assert_close(out, exact(q, k, v, causal_mask(9)), **TOLERANCE[torch.float64])


def test_no_keys_give_zeros():
    q, k, v = inputs(1, 2, 2, 3, 0, 4)
    out, lse = flash_attention_forward(q, k, v)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()


def test_invariant_no_tensor_grows_with_both_lengths():
    q, k, v = inputs(1, 1, 1, 1024, 1024, 16, dtype=torch.float32)
    with largest_new_tensor() as spy:
        flash_attention_forward(q, k, v, is_causal=True, block_q=64, block_k=64)
    assert (
        spy.bytes <= q.numel() * 4
    )  # the output; one row of scores for each query has 64 times it


def test_skips_tiles_that_a_causal_mask_hides():
    q, k, v = inputs(1, 1, 1, 64, 64, 8)
    k[:, :, 32:] = torch.nan  # a tile that is read and hidden would spread it
    v[:, :, 32:] = torch.nan
    out, _ = flash_attention_forward(q, k, v, is_causal=True, block_q=32, block_k=32)
    assert out[:, :, :32].isfinite().all()


def test_serves_the_attention_layer():
    torch.manual_seed(0)
    layer = Attention(32, num_heads=4, num_kv_heads=2)
    x, mask = torch.randn(2, 10, 32), causal_mask(10)
    out = layer(x, mask, attend=flash_attention)
    torch.testing.assert_close(out, layer(x, mask), **TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[0], k, v), "expected \\(batch, heads, length, head_dim\\)"),
        (lambda q, k, v: (q, k[..., :3], v), "expected \\(B, H, T, d\\)"),
        (lambda q, k, v: (q, k, v[:, :, :2]), "expected \\(B, H, T, d\\)"),
        (lambda q, k, v: (q[:, :3], k, v), "divides q's 3, got 2"),
    ],
)
def test_rejects_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        flash_attention_forward(*change(*inputs(1, 4, 2, 5, 5, 4)))


def test_rejects_dtypes_and_blocks():
    q, k, v = inputs(1, 4, 2, 5, 5, 4)
    with pytest.raises(TypeError, match="one floating dtype"):
        flash_attention_forward(q, k.float(), v)
    with pytest.raises(ValueError, match="block_q: expected at least 1, got 0"):
        flash_attention_forward(q, k, v, block_q=0)
    with pytest.raises(ValueError, match="mask.detach"):
        flash_attention(q, k, v, torch.zeros(5, 5, dtype=torch.float64, requires_grad=True))
