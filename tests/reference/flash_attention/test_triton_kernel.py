"""In Triton's interpreter, where no GPU is; on the GPU where one is."""

import os

import pytest
import torch

from reference.attention import causal_mask
from tests.reference.flash_attention.test_backward import gradients
from tests.reference.flash_attention.test_forward import exact, inputs
from tests.tolerances import TOLERANCE

pytest.importorskip("triton", reason="Triton runs on Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from reference.flash_attention.triton_kernel import triton_flash_attention  # noqa: E402

CASES = [(2, 4, 2, 37, 37, 16), (1, 4, 4, 5, 70, 32), (1, 2, 1, 70, 21, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_sdpa_in_float64(case, dtype):
    tensors = inputs(*case, dtype=dtype)
    mask = causal_mask(*case[3:5])

    def kernel(*x):
        x = (y.to(DEVICE) for y in x)
        return triton_flash_attention(*x, is_causal=True, block_q=16, block_k=32).cpu()

    expected = exact(*tensors, mask)
    torch.testing.assert_close(kernel(*tensors), expected.to(dtype), **TOLERANCE[dtype])
    wide = gradients(lambda *x: exact(*x, mask), [x.double() for x in tensors])
    tolerance = {"rtol": TOLERANCE[dtype]["rtol"], "atol": 4 * TOLERANCE[dtype]["atol"]}
    for got, expected in zip(gradients(kernel, tensors), wide, strict=True):
        torch.testing.assert_close(got, expected.to(dtype), **tolerance)


def test_matches_sdpa_without_a_mask():
    q, k, v = (x.to(DEVICE) for x in inputs(1, 2, 2, 33, 65, 64, dtype=torch.float32))
    out = triton_flash_attention(q, k, v, block_q=32, block_k=16)
    torch.testing.assert_close(out, exact(q, k, v).float(), **TOLERANCE[torch.float32])


def test_rejects_what_the_kernel_cannot_do():
    q, k, v = inputs(1, 2, 2, 4, 4, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match="one head width out of"):
        triton_flash_attention(q[..., :12], k[..., :12], v[..., :12])
    with pytest.raises(ValueError, match="block_q: expected a power of two from 16 on, got 24"):
        triton_flash_attention(q, k, v, block_q=24)
    with pytest.raises(TypeError, match="got torch.float64"):
        triton_flash_attention(q.double(), k.double(), v.double())
