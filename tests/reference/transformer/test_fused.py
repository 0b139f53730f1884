import pytest
import torch

from reference.attention import (
    causal_mask,
    padding_mask,
    scaled_dot_product_attention,
    sliding_window_mask,
)
from reference.transformer import fused_causal_attention
from tests.tolerances import TOLERANCE


def make_qkv(num_queries, num_keys, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, 6, num_queries, 8), (2, 2, num_keys, 8), (2, 2, num_keys, 8)]
    return [torch.randn(s, generator=rng, dtype=dtype).requires_grad_() for s in shapes]


MASKS = {
    "a text": (9, 9, causal_mask(9)),
    "a chunk behind a cache": (4, 9, causal_mask(4, 9)),
    "one token": (1, 9, None),
    "everything": (5, 9, None),
    "padded texts": (9, 9, causal_mask(9) & padding_mask(torch.tensor([9, 4]), 9)),
    "a window behind a cache": (4, 9, sliding_window_mask(4, 9, window=3)),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matches_the_eager_kernel(name, dtype):
    num_queries, num_keys, mask = MASKS[name]
    qkv = make_qkv(num_queries, num_keys, dtype)
    actual = fused_causal_attention(*qkv, mask)
    expected = scaled_dot_product_attention(*qkv, mask)
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])
    if dtype == torch.float64:
        grads = (torch.autograd.grad(y.square().sum(), qkv) for y in (actual, expected))
        for a, e in zip(*grads, strict=True):
            torch.testing.assert_close(a, e, **TOLERANCE[dtype])


def test_a_square_mask_is_not_read():
    """As documented: a window over a whole text belongs to another kernel."""
    qkv = make_qkv(9, 9)
    window = fused_causal_attention(*qkv, sliding_window_mask(9, window=3))
    torch.testing.assert_close(window, fused_causal_attention(*qkv, causal_mask(9)))
