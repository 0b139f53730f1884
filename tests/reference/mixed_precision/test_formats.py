import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference.mixed_precision import (
    BFLOAT16,
    E4M3,
    E5M2,
    FLOAT16,
    FLOAT32,
    FORMATS,
    TF32,
    bit_string,
    coverage,
    decode,
    encode,
    fields,
    round_stochastically,
    round_to,
    spacing,
)

STORED = [
    (FLOAT16, torch.float16, torch.int16),
    (BFLOAT16, torch.bfloat16, torch.int16),
    (E5M2, torch.float8_e5m2, torch.uint8),
    (E4M3, torch.float8_e4m3fn, torch.uint8),
]
stored = pytest.mark.parametrize("fmt, dtype, code_dtype", STORED, ids=lambda v: str(v)[:22])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal values, NaN equal to NaN, zeros of equal sign."""
    a, b = a.double(), b.double()
    return bool((((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())).all())


def hard_values() -> torch.Tensor:
    """A million float32 bit patterns, and values around the limits of the narrow formats."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (1_000_000,), generator=generator)
    edges = [0.0, -0.0, 464.0, 465.0, 61440.0, 65519.0, 65520.0, 2.0**-25, 2.0**-24, 3e38]
    return torch.cat([patterns.to(torch.int32).view(torch.float32), torch.tensor(edges)])


@stored
def test_matches_finfo(fmt, dtype, code_dtype):
    info = torch.finfo(dtype)
    assert (fmt.max, fmt.min_normal, fmt.eps) == (info.max, info.smallest_normal, info.eps)
    assert fmt.bits == info.bits


def test_matches_finfo_float32():
    info = torch.finfo(torch.float32)
    assert (FLOAT32.max, FLOAT32.min_normal, FLOAT32.eps) == (
        info.max,
        info.smallest_normal,
        info.eps,
    )


@stored
def test_matches_every_code_of_torch(fmt, dtype, code_dtype):
    codes = torch.arange(2**fmt.bits)
    values = codes.to(torch.int32).to(code_dtype).view(dtype).float()
    assert same(decode(codes, fmt), values)
    numbers = ~values.isnan()
    assert torch.equal(encode(values[numbers], fmt), codes[numbers])


@stored
def test_matches_torch_casts(fmt, dtype, code_dtype):
    x = hard_values()
    assert same(round_to(x, fmt), x.to(dtype))


def test_matches_casts_to_float32():
    x = torch.randn(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(round_to(x * 1e-40, FLOAT32), (x * 1e-40).float().double())
    assert torch.equal(round_to(x, FLOAT32), x.float().double())


def test_matches_bit_masks_for_tf32():
    x = hard_values()
    x = x[x.isfinite() & (x.abs() < TF32.max)]
    codes = x.view(torch.int32).long()
    rounded = (codes + 0xFFF + ((codes >> 13) & 1)) & ~0x1FFF  # nearest even, 13 bits fewer
    assert same(round_to(x, TF32), rounded.to(torch.int32).view(torch.float32))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_invariant_spacing_is_the_distance_to_the_next_value(fmt):
    top = 2 ** (fmt.exponent_bits + fmt.mantissa_bits) - 2 ** (fmt.mantissa_bits + 1)
    codes = torch.randint(0, top, (1000,), generator=torch.Generator().manual_seed(0))
    gap = decode(codes + 1, fmt) - decode(codes, fmt)
    assert torch.equal(spacing(decode(codes, fmt), fmt), gap)


@given(st.floats(-1e5, 1e5), st.sampled_from(sorted(FORMATS)))
def test_invariant_rounding_is_idempotent_and_near(x, name):
    fmt = FORMATS[name]
    value = torch.tensor(x, dtype=torch.float64)
    y = round_to(value, fmt)
    assert same(round_to(y, fmt), y)
    if y.isfinite() and abs(x) <= fmt.max:
        assert abs(y - value) <= spacing(value, fmt) / 2


@given(st.floats(allow_nan=False), st.sampled_from(sorted(FORMATS)))
def test_invariant_codes_round_trip(x, name):
    fmt = FORMATS[name]
    value = round_to(torch.tensor(x, dtype=torch.float64), fmt)
    assert same(decode(encode(value, fmt), fmt), value)


def test_stochastic_rounding_takes_a_neighbour_and_is_unbiased():
    fmt, x = BFLOAT16, torch.full((200_000,), 1.0 + 0.3 * BFLOAT16.eps, dtype=torch.float64)
    y = round_stochastically(x, fmt, generator=torch.Generator().manual_seed(0))
    assert set(y.unique().tolist()) == {1.0, 1.0 + fmt.eps}
    share = float((y > 1).double().mean())
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / len(x)) ** 0.5  # five standard errors


def test_stochastic_rounding_keeps_representable_values():
    x = decode(torch.arange(2**8)[:0x7F], E4M3)
    assert torch.equal(round_stochastically(x, E4M3), x)


def test_bits_as_text():
    assert bit_string(1.0, FLOAT16) == "0 01111 0000000000"
    assert bit_string(-(2.0**-24), FLOAT16) == "1 00000 0000000001"
    assert bit_string(float("inf"), BFLOAT16) == "0 11111111 0000000"
    sign, field, mantissa = fields(torch.tensor([0b1_1000_001]), E4M3)
    assert (sign.item(), field.item(), mantissa.item()) == (1, 8, 1)


def test_coverage_counts_what_a_cast_does():
    x = torch.tensor([2.0**-26, 2.0**-20, 1.0, 1e6, 0.0, float("nan")])
    part = coverage(x, FLOAT16)
    assert (part.lost, part.subnormal, part.normal, part.overflowed) == (0.25, 0.25, 0.25, 0.25)
    assert coverage(x[:1], FLOAT16, scale=8.0).lost == 0


def test_invariant_coverage_agrees_with_torch_casts():
    x = torch.logspace(-12, 6, 5000).double()
    part, cast = coverage(x, FLOAT16), x.half().double()
    assert part.lost == float((cast == 0).double().mean())
    assert part.overflowed == float(cast.isinf().double().mean())
    assert sum((part.lost, part.subnormal, part.normal, part.overflowed)) == pytest.approx(1)


def test_empty_tensors():
    empty = torch.empty(0, 3)
    assert round_to(empty, FLOAT16).shape == (0, 3)
    assert decode(encode(empty, E5M2), E5M2).shape == (0, 3)


def test_rejects_codes_out_of_range():
    with pytest.raises(ValueError, match="expected 0 <= code < 256"):
        decode(torch.tensor([256]), E4M3)
    with pytest.raises(ValueError, match="got -1"):
        decode(torch.tensor([-1]), FLOAT16)


def test_rejects_coverage_of_nothing():
    with pytest.raises(ValueError, match="at least one finite value"):
        coverage(torch.zeros(3), FLOAT16)
