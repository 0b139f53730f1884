import pytest
import torch

from reference.attention import (
    additive_mask,
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
    "a window over a text": (9, 9, sliding_window_mask(9, window=3)),  # transformers#28980
    "both directions": (9, 9, torch.ones(9, 9, dtype=torch.bool)),
    "an additive causal mask": (9, 9, additive_mask(causal_mask(9), torch.float64)),
    "padded texts": (9, 9, causal_mask(9) & padding_mask(torch.tensor([9, 4]), 9)),
    "a window behind a cache": (4, 9, sliding_window_mask(4, 9, window=3)),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matches_the_eager_kernel(name, dtype):
    num_queries, num_keys, mask = MASKS[name]
    qkv = make_qkv(num_queries, num_keys, dtype)
    mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    actual = fused_causal_attention(*qkv, mask)
    expected = scaled_dot_product_attention(*qkv, mask)
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])
    if dtype == torch.float64:
        grads = (torch.autograd.grad(y.square().sum(), qkv) for y in (actual, expected))
        for a, e in zip(*grads, strict=True):
            torch.testing.assert_close(a, e, **TOLERANCE[dtype])


def test_matches_the_eager_kernel_behind_a_mask_with_nan():
    """pytorch#101967: a value that is masked out must not matter, whatever it is."""
    q, k, v = (x.detach() for x in make_qkv(9, 9))
    expected = scaled_dot_product_attention(q, k, v, causal_mask(9))
    k[:, :, 6, 0], v[:, :, 6, 1] = torch.nan, torch.inf
    actual = fused_causal_attention(q, k, v, causal_mask(9))
    torch.testing.assert_close(actual[:, :, :6], expected[:, :, :6])
    assert not actual[:, :, 6:].isfinite().any(-1).any()
