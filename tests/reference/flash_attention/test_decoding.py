import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.flash_attention import (
    flash_attention_forward,
    paged_attention,
    split_k_attention,
)
from tests.reference.flash_attention.test_forward import exact, inputs
from tests.tolerances import TOLERANCE


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 70), st.sampled_from([(4, 4), (4, 1)]))
def test_split_k_matches_sdpa(num_keys, num_splits, heads):
    q, k, v = inputs(2, *heads, 1, num_keys, 8)
    out, lse = split_k_attention(q, k, v, num_splits=num_splits)
    torch.testing.assert_close(out, exact(q, k, v), **TOLERANCE[torch.float64])
    whole = flash_attention_forward(q, k, v)[1]
    torch.testing.assert_close(lse, whole, **TOLERANCE[torch.float64])


def test_split_k_keeps_the_dtype():
    q, k, v = inputs(1, 2, 2, 1, 40, 8, dtype=torch.bfloat16)
    out, lse = split_k_attention(q, k, v, num_splits=4)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out, exact(q, k, v).bfloat16(), **TOLERANCE[torch.bfloat16])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 37), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 99))
def test_paged_matches_contiguous(lengths, block_size, seed):
    num_tokens = torch.tensor(lengths)
    columns = -(-max(lengths) // block_size)
    num_blocks = len(lengths) * columns + 3
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(num_blocks, generator=generator)[: len(lengths) * columns]
    table = table.view(len(lengths), columns)
    keys, values = torch.full((2, num_blocks, block_size, 2, 4), torch.nan, dtype=torch.float64)
    q, k, v = inputs(len(lengths), 4, 2, 1, max(lengths), 4, seed=seed)
    for b, n in enumerate(lengths):
        for t in range(n):
            block = table[b, t // block_size]
            keys[block, t % block_size] = k[b, :, t]
            values[block, t % block_size] = v[b, :, t]
    keys, values = keys.nan_to_num(1e3), values.nan_to_num(1e3)  # whatever lies beyond the tokens
    out = paged_attention(q, keys, values, table, num_tokens)
    for b, n in enumerate(lengths):
        expected = exact(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        torch.testing.assert_close(out[b : b + 1], expected, **TOLERANCE[torch.float64])


def test_rejects_splits_and_tables():
    q, k, v = inputs(1, 2, 2, 1, 8, 4)
    with pytest.raises(ValueError, match="num_splits: expected at least 1, got 0"):
        split_k_attention(q, k, v, num_splits=0)
    blocks = torch.zeros(3, 4, 2, 4, dtype=torch.float64)
    for table, tokens, message in (
        ([[0]], [5], "expected 2 columns for 5 tokens in blocks of 4, got 1"),
        ([[0, 3]], [5], "expected blocks from 0 to 2, got 0 to 3"),
        ([[0, -1]], [5], "got -1 to 0"),
        ([[0, 1]], [0], "at least one token"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(q, blocks, blocks, torch.tensor(table), torch.tensor(tokens))


def test_paged_ignores_table_entries_beyond_the_tokens():
    q = torch.ones(1, 2, 1, 4)
    blocks = torch.ones(3, 4, 2, 4)
    out = paged_attention(q, blocks, blocks, torch.tensor([[1, -1]]), torch.tensor([3]))
    assert torch.equal(out, torch.ones(1, 2, 1, 4))
