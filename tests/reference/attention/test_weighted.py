"""Oracle: the same computation with what is hidden taken out, or made ordinary."""

import pytest
import torch
from torch.testing import assert_close

from reference.attention import (
    additive_mask,
    causal_mask,
    grouped_query_attention,
    mean_pool,
    padding_mask,
    scaled_dot_product_attention,
    single_head_attention,
    weighted_sum,
)
from reference.flash_attention import flash_attention, paged_attention, split_k_attention

BAD = (torch.nan, torch.inf, -torch.inf)


def qkv(num_queries=6, num_keys=6):
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, 4, num_queries, 8), (2, 2, num_keys, 8), (2, 2, num_keys, 5)]
    return [torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes]


def flash(q, k, v, mask):
    return flash_attention(q, k, v, mask, block_q=4, block_k=4)


KERNELS = [scaled_dot_product_attention, grouped_query_attention, flash]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("attend", KERNELS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("is_additive", [False, True])
def test_invariant_hidden_keys_and_values_do_not_matter(attend, bad, is_additive):
    """vllm#641, pytorch#101967: the mask gives them weight 0, and 0 * NaN is NaN."""
    mask = causal_mask(6) & padding_mask(torch.tensor([6, 3]), 6)
    mask = additive_mask(mask, torch.float64) if is_additive else mask
    q, k, v = qkv()
    expected = attend(q, k, v, mask)
    k[1, :, 3:], v[1, :, 3:, 2] = bad, bad  # padding
    assert_close(attend(q, k, v, mask), expected)
    v[0, 1, 4, 2] = bad  # the fifth key, which the last two queries see
    actual = attend(q, k, v, mask)
    assert_close(actual[0, :, :4], expected[0, :, :4])
    assert not actual[0, 2:, 4:, 2].isfinite().any()
    actual[0, 2:, 4:, 2] = expected[0, 2:, 4:, 2]  # one feature of the heads that read it
    assert_close(actual, expected)


@pytest.mark.parametrize("attend", KERNELS, ids=lambda f: f.__name__)
def test_invariant_gradients_flow_past_hidden_values(attend):
    mask = padding_mask(torch.tensor([6, 3]), 6)
    inputs = [x.requires_grad_() for x in qkv()]
    expected = torch.autograd.grad(attend(*inputs, mask).square().sum(), inputs)
    with torch.no_grad():
        inputs[2][1, :, 3:] = torch.nan
    actual = torch.autograd.grad(attend(*inputs, mask).square().sum(), inputs)
    assert_close(actual, expected)


def test_invariant_flash_gradients_flow_past_hidden_keys_as_well():
    mask = padding_mask(torch.tensor([6, 3]), 6)
    inputs = [x.requires_grad_() for x in qkv()]
    expected = torch.autograd.grad(flash(*inputs, mask).square().sum(), inputs)
    with torch.no_grad():
        inputs[1][1, :, 3:] = torch.nan
    actual = torch.autograd.grad(flash(*inputs, mask).square().sum(), inputs)
    assert_close(actual, expected)


def test_invariant_empty_rows_have_no_gradient_from_nan_scores():
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = torch.zeros(6, 6, dtype=torch.bool)
    for m in (mask, additive_mask(mask, torch.float64)):
        out = scaled_dot_product_attention(q, k * torch.nan, v, m)
        assert bool((out == 0).all())
        (grad,) = torch.autograd.grad(out.sum(), v)
        assert bool((grad == 0).all())


@pytest.mark.parametrize("bad", BAD)
def test_invariant_paged_attention_reads_no_stale_slot(bad):
    """vllm#936: the last block's empty slots, and blocks of others in the table behind its end."""
    rng = torch.Generator().manual_seed(1)
    k, v = (torch.randn(4, 4, 2, 8, generator=rng) for _ in range(2))
    q = torch.randn(2, 4, 1, 8, generator=rng)
    table, lengths = torch.tensor([[0, 1], [2, 3]]), torch.tensor([6, 3])
    expected = paged_attention(q, k, v, table, lengths)
    for x in (k, v):
        x[1, 2:], x[2, 3], x[3] = bad, bad, bad
    assert_close(paged_attention(q, k, v, table, lengths), expected)
    contiguous = (x[:2].flatten(0, 1)[:6].transpose(0, 1)[None] for x in (k, v))
    assert_close(split_k_attention(q[:1], *contiguous, num_splits=2)[0], expected[:1])


def test_invariant_pooling_leaves_padding_out():
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor([5, 2, 0])[:, None]
    x[~mask] = torch.nan
    for m in (mask, mask.long()):
        pooled = mean_pool(x, m)
        assert_close(pooled[0], x[0].mean(0))
        assert_close(pooled[1], x[1, :2].mean(0))
        assert pooled[2].tolist() == [0.0] * 4


def test_matches_the_product_where_all_is_finite():
    weights, values = torch.rand(2, 3, 4), torch.randn(2, 4, 5)
    assert torch.equal(weighted_sum(weights, values), weights @ values)
    assert weighted_sum(weights.to("meta"), values.to("meta")).shape == (2, 3, 5)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_matches_torch_without_a_head_dimension(batch):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*batch, n, 8, generator=rng) for n in (4, 6, 6))
    masks = [None, causal_mask(4, 6), torch.rand(*batch, 4, 6, generator=rng) < 0.9]
    for mask in masks:
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
        assert_close(single_head_attention(q, k, v, mask), expected)


def test_rejects_batches_that_differ():
    with pytest.raises(ValueError, match=r"expected \(\.\.\., length, width\) alike in front"):
        single_head_attention(torch.zeros(2, 3, 4), torch.zeros(3, 3, 4), torch.zeros(3, 3, 4))
