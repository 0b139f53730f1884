import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference.mixed_precision import compensated_sum, matmul_accumulating, running_sum


@pytest.mark.parametrize(
    "dtype, stall", [(torch.float16, 2048), (torch.bfloat16, 256)], ids=["float16", "bfloat16"]
)
def test_a_sum_of_ones_stalls(dtype, stall):
    assert running_sum(torch.ones(3 * stall), dtype=dtype) == stall
    assert compensated_sum(torch.ones(3 * stall), dtype=dtype) == 3 * stall


@given(st.lists(st.floats(-100, 100, width=16), max_size=50))
def test_matches_numpy_additions(values):
    x = np.array(values, dtype=np.float16)
    total = np.float16(0)
    for term in x:
        total = np.float16(total + term)
    assert running_sum(torch.tensor(x), dtype=torch.float16).item() == total


def test_compensation_beats_the_running_sum():
    x = torch.rand(4096, generator=torch.Generator().manual_seed(0)).half()
    exact = math.fsum(x.double().tolist())
    plain = abs(running_sum(x, dtype=torch.float16).item() - exact)
    kept = abs(compensated_sum(x, dtype=torch.float16).item() - exact)
    assert kept <= 1.0 < plain  # half a spacing of float16 near 2048 is 1


def test_sums_keep_the_other_dimensions():
    x = torch.randn(5, 2, 3)
    assert running_sum(x, dtype=torch.float32).shape == (2, 3)
    assert compensated_sum(x[:0], dtype=torch.float32).tolist() == [[0.0] * 3] * 2


def test_matmul_matches_float64_where_nothing_rounds():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-4, 5, (6, 100), generator=generator).half()
    b = torch.randint(-4, 5, (100, 3), generator=generator).half()
    exact = a.double() @ b.double()
    for accumulate in (torch.float32, torch.float16):
        got = matmul_accumulating(a, b, accumulate=accumulate)
        assert got.dtype == accumulate
        assert torch.equal(got.double(), exact)


def test_matmul_loses_more_in_float16():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(4, 8192, generator=generator).half()
    b = torch.rand(8192, 4, generator=generator).half()
    exact = a.double() @ b.double()
    error = {
        accumulate: ((matmul_accumulating(a, b, accumulate=accumulate) - exact) / exact).abs().max()
        for accumulate in (torch.float32, torch.float16)
    }
    assert error[torch.float32] < 1e-6
    assert error[torch.float16] > 1e-3


def test_rejects_shapes_that_do_not_fit():
    a, b = torch.ones(2, 3), torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"\(M, K\) and \(K, N\)"):
        matmul_accumulating(a, b, accumulate=torch.float32)
    with pytest.raises(ValueError, match="chunk"):
        matmul_accumulating(a, a.T, accumulate=torch.float32, chunk=0)
