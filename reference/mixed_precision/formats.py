"""Floating-point formats bit by bit: what a number of so many bits can and cannot say.

A format splits its bits into a sign s, an exponent field E and a mantissa field M of m bits:

    E > 0    (-1)^s * 2^(E - bias) * (1 + M / 2^m)        normal
    E = 0    (-1)^s * 2^(1 - bias) * M / 2^m              subnormal: the leading 1 is gone

IEEE formats keep the largest E for infinity and NaN; float8 e4m3 ("fn", finite) keeps a single
code for NaN and has no infinity. Range comes from the exponent bits, precision from the mantissa's.

Sources: IEEE 754-2019; bfloat16 and tf32 are its float32 with a shorter mantissa; fp8, arXiv
2209.05433.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class FloatFormat:
    """Widths of the two fields, and whether the top exponent is kept for infinity and NaN."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    has_infinity: bool = True

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def max(self) -> float:
        """Largest finite value: 65504 for float16, 448 for e4m3."""
        if self.has_infinity:
            return (2 - self.eps) * 2.0**self.bias
        return (2 - 2 * self.eps) * 2.0 ** (self.bias + 1)

    @property
    def min_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def min_subnormal(self) -> float:
        """Smallest positive value; half of it and less rounds to zero."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def eps(self) -> float:
        """Gap between 1 and the next value; a rounding errs by half of it at most, relatively."""
        return 2.0**-self.mantissa_bits


FLOAT32 = FloatFormat("float32", 8, 23)
TF32 = FloatFormat("tf32", 8, 10)
FLOAT16 = FloatFormat("float16", 5, 10)
BFLOAT16 = FloatFormat("bfloat16", 8, 7)
E5M2 = FloatFormat("float8_e5m2", 5, 2)
E4M3 = FloatFormat("float8_e4m3fn", 4, 3, has_infinity=False)

FORMATS = {f.name: f for f in (FLOAT32, TF32, FLOAT16, BFLOAT16, E5M2, E4M3)}


def spacing(x: Float[Tensor, "..."], fmt: FloatFormat) -> Float[Tensor, "..."]:
    """Gap between the format's neighbours around each |x|, float64: its unit in the last place.

    It doubles with each power of two and is constant among the subnormals.
    """
    mantissa, exponent = torch.frexp(x.double())  # |x| in [2^(exponent-1), 2^exponent)
    floor = torch.where(mantissa == 0, 1 - fmt.bias, exponent - 1).clamp(min=1 - fmt.bias)
    return torch.ldexp(torch.ones_like(x, dtype=torch.float64), floor - fmt.mantissa_bits)


def round_to(x: Float[Tensor, "..."], fmt: FloatFormat) -> Float[Tensor, "..."]:
    """The format's value nearest to each x, ties to the even mantissa; float64.

    Beyond the largest value lies infinity; a format that has none saturates, as torch casts do.
    """
    step = spacing(x, fmt)
    return overflow((x.double() / step).round() * step, fmt)


def round_stochastically(
    x: Float[Tensor, "..."], fmt: FloatFormat, *, generator: torch.Generator | None = None
) -> Float[Tensor, "..."]:
    """One of the two neighbours of each x, the nearer one more often, so that E[result] = x.

    An update far below the spacing is lost by every rounding to nearest; here it is applied now
    and then, right on average. Float64.

    Source: Gupta et al., arXiv 1502.02551, sec. 3.
    """
    step = spacing(x, fmt)
    chance = torch.rand(x.shape, generator=generator, dtype=torch.float64, device=x.device)
    return overflow((x.double() / step + chance).floor() * step, fmt)


def overflow(y: Tensor, fmt: FloatFormat) -> Tensor:
    """Beyond the largest number of a format: infinity where it has one, else that number."""
    beyond = torch.full_like(y, torch.inf if fmt.has_infinity else fmt.max)
    return torch.where(y.abs() > fmt.max, torch.copysign(beyond, y), y)


def encode(x: Float[Tensor, "..."], fmt: FloatFormat) -> Int[Tensor, "..."]:
    """The code of each x as an int64: sign, exponent field and mantissa field side by side."""
    y = round_to(x, fmt)
    magnitude = y.abs()
    step = spacing(magnitude, fmt)
    _, exponent = torch.frexp(magnitude)
    field = torch.where(magnitude < fmt.min_normal, 0, exponent.long() - 1 + fmt.bias)
    whole = (magnitude / step).nan_to_num(posinf=0.0).long()  # M, with the leading 1 if normal
    code = (field << fmt.mantissa_bits) + whole % 2**fmt.mantissa_bits
    top = 2 ** (fmt.exponent_bits + fmt.mantissa_bits) - 1  # all ones: NaN everywhere
    infinity = (2**fmt.exponent_bits - 1) << fmt.mantissa_bits
    code = torch.where(y.isinf(), infinity, code)
    code = torch.where(y.isnan(), top, code)
    return code + (torch.signbit(y).long() << (fmt.bits - 1))


def decode(codes: Int[Tensor, "..."], fmt: FloatFormat) -> Float[Tensor, "..."]:
    """The value of each code, float64.

    Raises: ValueError for a code outside of [0, 2^bits).
    """
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**fmt.bits:
        raise ValueError(
            f"codes: expected 0 <= code < {2**fmt.bits} for {fmt.name}, "
            f"got {int(codes.min())} to {int(codes.max())}"
        )
    sign, field, mantissa = fields(codes, fmt)
    fraction = mantissa.double() * fmt.eps + (field > 0)
    value = torch.ldexp(fraction, field.clamp(min=1) - fmt.bias)
    last = 2**fmt.exponent_bits - 1
    if fmt.has_infinity:
        special = torch.where(mantissa == 0, torch.inf, torch.nan).to(value)
        value = torch.where(field == last, special, value)
    else:
        is_nan = (field == last) & (mantissa == 2**fmt.mantissa_bits - 1)
        value = torch.where(is_nan, torch.nan, value)
    return torch.where(sign == 1, -value, value)


def fields(codes: Int[Tensor, "..."], fmt: FloatFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Sign, exponent field and mantissa field of each code."""
    mantissa = codes & (2**fmt.mantissa_bits - 1)
    field = (codes >> fmt.mantissa_bits) & (2**fmt.exponent_bits - 1)
    return codes >> (fmt.bits - 1), field, mantissa


def bit_string(x: float, fmt: FloatFormat) -> str:
    """The code of x as text, fields apart: "0 01111 0000000000" is 1.0 in float16."""
    sign, field, mantissa = fields(encode(torch.tensor(x, dtype=torch.float64), fmt), fmt)
    return f"{sign:b} {field:0{fmt.exponent_bits}b} {mantissa:0{fmt.mantissa_bits}b}"


@dataclass(frozen=True)
class Coverage:
    """Fractions of a tensor's nonzero values by what a format makes of them; they add up to 1."""

    lost: float
    subnormal: float
    normal: float
    overflowed: float


def coverage(x: Float[Tensor, "..."], fmt: FloatFormat, *, scale: float = 1.0) -> Coverage:
    """What becomes of the nonzero, finite values of `x` times `scale` when they are cast.

    Raises: ValueError where `x` has no nonzero finite value.
    Source: the question of Micikevicius et al., arXiv 1710.03740, sec. 3.1 and 3.2.
    """
    values = x.detach().double().flatten()
    values = values[values.isfinite() & (values != 0)] * scale
    if not len(values):
        raise ValueError("x: expected at least one finite value other than zero, got none")
    y = round_to(values, fmt).abs()
    lost, overflowed = y == 0, ~y.isfinite()
    subnormal = ~lost & (y < fmt.min_normal)
    counts = [float(part.double().mean()) for part in (lost, subnormal, overflowed)]
    return Coverage(counts[0], counts[1], 1 - sum(counts), counts[2])
