import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference.parallel.zero import FlatLayout, layout_of

SHAPES = st.lists(
    st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5
).filter(lambda shapes: sum(map(math.prod, shapes)) > 0)


@given(SHAPES, st.integers(1, 9))
def test_invariant_parts_put_together_are_the_tensors(shapes, world_size):
    tensors = {f"t{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    layout = layout_of(tensors.items(), world_size)
    flat = layout.flatten(tensors.values())
    parts = [layout.shard(flat, rank) for rank in range(world_size)]
    assert {part.numel() for part in parts} == {layout.shard_numel}
    assert layout.padded_numel - layout.numel < world_size
    assert not flat[layout.numel :].any()
    again = layout.views(torch.cat(parts))
    assert all(torch.equal(a, b) for a, b in zip(again, tensors.values(), strict=True))


def test_views_share_memory_and_their_gradient_is_one_vector():
    layout = FlatLayout(("w", "b"), ((2, 3), (3,)), world_size=4)
    flat = torch.zeros(12, requires_grad=True)
    w, b = layout.views(flat)
    assert w.data_ptr() == flat.data_ptr()
    (w.sum() + 2 * b.sum()).backward()
    assert flat.grad.tolist() == [1] * 6 + [2] * 3 + [0] * 3


ONE = FlatLayout(("w",), ((3,),), 2)


@pytest.mark.parametrize(
    "message, call",
    [
        ("world_size: expected at least 1", lambda: FlatLayout(("w",), ((1,),), 0)),
        ("names, shapes: expected", lambda: FlatLayout((), (), 2)),
        ("names: expected each once", lambda: FlatLayout(("w", "w"), ((1,), (1,)), 2)),
        ("tensors: expected shapes", lambda: ONE.flatten([torch.ones(2)])),
        (r"flat: expected shape \(4,\)", lambda: ONE.views(torch.ones(3))),
        ("rank: expected 0 to 1", lambda: ONE.shard(torch.ones(4), 2)),
    ],
)
def test_rejects(message, call):
    with pytest.raises(ValueError, match=message):
        call()
