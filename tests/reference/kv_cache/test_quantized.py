import pytest
import torch

from reference.kv_cache import DynamicCache, Int8Cache, dequantize, generate, quantize_rows
from tests.reference.kv_cache.test_dynamic import new


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_torch_fake_quantize(dtype):
    x = new(7, dtype=dtype)[0].flatten(0, 2) * torch.logspace(-3, 2, 42)[:, None].to(dtype)
    codes, scale = quantize_rows(x)
    expected = torch.fake_quantize_per_channel_affine(
        x.float(), scale[:, 0], torch.zeros(len(x), dtype=torch.int32), 0, -127, 127
    )
    torch.testing.assert_close(dequantize(codes, scale), expected, rtol=1e-6, atol=0)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32


@pytest.mark.parametrize("dim", [-1, -2])
def test_invariant_error_is_half_a_scale_and_zeros_stay(dim):
    x = new(7)[0]
    x[0, 0] = 0
    codes, scale = quantize_rows(x, dim)
    error = (dequantize(codes, scale) - x).abs()
    assert (error <= scale / 2 * (1 + 1e-5)).all()
    assert not dequantize(codes, scale)[0, 0].any()
    assert (codes.abs().amax(dim) == 127)[1].all()


def test_invariant_the_cut_into_calls_does_not_matter():
    k, v = new(9)
    whole = Int8Cache().update(k, v, 0)
    cache = Int8Cache()
    for part in range(9):
        got = cache.update(k[:, :, part : part + 1], v[:, :, part : part + 1], 0)
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(got[0], k, rtol=0, atol=k.abs().max().item() / 254 * 1.001)


def test_invariant_bytes():
    k, v = (x.repeat_interleave(16, -1) for x in new(10))  # d = 64
    small, large = Int8Cache(), DynamicCache()
    small.update(k, v, 0)
    large.update(k, v, 0)
    assert small.nbytes / large.nbytes == (64 + 4) / (4 * 64)


def test_invariant_the_course_model_says_nearly_the_same(course, prompts):
    model, ids = course
    exact = model(ids[None, :200], cache=DynamicCache())
    close = model(ids[None, :200], cache=Int8Cache())
    change = (exact.log_softmax(-1).exp() - close.log_softmax(-1).exp()).abs().sum(-1) / 2
    assert change.mean() < 0.02  # total variation
    same = generate(model, prompts, 8, cache=Int8Cache()) == generate(model, prompts, 8)
    assert same.float().mean() > 0.75


def test_invariant_what_is_not_finite_stays_so_and_spoils_its_row_alone():
    """A code of 0 would turn NaN into a number, and round its neighbours to whole ones."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for bad in (torch.nan, torch.inf, -torch.inf):
        y = x.clone()
        y[1, 2] = bad
        back = dequantize(*quantize_rows(y))
        assert bool(back[1].isnan().all())
        assert torch.equal(back[[0, 2]], dequantize(*quantize_rows(x))[[0, 2]])


def test_invariant_the_bound_holds_for_subnormal_rows():
    tiny = torch.finfo(torch.float32).tiny
    for largest in (1e-37, 1e-39, 1e-42, 1e-45, 0.0):
        x = torch.linspace(-1, 1, 9) * largest
        codes, scale = quantize_rows(x)
        assert float(scale) >= tiny
        # half a scale, and half of the smallest subnormal for the product's own rounding
        assert bool(((dequantize(codes, scale) - x).abs() <= scale / 2 + 1e-45).all())
