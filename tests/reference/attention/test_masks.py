import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask
from transformers import masking_utils

from reference.attention import (
    additive_mask,
    causal_mask,
    document_mask,
    padding_mask,
    sliding_window_mask,
)

LENGTHS = st.integers(0, 9)


def by_flex(mask_mod, num_queries, num_keys, batch=1):
    """A mask evaluated position by position by torch's flex_attention."""
    return create_mask(mask_mod, batch, 1, num_queries, num_keys, device="cpu")


@given(st.integers(1, 9), st.integers(1, 9))
def test_causal_matches_flex_attention(num_queries, num_keys):
    offset = num_keys - num_queries
    expected = by_flex(lambda b, h, q, kv: q + offset >= kv, num_queries, num_keys)[0, 0]
    assert torch.equal(causal_mask(num_queries, num_keys), expected)


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 12))
def test_sliding_window_matches_transformers(num_queries, num_cached, window):
    num_keys = num_queries + num_cached
    theirs = masking_utils.sliding_window_causal_mask_function(window)
    expected = by_flex(lambda b, h, q, kv: theirs(b, h, q + num_cached, kv), num_queries, num_keys)[
        0, 0
    ]
    assert torch.equal(sliding_window_mask(num_queries, num_keys, window=window), expected)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_document_matches_transformers(documents):
    ids = torch.tensor([documents])
    theirs = masking_utils.packed_sequence_mask_function(ids)
    expected = by_flex(theirs, len(documents), len(documents))
    assert torch.equal(document_mask(ids), expected)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.sampled_from(["left", "right"]))
def test_padding_matches_a_loop(lengths, side):
    mask = padding_mask(torch.tensor(lengths), 6, side=side)
    assert mask.shape == (len(lengths), 1, 1, 6)
    for row, length in zip(mask[:, 0, 0], lengths, strict=True):
        real = row[:length] if side == "right" else row[6 - length :]
        assert real.all() and row.sum() == length


def test_invariant_documents_are_a_block_diagonal():
    mask = document_mask(torch.tensor([[0, 0, 1, 1, 1]]))[0, 0]
    assert torch.equal(mask, torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool())


def test_invariant_a_cache_cuts_the_last_rows():
    full, documents = causal_mask(9), torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]])
    assert torch.equal(causal_mask(4, 9), full[-4:])
    assert torch.equal(sliding_window_mask(4, 9, window=3), sliding_window_mask(9, window=3)[-4:])
    assert torch.equal(document_mask(documents, 4), document_mask(documents)[:, :, -4:])


def test_invariant_offset_zero_is_top_left():
    assert torch.equal(causal_mask(3, 5, offset=0), torch.ones(3, 5).tril().bool())
    assert not torch.equal(causal_mask(3, 5, offset=0), causal_mask(3, 5))


@given(LENGTHS, LENGTHS)
def test_invariant_a_window_as_wide_as_the_keys_is_causal(num_queries, num_keys):
    wide = sliding_window_mask(num_queries, num_keys, window=max(1, num_keys))
    assert torch.equal(wide, causal_mask(num_queries, num_keys))


def test_invariant_more_queries_than_keys_leave_empty_rows():
    assert causal_mask(5, 3).any(-1).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_additive_holds_zero_and_minus_infinity(dtype):
    mask = additive_mask(causal_mask(3), dtype)
    assert mask.dtype == dtype
    assert torch.equal(mask == 0, causal_mask(3))
    assert torch.equal(mask == -torch.inf, ~causal_mask(3))


def test_rejects_negative_length():
    with pytest.raises(ValueError, match="num_keys: expected a length of at least 0, got -1"):
        causal_mask(2, -1)


def test_rejects_empty_window():
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        sliding_window_mask(2, window=0)


def test_rejects_unknown_padding_side():
    with pytest.raises(ValueError, match="side: expected 'left' or 'right', got 'both'"):
        padding_mask(torch.tensor([1]), 2, side="both")


def test_rejects_length_beyond_the_padded_one():
    with pytest.raises(ValueError, match=r"lengths: expected values in 0 ... 2, got \[3\]"):
        padding_mask(torch.tensor([3]), 2)


def test_rejects_more_queries_than_document_positions():
    with pytest.raises(ValueError, match="num_queries: expected 0 ... 2 .* got 3"):
        document_mask(torch.tensor([[0, 1]]), 3)


def test_rejects_additive_of_additive():
    with pytest.raises(TypeError, match="mask: expected torch.bool, got torch.float32"):
        additive_mask(torch.zeros(2, 2), torch.float32)
