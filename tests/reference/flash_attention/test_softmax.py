from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference.flash_attention import (
    merge,
    naive_softmax,
    online_normalizer,
    online_softmax,
    online_weighted_sum,
    safe_softmax,
)
from tests.tolerances import TOLERANCE

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def normal(*shape, seed=0, std=3.0, dtype=torch.float64):
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@DTYPES
@pytest.mark.parametrize("softmax", [naive_softmax, safe_softmax, online_softmax])
def test_matches_torch_softmax(softmax, dtype):
    x = normal(3, 5, 41, dtype=dtype)
    torch.testing.assert_close(softmax(x), x.softmax(-1), **TOLERANCE[dtype])


@pytest.mark.parametrize("block_size", [1, 3, 16, 41, 100])
def test_online_forms_match_torch_for_any_block(block_size):
    x, values = normal(2, 7, 41), normal(2, 41, 5, seed=1)
    m, total = online_normalizer(x, block_size=block_size)
    torch.testing.assert_close(m + total.log(), x.logsumexp(-1), **TOLERANCE[torch.float64])
    out, lse = online_weighted_sum(x, values, block_size=block_size)
    torch.testing.assert_close(out, x.softmax(-1) @ values, **TOLERANCE[torch.float64])
    torch.testing.assert_close(lse, x.logsumexp(-1), **TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 89.0), (torch.float16, 12.0)])
def test_naive_overflows_where_the_others_do_not(dtype, limit):
    x = torch.tensor([limit, 0.0, limit], dtype=dtype)
    assert naive_softmax(x).isnan().any()
    for softmax in (safe_softmax, online_softmax):
        torch.testing.assert_close(softmax(x), x.softmax(-1), **TOLERANCE[dtype])


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=40), st.integers(1, 8))
def test_invariant_the_sum_lies_between_1_and_n(values, block_size):
    x = torch.tensor(values, dtype=torch.float64)
    m, total = online_normalizer(x, block_size=block_size)
    assert m == x.max()
    assert 1 - 1e-12 <= total <= len(values) * (1 + 1e-12)


def test_hidden_scores_come_out_as_zero():
    x = torch.full((3, 8), -torch.inf, dtype=torch.float64)
    x[0, 6:] = torch.tensor([1.0, 2.0])
    x[1, 0] = 3.0
    out, lse = online_weighted_sum(x, torch.eye(8, dtype=torch.float64), block_size=2)
    assert torch.equal(out[1], torch.eye(8)[0].double())
    torch.testing.assert_close(out[0], x[0].softmax(-1), **TOLERANCE[torch.float64])
    assert out[2].eq(0).all() and lse[2] == -torch.inf


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_invariant_merging_parts_equals_the_whole(sizes, random):
    scores = [normal(4, n, seed=i) for i, n in enumerate(sizes)]
    values = [normal(n, 3, seed=i + 50) for i, n in enumerate(sizes)]
    parts = [online_weighted_sum(s, v, block_size=2) if s.shape[1] else empty_part()
             for s, v in zip(scores, values, strict=True)]  # fmt: skip
    random.shuffle(parts)
    out, lse = merge(*(torch.stack(x) for x in zip(*parts, strict=True)))
    whole = torch.cat(scores, 1)
    if whole.shape[1] == 0:
        assert out.eq(0).all() and lse.eq(-torch.inf).all()
        return
    expected = whole.softmax(-1) @ torch.cat(values)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(lse, whole.logsumexp(-1), rtol=1e-11, atol=1e-11)


def empty_part():
    return torch.zeros(4, 3, dtype=torch.float64), torch.full((4,), -torch.inf).double()


def test_rejects_block_sizes():
    x = torch.zeros(2, 3)
    for call in (
        lambda: online_softmax(x, block_size=0),
        lambda: online_weighted_sum(x, torch.zeros(3, 1), block_size=-1),
    ):
        with pytest.raises(ValueError, match="block_size: expected at least 1"):
            call()


@pytest.mark.parametrize("dim", [0, 1, -1, -3])
def test_matches_torch_over_any_dimension(dim):
    x = normal(3, 4, 5)
    expected = x.softmax(dim)
    for softmax in (naive_softmax, safe_softmax, partial(online_softmax, block_size=2)):
        torch.testing.assert_close(softmax(x, dim=dim), expected)
    m, total = online_normalizer(x, block_size=2, dim=dim)
    torch.testing.assert_close(m + total.log(), x.logsumexp(dim))
