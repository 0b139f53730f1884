"""Oracles: arithmetic on the bytes, and the way back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference.quantization import pack, unpack

codes = st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), max_size=40)


@given(codes)
def test_matches_arithmetic_and_comes_back(pairs):
    flat = torch.tensor([c for pair in pairs for c in pair], dtype=torch.uint8)
    packed = pack(flat)
    assert packed.tolist() == [16 * high + low for high, low in pairs]
    assert packed.dtype == torch.uint8 and torch.equal(unpack(packed), flat)


def test_every_byte_and_batches():
    every = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert unpack(every).shape == (4, 128) and torch.equal(pack(unpack(every)), every)
    strided = unpack(every).mT.contiguous().mT
    assert torch.equal(pack(strided), every)


def test_rejects_bad_input():
    with pytest.raises(TypeError, match="codes: expected dtype torch.uint8, got torch.int64"):
        pack(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"even number in the last dimension, got shape \(3,\)"):
        pack(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="codes: expected 0 to 15, got 16"):
        pack(torch.tensor([1, 16], dtype=torch.uint8))
    with pytest.raises(TypeError, match="packed: expected dtype torch.uint8"):
        unpack(torch.zeros(3))
