"""Values arrive as they left, and nothing malformed gets past the decoder."""

import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autograder.isolation.wire import DTYPES, Decoder, Encoder, WireError

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=20)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=5), st.integers()), inner, max_size=4),
    ),
    max_leaves=12,
)


def _sent(value):
    message = Encoder()
    encoded = message.value(value)
    decoder = Decoder(message.frame({"v": encoded}))
    return decoder.value(decoder.header["v"])


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_invariant_values_arrive_as_they_left(value):
    got = _sent(value)
    assert got == value
    assert repr(got) == repr(value)  # types too: 1 is not True, nor 1.0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (4, 5)])
def test_invariant_tensors_arrive_bit_for_bit(dtype, shape):
    tensor = (torch.randn(shape) * 100).to(dtype)
    got = _sent(tensor)
    assert got.dtype == dtype and got.shape == tensor.shape
    ours, theirs = (t.reshape(-1).view(torch.uint8) for t in (got, tensor))
    assert torch.equal(ours, theirs)


def test_invariant_layouts_survive():
    x = torch.arange(24.0).view(2, 3, 4)
    views = x.transpose(0, 2), x[:, ::2], x[0].expand(5, 3, 4), x[1:, 1, 2:], x.permute(2, 0, 1)
    for view in views:
        got = _sent(view)
        assert got.stride() == view.stride() and torch.equal(got, view)


def test_invariant_the_same_tensor_stays_one():
    x = torch.ones(2)
    a, b = _sent([x, x])
    assert a is b


def test_invariant_special_numbers():
    got = _sent([math.inf, -math.inf, math.nan, -0.0, 5e-324, 2**200, -(2**64)])
    assert got[:2] == [math.inf, -math.inf] and math.isnan(got[2])
    assert math.copysign(1, got[3]) == -1 and got[4:] == [5e-324, 2**200, -(2**64)]


def test_invariant_generators_keep_their_state():
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    got = _sent(generator)
    assert torch.equal(torch.rand(4, generator=got), torch.rand(4, generator=generator))


def test_other_types_arrive_by_name_alone():
    class Secret:
        pass

    assert type(_sent(Secret())).__name__ == "Secret"
    assert type(_sent(torch.ones(2).to_sparse())).__name__ == "tensor_of_float32"


def _frame(header, rest=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + rest


@pytest.mark.parametrize(
    "frame",
    [
        _frame(b"{"), _frame(b"[]"), _frame([1]), struct.pack("<I", 2**31) + b"x",
        _frame({"tensors": 3}), _frame({"tensors": [["float32", [2], [1], True]]}),
        _frame({"tensors": [["float32", [2], [1], False, 8]]}),
        _frame({"tensors": [["float32", [2**30], [1], False, 8]]}, bytes(8)),
        _frame({"tensors": [["float32", [2], [2**39], False, 8]]}, bytes(8)),
        _frame({"tensors": [["float32", [-2], [1], False, 8]]}, bytes(8)),
        _frame({"tensors": [["float32", [2**38], [0], False, 4]]}, bytes(4)),
        _frame({"tensors": [["object", [1], [1], False, 8]]}, bytes(8)),
        _frame({"tensors": [["float32", [1] * 100, [1] * 100, False, 4]]}, bytes(4)),
        _frame({"tensors": []}, b"left over"), _frame(b"[" * 100_000), _frame(b'{"a": 1e999999}x'),
    ],
)  # fmt: skip
def test_rejects_malformed_frames(frame):
    with pytest.raises(WireError):
        Decoder(frame)


@pytest.mark.parametrize(
    "encoded",
    [
        {}, {"x": 0}, {"x": -1}, {"x": "0"}, {"p": 0}, {"y": "object"}, {"y": []}, {"g": 0},
        {"t": 3}, {"d": [[1]]}, {"d": [[[1], 2]]}, {"r": 1}, {"zz": 1}, {"i": "0x" + "f" * 5000},
        {"v": "cuda"},
    ],
)  # fmt: skip
def test_rejects_malformed_values(encoded):
    decoder = Decoder(_frame({"tensors": []}))
    with pytest.raises((WireError, TypeError)):
        decoder.value(encoded)
