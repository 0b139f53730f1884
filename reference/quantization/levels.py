"""The 16 values of a 4-bit code, and the 256 of the 8-bit code that double quantisation uses.

NF4     quantiles of the normal distribution, scaled to [-1, 1]: where weights are dense the levels
        are dense. 7 negative, an exact zero, 8 positive
FP4     a float of 1 sign, 2 exponent and 1 mantissa bit, scaled to [-1, 1]
INT4    evenly spaced, -7/7 ... 7/7; one code is never used
DYNAMIC 8-bit codes whose exponent is unary: fine near zero, coarse near one

The normal distribution has no largest value, so the outermost levels are its quantiles at
0.9677083 = (31/32 + 29/30) / 2 and at 1 minus that, which then become 1 and -1.

Papers: QLoRA, 2305.14314, sec. 3 and App. E (the NF4 table); dynamic tree quantisation, 1511.04561
and 2110.02861. QLoRA's eq. 4 describes another, symmetric construction; the table is the fact.
"""

import torch
from jaxtyping import Float
from torch import Tensor

OFFSET = (31 / 32 + 29 / 30) / 2


def normal_float_levels(bits: int = 4, *, offset: float = 0.9677083) -> Float[Tensor, " levels"]:
    """Levels of NormalFloat: quantiles, one more on the positive side, and zero between.

    Quantiles in float64 of probabilities in float32, as bitsandbytes made its table, so that the
    float32 result is that table bit for bit.

    Raises: ValueError for bits outside 2 ... 8 or an offset outside (0.5, 1).
    Source: arXiv 2305.14314, App. E.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: expected 2 to 8, got {bits}")
    if not 0.5 < offset < 1:
        raise ValueError(f"offset: expected a probability between 0.5 and 1, got {offset}")
    half = 2 ** (bits - 1)
    positive, negative = (
        torch.special.ndtri(torch.linspace(offset, 0.5, n).double())[:-1] for n in (half + 1, half)
    )
    levels = torch.cat([-negative, torch.zeros(1), positive.flip(0)]).float()
    return levels / levels.max()


def float4_levels() -> Float[Tensor, "16"]:
    """FP4 in the order of its bit patterns: sign, two bits e of exponent, one bit m of mantissa.

    e = 0 stands for m / 16, the others for 2^(4 - e) (1 + m / 2): bitsandbytes' exponent counts
    down. All are divided by the largest, 12. Pattern 8, a negative zero, is worth 0 as well.

    Source: bitsandbytes, functional.get_4bit_type("fp4").
    """
    normal = [2.0 ** (4 - e) * (1 + m / 2) for e in (1, 2, 3) for m in (0, 1)]
    positive = torch.tensor([0, 1 / 16, *normal])
    return torch.cat([positive, -positive]) / 12


def integer4_levels() -> Float[Tensor, "16"]:
    """-7/7 ... 7/7, and the code 15 as a second 1: absmax int4 wastes one of its 16 codes."""
    return torch.arange(-7, 9).clamp(max=7) / 7


def dynamic_levels() -> Float[Tensor, "256"]:
    """The signed 8-bit map: 7 decades, with 2^i values a sign in decade i, then zero and one.

    Source: arXiv 2110.02861; bitsandbytes, functional.create_dynamic_map.
    """
    positive = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        positive.append(10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2))
    values = torch.cat(positive)
    both = torch.cat([values, -values, torch.tensor([0.0, 1.0])])
    return both.sort().values


def nearest_level(x: Float[Tensor, "..."], levels: Float[Tensor, " levels"]) -> torch.Tensor:
    """The index of the level nearest to each x, uint8; a tie goes to the lower level.

    `levels` may stand in any order (FP4's do): the index is into them as they stand.
    """
    order = torch.argsort(levels, stable=True)
    ascending = levels[order]
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    return order.to(torch.uint8)[torch.bucketize(x, midpoints, out_int32=True)]
