"""Chapter 09: wrong answers that people give, and right ones in another form."""

import math

import torch

from autograder import alternative, misconception

ABSMAX = "2. Absmax and zero point"
SHARE = "3. Who shares a scale"
LEVELS = "5. Sixteen levels"
BLOCKS = "6. Blocks and packed bytes"
DOUBLE = "7. Scales have scales"
COMPUTE = "8. Nothing computes in four bits"
QLORA = "9. QLoRA: training through the frozen base"
PAGED = "10. Paged optimizers"
AWQ = "11. Which weights matter"
FIGURES = "14. Published figures"


def _dequantize(packed, absmax, levels):
    """What the exercises give as `dequantize_blocks`."""
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten().int()
    return (levels.float()[codes].view(len(absmax), -1) * absmax[:, None]).flatten()


def _round_groups(weight, bits, group_size):
    """What the exercises give as `round_groups`."""
    groups = weight.unflatten(1, (-1, group_size))
    largest = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True) / largest
    scale = torch.where(scale == 0, 1.0, scale)
    return ((groups / scale).round() * scale).flatten(1)


# quantize_groups


def _groups(weight, bits, group_size, *, low=None, high=None, steps=None, rounding=torch.round,
            zero=torch.round, joint=False, shared=None):  # fmt: skip
    """Right, but for the ends, the number of steps, the rounding, and who shares."""
    largest = 2**bits - 1
    groups = weight.float().unflatten(1, (-1, group_size))
    reduce = (-1,) if shared is None else shared
    lows, highs = groups.amin(reduce, keepdim=True), groups.amax(reduce, keepdim=True)
    lows, highs = lows.expand(*groups.shape[:2], 1), highs.expand(*groups.shape[:2], 1)
    lows = lows.clamp(max=0) if low is None else low(lows, highs)
    highs = highs.clamp(min=0) if high is None else high(groups.amin(-1, keepdim=True), highs)
    scale = (highs - lows) / (largest if steps is None else steps(bits))
    scale = torch.where(scale == 0, 1.0, scale)
    zeros = zero(-lows / scale).clamp(0, largest)
    codes = rounding(groups / scale - lows / scale) if joint else rounding(groups / scale) + zeros
    codes = codes.clamp(0, largest).flatten(1).to(torch.uint8)
    return codes, scale[..., 0].contiguous(), zeros[..., 0].to(torch.uint8)


@misconception(
    "quantize_groups",
    "Your codes span smallest to largest even where both have one sign, so that no code stands for "
    "zero. low is at most 0 and high at least 0: zero must survive exactly.",
    see=ABSMAX,
)
def leaves_zero_out_of_the_range(weight, bits, group_size):
    return _groups(weight, bits, group_size, low=lambda a, b: a, high=lambda a, b: b)


@misconception(
    "quantize_groups",
    "All groups of a row share a scale in your result. Each group has its own low and high: that "
    "is what keeps an outlier in its group.",
    see=SHARE,
)
def one_scale_for_a_row(weight, bits, group_size):
    return _groups(weight, bits, group_size, shared=(-2, -1))


@misconception(
    "quantize_groups",
    "The whole matrix shares a scale in your result. Each group of a row has its own.",
    see=SHARE,
)
def one_scale_for_the_tensor(weight, bits, group_size):
    return _groups(weight, bits, group_size, shared=(-3, -2, -1))


@misconception(
    "quantize_groups",
    "You cut the fraction off instead of rounding: an error of up to a whole step instead of half "
    "of one, and always to the same side.",
    see=ABSMAX,
)
def truncates_instead_of_rounding(weight, bits, group_size):
    return _groups(weight, bits, group_size, rounding=torch.floor)


@misconception(
    "quantize_groups",
    "You divide the range by 2^bits. Between 2^bits codes there are 2^bits - 1 steps.",
    see=ABSMAX,
)
def counts_one_step_too_many(weight, bits, group_size):
    return _groups(weight, bits, group_size, steps=lambda bits: 2**bits)


@misconception(
    "quantize_groups",
    "You centre the codes on zero and scale by the largest absolute value: absmax. Where a group "
    "leans to one side, codes on the other are wasted; the zero point is there to shift them.",
    see=ABSMAX,
)
def scales_by_the_largest_absolute_value(weight, bits, group_size):
    def reach(a, b):
        return torch.maximum(a.abs(), b.abs())

    return _groups(
        weight, bits, group_size, low=lambda a, b: -reach(a, b), high=lambda a, b: reach(a, b)
    )


@misconception(
    "quantize_groups",
    "Your zero point is cut off, not rounded: half of the groups are shifted by one code.",
    see=ABSMAX,
)
def truncates_the_zero_point(weight, bits, group_size):
    return _groups(weight, bits, group_size, zero=torch.floor)


@misconception(
    "quantize_groups",
    "Your codes are round((x - low) / scale), with the unrounded end. Then zero falls between two "
    "codes and code - zero_point is off by a fraction of a step everywhere.",
    see=ABSMAX,
)
def rounds_the_distance_from_the_low_end(weight, bits, group_size):
    return _groups(weight, bits, group_size, joint=True)


@misconception(
    "quantize_groups",
    "Your scale of a group of zeros is not 1. The range is 0 there, and dividing by it gives nan: "
    "take 1 for it.",
    see=ABSMAX,
)
def divides_by_a_range_of_zero(weight, bits, group_size):
    codes, scale, zero = _groups(weight, bits, group_size)
    is_empty = (weight.unflatten(1, (-1, group_size)) == 0).all(-1)
    return codes, scale.masked_fill(is_empty, 0.0), zero


@alternative("quantize_groups")
def group_by_group(weight, bits, group_size):
    largest = 2**bits - 1
    rows, columns = weight.shape
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    scale = torch.ones(rows, columns // group_size)
    zero = torch.zeros(rows, columns // group_size, dtype=torch.uint8)
    for n in range(rows):
        for g in range(columns // group_size):
            part = weight[n, g * group_size : (g + 1) * group_size].to(torch.float32)
            low, high = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
            if high > low:
                scale[n, g] = (high - low) / largest
                zero[n, g] = round(-low / ((high - low) / largest))
            counted = (part / scale[n, g]).round().int() + int(zero[n, g])
            codes[n, g * group_size : (g + 1) * group_size] = counted.clamp(0, largest)
    return codes, scale, zero


@alternative("quantize_groups")
def with_reshapes(weight, bits, group_size):
    largest = 2**bits - 1
    flat = weight.to(torch.float32).reshape(-1, group_size)
    zeros = torch.zeros(len(flat), 1)
    low = torch.cat([flat, zeros], 1).min(1, keepdim=True).values
    high = torch.cat([flat, zeros], 1).max(1, keepdim=True).values
    scale = (high - low) / largest
    scale[scale == 0] = 1
    zero = torch.round(-low / scale)
    codes = torch.clip(torch.round(flat / scale) + zero, 0, largest)
    shape = (len(weight), -1)
    return (
        codes.to(torch.uint8).reshape(weight.shape),
        scale.reshape(shape),
        zero.to(torch.uint8).reshape(shape),
    )


# normal_float


def _quantiles(*probabilities):
    return torch.special.ndtri(torch.cat([p.double() for p in probabilities]))


def _even(low, high, number):
    return torch.linspace(low, high, number, dtype=torch.float64)


@misconception(
    "normal_float",
    "Your levels are evenly spaced. That is an integer type; NormalFloat's levels are quantiles, "
    "dense where normal numbers are dense.",
    see=LEVELS,
)
def evenly_spaced_levels(bits, offset):
    return _even(-1, 1, 2**bits)


@misconception(
    "normal_float",
    "Your levels are symmetric, and none of them is zero. NF4 has an exact zero: 7 levels below "
    "it, 8 above.",
    see=LEVELS,
)
def symmetric_without_an_exact_zero(bits, offset):
    levels = _quantiles(_even(1 - offset, offset, 2**bits))
    return levels / levels[-1]


@misconception(
    "normal_float",
    "You have one level too many below zero and one too few above. The extra one is positive.",
    see=LEVELS,
)
def the_extra_level_is_negative(bits, offset):
    half = 2 ** (bits - 1)
    levels = _quantiles(_even(1 - offset, 0.5, half + 1)[:-1], _even(0.5, offset, half))
    return levels / levels[-1]


@misconception(
    "normal_float",
    "Your levels are the quantiles themselves. Divide by the largest: they must run from -1 to 1, "
    "as numbers divided by their absmax do.",
    see=LEVELS,
)
def does_not_scale_to_one(bits, offset):
    half = 2 ** (bits - 1)
    return _quantiles(_even(1 - offset, 0.5, half)[:-1], _even(0.5, offset, half + 1))


@misconception(
    "normal_float",
    "Zero stands twice in your levels: 0.5 is the end of both sides, and one code is wasted.",
    see=LEVELS,
)
def zero_twice(bits, offset):
    half = 2 ** (bits - 1)
    levels = _quantiles(_even(1 - offset, 0.5, half), _even(0.5, offset, half))
    return levels / levels[-1]


@misconception(
    "normal_float",
    "Your offset is always 0.9677083, that of NF4. The function's own argument says where the "
    "outermost levels are.",
    see=LEVELS,
)
def ignores_the_offset(bits, offset):
    half = 2 ** (bits - 1)
    low, high = 1 - 0.9677083, 0.9677083
    levels = _quantiles(_even(low, 0.5, half)[:-1], _even(0.5, high, half + 1))
    return levels / levels[-1]


@misconception(
    "normal_float",
    "This is the paper's eq. 4, midpoints of neighbouring quantiles. It gives 2^bits - 1 finite "
    "levels and is not how the published table was made: see the docstring's two sides.",
    see=LEVELS,
)
def follows_equation_four(bits, offset):
    count = 2**bits
    quantiles = _quantiles(_even(0, 1, count + 2)[1:-1])
    levels = (quantiles[1:] + quantiles[:-1]) / 2
    return levels / levels[-1]


@misconception(
    "normal_float",
    "Your probabilities are evenly spaced from one end to the other, with the middle one moved to "
    "zero. The two sides have steps of their own, since they have different numbers of levels.",
    see=LEVELS,
)
def one_spacing_for_both_sides(bits, offset):
    levels = _quantiles(_even(1 - offset, offset, 2**bits))
    levels[2 ** (bits - 1) - 1] = 0
    return levels / levels[-1]


@alternative("normal_float")
def by_the_standard_library(bits, offset):
    from statistics import NormalDist

    half, quantile = 2 ** (bits - 1), NormalDist().inv_cdf
    top = quantile(offset)
    positive = [quantile(0.5 + (offset - 0.5) * i / half) / top for i in range(1, half + 1)]
    negative = [-quantile(offset - (offset - 0.5) * i / (half - 1)) / top for i in range(half - 1)]
    return torch.tensor([*negative, 0.0, *positive], dtype=torch.float64)


@alternative("normal_float")
def by_the_inverse_error_function(bits, offset):
    half = 2 ** (bits - 1)

    def side(number):
        return torch.erfinv(2 * _even(0.5, offset, number) - 1)[1:]

    levels = torch.cat([-side(half).flip(0), torch.zeros(1, dtype=torch.float64), side(half + 1)])
    return levels / levels.max()


# quantize_blocks


def _blocks(x, levels, block_size, *, absmax=None, nearest=None, join=None, one=False):
    """Right, but for the absmax, the choice of a level, and the order of the halves."""
    blocks = x.float().reshape(-1, block_size)
    largest = blocks.abs().amax(1) if absmax is None else absmax(blocks)
    if one:
        largest = largest.max().expand(len(blocks)).contiguous()
    scaled = (blocks / torch.where(largest == 0, 1.0, largest)[:, None]).flatten()
    midpoints = (levels[:-1] + levels[1:]) / 2
    codes = torch.bucketize(scaled, midpoints) if nearest is None else nearest(scaled, levels)
    codes = codes.clamp(0, 15).to(torch.uint8)
    packed = codes[::2] * 16 + codes[1::2] if join is None else join(codes)
    return packed, largest


@misconception(
    "quantize_blocks",
    "Your first code is in the low half of the byte. The first of two neighbours takes the high "
    "four bits.",
    see=BLOCKS,
)
def first_code_in_the_low_half(x, levels, block_size):
    return _blocks(x, levels, block_size, join=lambda c: c[::2] + c[1::2] * 16)


@misconception(
    "quantize_blocks",
    "Your absmax is the largest value, not the largest absolute value: a block whose extreme is "
    "negative is scaled by something smaller and clipped.",
    see=ABSMAX,
)
def takes_the_largest_signed_value(x, levels, block_size):
    return _blocks(x, levels, block_size, absmax=lambda b: b.amax(1))


@misconception(
    "quantize_blocks",
    "All of your blocks share one absmax. Each has its own: a large number spoils 64, not all.",
    see=BLOCKS,
)
def one_absmax_for_the_tensor(x, levels, block_size):
    return _blocks(x, levels, block_size, one=True)


@misconception(
    "quantize_blocks",
    "You take the level below each number, not the nearest. Search among the points halfway "
    "between neighbouring levels.",
    see=LEVELS,
)
def takes_the_level_below(x, levels, block_size):
    return _blocks(
        x, levels, block_size, nearest=lambda s, t: torch.bucketize(s, t, right=True) - 1
    )


@misconception(
    "quantize_blocks",
    "Your codes are rounded as if the levels were evenly spaced from -1 to 1. They are not: look "
    "the nearest up in `levels`.",
    see=LEVELS,
)
def treats_the_levels_as_even(x, levels, block_size):
    return _blocks(x, levels, block_size, nearest=lambda s, t: ((s + 1) * 7.5).round())


@misconception(
    "quantize_blocks",
    "Your bytes join the first half of the codes with the second half. Neighbours share a byte: "
    "codes 0 and 1, codes 2 and 3.",
    see=BLOCKS,
)
def joins_the_two_halves(x, levels, block_size):
    def join(codes):
        high, low = codes.chunk(2)
        return high * 16 + low

    return _blocks(x, levels, block_size, join=join)


@misconception(
    "quantize_blocks",
    "Your result is right, but you compare each number with all 16 levels at once, a tensor 16 "
    "times the weight. Compare with the 15 points between them (torch.bucketize).",
    see=BLOCKS,
)
def measures_all_distances(x, levels, block_size):
    return _blocks(
        x,
        levels,
        block_size,
        nearest=lambda s, t: (s[:, None].double() - t.double()).abs().argmin(-1),
    )


@misconception(
    "quantize_blocks",
    "Your scaled numbers were rounded to the half precision of x before the search. Convert to "
    "float32 first, then divide.",
    see=BLOCKS,
)
def divides_in_half_precision(x, levels, block_size):
    blocks = x.reshape(-1, block_size)
    largest = blocks.abs().amax(1)
    scaled = (blocks / torch.where(largest == 0, 1.0, largest)[:, None].to(x.dtype)).float()
    codes = torch.bucketize(scaled.flatten(), (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
    return codes[::2] * 16 + codes[1::2], largest.float()


@misconception(
    "quantize_blocks",
    "In a block of zeros you divide by zero: nan has no nearest level, and gets the last code.",
    see=BLOCKS,
)
def divides_by_an_absmax_of_zero(x, levels, block_size):
    packed, largest = _blocks(x, levels, block_size)
    packed = packed.clone()
    packed.view(-1, block_size // 2)[largest == 0] = 255
    return packed, largest


@alternative("quantize_blocks")
def counting_the_midpoints_below(x, levels, block_size):
    blocks = x.to(torch.float32).contiguous().view(-1, block_size)
    absmax = blocks.abs().max(dim=1).values
    scaled = torch.nan_to_num(blocks / absmax[:, None])
    codes = torch.zeros(scaled.shape, dtype=torch.uint8)
    for low, high in zip(levels[:-1], levels[1:], strict=True):
        codes += scaled > (low + high) / 2
    codes = codes.view(-1, 2)
    return (codes[:, 0] << 4) | codes[:, 1], absmax


@alternative("quantize_blocks")
def keeping_the_best_level_so_far(x, levels, block_size):
    flat = x.float().reshape(-1)
    absmax = flat.view(-1, block_size).abs().amax(1)
    scaled = flat / absmax.clamp(min=1e-30).repeat_interleave(block_size)
    best = torch.full_like(flat, math.inf)
    codes = torch.zeros(len(flat), dtype=torch.uint8)
    for i, level in enumerate(levels):
        distance = (scaled - level).abs()
        codes[distance < best] = i
        best = torch.minimum(best, distance)
    return torch.bitwise_or(codes[0::2] << 4, codes[1::2]), absmax


# qlora_bytes


def _bytes(matrices, rank, block_size, outer, *, scales=None, trained=None, bits=4, moments=8,
           of_base=None, weight=2):  # fmt: skip
    total = dict.fromkeys(("codes", "scales", "adapters", "gradients", "optimizer"), 0)
    for n, d, count in matrices:
        blocks = n * d // block_size
        if scales is not None and outer is not None:
            own = scales(blocks, outer)
        else:
            own = 4 * blocks if outer is None else blocks + 4 * -(-blocks // outer) + 4
        p = rank * (n + d) if trained is None else trained(n, d, rank)
        moved = p + n * d if of_base else p
        total["codes"] += count * (n * d * bits // 8)
        total["scales"] += count * own
        total["adapters"] += int(count * weight * p)
        total["gradients"] += count * 2 * moved
        total["optimizer"] += count * moments * moved
    return total


@misconception(
    "qlora_bytes",
    "You give gradients and moments to the frozen base. Nothing of it is trained: what is stored "
    "in 4 bits never changes, and only the adapters have gradients.",
    see=COMPUTE,
)
def trains_the_four_bit_weights(matrices, rank, block_size=64, outer_block_size=256):
    return _bytes(matrices, rank, block_size, outer_block_size, of_base=True)


@misconception(
    "qlora_bytes",
    "Double quantisation does not quantise the weights twice: their codes stay at 4 bits. It is "
    "the scales that are quantised.",
    see=DOUBLE,
)
def double_quantization_halves_the_codes(matrices, rank, block_size=64, outer_block_size=256):
    bits = 4 if outer_block_size is None else 2
    return _bytes(matrices, rank, block_size, outer_block_size, bits=bits)


@misconception(
    "qlora_bytes",
    "You keep the float32 scales beside the 8-bit ones. Double quantisation replaces them.",
    see=DOUBLE,
)
def keeps_the_float32_scales_too(matrices, rank, block_size=64, outer_block_size=256):
    return _bytes(
        matrices,
        rank,
        block_size,
        outer_block_size,
        scales=lambda blocks, outer: 5 * blocks + 4 * -(-blocks // outer) + 4,
    )


@misconception(
    "qlora_bytes",
    "The outer scales are missing: 8-bit codes need scales as well, a float32 for each outer "
    "block.",
    see=DOUBLE,
)
def forgets_the_outer_scales(matrices, rank, block_size=64, outer_block_size=256):
    return _bytes(
        matrices, rank, block_size, outer_block_size, scales=lambda blocks, outer: blocks + 4
    )


@misconception(
    "qlora_bytes",
    "The mean that is taken off before the scales are quantised is missing: 4 bytes a matrix.",
    see=DOUBLE,
)
def forgets_the_mean_of_the_scales(matrices, rank, block_size=64, outer_block_size=256):
    return _bytes(
        matrices,
        rank,
        block_size,
        outer_block_size,
        scales=lambda blocks, outer: blocks + 4 * -(-blocks // outer),
    )


@misconception(
    "qlora_bytes",
    "You round the number of outer blocks down. A last, shorter block has a scale as well.",
    see=DOUBLE,
)
def rounds_outer_blocks_down(matrices, rank, block_size=64, outer_block_size=256):
    return _bytes(
        matrices,
        rank,
        block_size,
        outer_block_size,
        scales=lambda blocks, outer: blocks + 4 * (blocks // outer) + 4,
    )


@misconception(
    "qlora_bytes",
    "Your adapters are stored in 4 bits. They are trained, so they stay in 16: only the frozen "
    "base is quantised.",
    see=QLORA,
)
def adapters_in_four_bits(matrices, rank, block_size=64, outer_block_size=256):
    return _bytes(matrices, rank, block_size, outer_block_size, weight=0.5)


@misconception(
    "qlora_bytes",
    "Adam keeps two moments of 4 bytes each for a trained number. You count one.",
    see=FIGURES,
)
def one_moment(matrices, rank, block_size=64, outer_block_size=256):
    return _bytes(matrices, rank, block_size, outer_block_size, moments=4)


@misconception(
    "qlora_bytes",
    "Your adapters have one matrix. A is rank x D, B is N x rank: rank * (N + D) numbers.",
    see=QLORA,
)
def counts_one_matrix_of_the_adapter(matrices, rank, block_size=64, outer_block_size=256):
    return _bytes(matrices, rank, block_size, outer_block_size, trained=lambda n, d, rank: rank * d)


@misconception(
    "qlora_bytes",
    "Your codes take a byte each. Two codes of 4 bits share one.",
    see=BLOCKS,
)
def a_byte_for_each_code(matrices, rank, block_size=64, outer_block_size=256):
    return _bytes(matrices, rank, block_size, outer_block_size, bits=8)


@misconception(
    "qlora_bytes",
    "You count the outer blocks of all matrices together. Each matrix is stored by itself, with "
    "its own last, shorter block and its own mean.",
    see=DOUBLE,
)
def joins_the_matrices(matrices, rank, block_size=64, outer_block_size=256):
    answer = _bytes(matrices, rank, block_size, outer_block_size)
    blocks = sum(n * d * count for n, d, count in matrices) // block_size
    if outer_block_size is not None:
        answer["scales"] = blocks + 4 * -(-blocks // outer_block_size) + 4
    return answer


@alternative("qlora_bytes")
def matrix_after_matrix(matrices, rank, block_size=64, outer_block_size=256):
    answer = {"codes": 0, "scales": 0, "adapters": 0, "gradients": 0, "optimizer": 0}
    for rows, columns, count in matrices:
        for _ in range(count):
            numbers = rows * columns
            blocks = math.ceil(numbers / block_size)
            answer["codes"] += math.ceil(numbers * 4 / 8)
            if outer_block_size:
                answer["scales"] += blocks + 4 * (math.ceil(blocks / outer_block_size) + 1)
            else:
                answer["scales"] += blocks * 4
            adapter = rank * columns + rows * rank
            answer["adapters"] += adapter * 2
            answer["gradients"] += adapter * 2
            answer["optimizer"] += adapter * (4 + 4)
    return answer


@alternative("qlora_bytes")
def by_sums(matrices, rank, block_size=64, outer_block_size=256):
    def scale_bytes(blocks):
        if outer_block_size is None:
            return 4 * blocks
        return blocks + 4 * ((blocks + outer_block_size - 1) // outer_block_size) + 4

    trained = sum(count * rank * (n + d) for n, d, count in matrices)
    return {
        "optimizer": 8 * trained,
        "gradients": 2 * trained,
        "adapters": 2 * trained,
        "codes": sum(count * n * d for n, d, count in matrices) // 2,
        "scales": sum(count * scale_bytes(n * d // block_size) for n, d, count in matrices),
    }


# qlora_backward


def _back(grad_y, x, packed, absmax, levels, A, B, scaling, *, values=None, base=True,
          in_x=None, in_A=None, in_B=None, low_rank=True):  # fmt: skip
    """Right, but for the values of the weight, the paths, and the scaling of each gradient."""
    if values is None:
        values = _dequantize(packed, absmax, levels)
    weight = values.view(len(B), -1).to(x.dtype)
    factor_x, factor_A, factor_B = (scaling if f is None else f for f in (in_x, in_A, in_B))
    grad_x = factor_x * grad_y @ B @ A if low_rank else torch.zeros_like(x)
    grad_x = grad_x + grad_y @ weight if base else grad_x
    return grad_x, None, None, factor_A * (grad_y @ B).mT @ x, factor_B * grad_y.mT @ (x @ A.mT)


@misconception(
    "qlora_backward",
    "You return a gradient for the 4-bit weights. They are frozen, and codes are no numbers that "
    "a step could move: the entry is None. The gradient passes through them to x.",
    see=COMPUTE,
)
def gradients_flow_into_the_four_bit_weights(
    grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling
):
    right = _back(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling)
    return right[0], grad_y.mT @ x, None, right[3], right[4]


@misconception(
    "qlora_backward",
    "You return zeros for what is frozen. A gradient of zeros takes as much memory as any other, "
    "and an optimizer with weight decay would act on it: the entries are None.",
    see=COMPUTE,
)
def zeros_for_what_is_frozen(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling):
    right = _back(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling)
    zeros = torch.zeros(len(lora_B), x.shape[1], dtype=x.dtype)
    return right[0], zeros, torch.zeros_like(absmax), right[3], right[4]


@misconception(
    "qlora_backward",
    "You return a gradient for absmax. The scales are part of the frozen base: None.",
    see=COMPUTE,
)
def gradients_flow_into_the_scales(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling):
    right = _back(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling)
    unit = _dequantize(packed, torch.ones_like(absmax), levels).view(len(lora_B), -1)
    grad = ((grad_y.mT @ x) * unit).view(len(absmax), -1).sum(1)
    return right[0], None, grad, right[3], right[4]


@misconception(
    "qlora_backward",
    "Your grad_x has the low-rank path alone. A frozen weight has no gradient of its own, but the "
    "gradient passes through it, or no layer below would learn.",
    see=COMPUTE,
)
def nothing_passes_through_the_frozen_base(
    grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling
):
    return _back(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling, base=False)


@misconception(
    "qlora_backward",
    "Your grad_x has the frozen path alone. x feeds the adapter as well.",
    see=QLORA,
)
def nothing_passes_through_the_adapter(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling):
    return _back(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling, low_rank=False)


@misconception(
    "qlora_backward",
    "You multiply with the codes, as if a product could be computed in 4 bits. Codes are indices "
    "into `levels`: dequantise first.",
    see=COMPUTE,
)
def computes_in_four_bits(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling):
    codes = torch.stack([packed >> 4, packed & 15], -1).float()
    values = (codes.view(len(absmax), -1) * absmax[:, None]).flatten()
    return _back(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling, values=values)


@misconception(
    "qlora_backward",
    "You look the levels up and leave the absmax out: W is level * absmax of its block.",
    see=BLOCKS,
)
def forgets_the_absmax(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling):
    values = _dequantize(packed, torch.ones_like(absmax), levels)
    return _back(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling, values=values)


@misconception(
    "qlora_backward",
    "Your grad_x is not scaled on the low-rank path: scaling stands in y, so it stands in every "
    "gradient through the adapter.",
    see=QLORA,
)
def does_not_scale_the_gradient_of_x(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling):
    return _back(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling, in_x=1.0)


@misconception(
    "qlora_backward",
    "Your grad_A and grad_B are not scaled: scaling stands in y, so it stands in both.",
    see=QLORA,
)
def does_not_scale_the_adapter_gradients(
    grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling
):
    return _back(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling, in_A=1.0, in_B=1.0)


@misconception(
    "qlora_backward",
    "Your grad_B is scaled and grad_A is not. Both matrices stand behind the same factor in y.",
    see=QLORA,
)
def scales_only_one_of_the_two(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling):
    return _back(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling, in_A=1.0)


@alternative("qlora_backward")
def by_autograd(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling):
    weight = _dequantize(packed, absmax, levels).to(x.dtype).view(len(lora_B), -1)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, lora_A, lora_B)]
        y = leaves[0] @ weight.mT + (leaves[0] @ leaves[1].mT) @ leaves[2].mT * scaling
        grad_x, grad_A, grad_B = torch.autograd.grad(y, leaves, grad_y)
    return grad_x, None, None, grad_A, grad_B


@alternative("qlora_backward")
def with_einsum_and_the_merged_weight(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling):
    weight = _dequantize(packed, absmax, levels).to(x.dtype).view(len(lora_B), -1)
    grad_x = torch.einsum("sn,nd->sd", grad_y, weight + scaling * lora_B @ lora_A)
    grad_A = torch.einsum("sn,nr,sd->rd", grad_y, lora_B, x) * scaling
    grad_B = torch.einsum("sn,sd,rd->nr", grad_y, x, lora_A) * scaling
    return grad_x, None, None, grad_A, grad_B


# paged_states


def _paging(budget, events, *, touch="recent", reserve="needed", release="nothing", first=0,
            slack=0, leave=False):  # fmt: skip
    """Right, but for what a touch, a reservation and a release do."""
    resident, reserved, faults, evictions, pushed = [], 0, 0, 0, []
    for kind, number in events:
        if kind == "release":
            reserved -= number
            if release == "all back":
                while pushed and len(resident) + reserved < budget:
                    resident.append(pushed.pop())
                    faults += 1
        elif kind == "reserve":
            while resident and (
                reserve == "all" or len(resident) + reserved + number + slack > budget
            ):
                pushed.append(resident.pop(0))
                evictions += 1
            reserved += number
        elif number in resident:
            if touch == "recent":
                resident.remove(number)
                resident.append(number)
        else:
            while resident and len(resident) + reserved + 1 + slack > budget:
                pushed.append(resident.pop(first))
                evictions += 1
            faults += 1
            if number in pushed:
                pushed.remove(number)
            resident.append(number)
        if leave and kind == "touch":
            evictions += len(resident)
            resident = []
    return {"faults": faults, "evictions": evictions, "resident": resident}


@misconception(
    "paged_states",
    "Your result is the program's as it came. Follow it by hand: which pages are on the device "
    "after a reservation, and which page goes first?",
    see=PAGED,
    is_starter=True,
)
def neither_promise_is_kept_yet(budget, events):
    return _paging(budget, events, touch="ignored", reserve="all")


@misconception(
    "paged_states",
    "One fault is left: a reservation throws every page out. A paged optimizer is not an offload "
    "of all state: only as many pages go as are needed.",
    see=PAGED,
)
def a_reservation_takes_every_page(budget, events):
    return _paging(budget, events, reserve="all")


@misconception(
    "paged_states",
    "One fault is left: you evict the page that came first, not the one that was used least "
    "recently. Touching a resident page makes it the most recent.",
    see=PAGED,
)
def evicts_in_order_of_arrival(budget, events):
    return _paging(budget, events, touch="ignored")


@misconception(
    "paged_states",
    "You send every page back to the host as soon as it was used: an offload of all state, always. "
    "A paged optimizer leaves it on the device until room is needed.",
    see=PAGED,
)
def offloads_all_state_always(budget, events):
    return _paging(budget, events, leave=True)


@misconception(
    "paged_states",
    "You evict the page that was touched last. It is the least recent that goes.",
    see=PAGED,
)
def evicts_the_most_recent(budget, events):
    return _paging(budget, events, first=-1)


@misconception(
    "paged_states",
    "You bring pages back when activations are released. Nothing moves then: a page comes back "
    "when it is touched.",
    see=PAGED,
)
def brings_pages_back_on_release(budget, events):
    return _paging(budget, events, release="all back")


@misconception(
    "paged_states",
    "You evict while there is still room for one: a device of n pages holds n.",
    see=PAGED,
)
def keeps_one_page_free(budget, events):
    return _paging(budget, events, slack=1)


@misconception(
    "paged_states",
    "You leave first touches out of the faults. Every page starts on the host, so that its first "
    "touch copies it in as well.",
    see=PAGED,
)
def first_touches_are_no_faults(budget, events):
    answer = _paging(budget, events)
    return {
        **answer,
        "faults": answer["faults"] - len({p for kind, p in events if kind == "touch"}),
    }


@alternative("paged_states")
def with_the_time_of_last_use(budget, events):
    last_use, reserved, faults, evictions = {}, 0, 0, 0
    for now, (kind, number) in enumerate(events):
        if kind == "release":
            reserved -= number
        elif kind == "reserve":
            reserved += number
        elif number not in last_use:
            faults += 1
        incoming = kind == "touch" and number not in last_use
        while last_use and len(last_use) + incoming + reserved > budget:
            del last_use[min(last_use, key=last_use.get)]
            evictions += 1
        if kind == "touch":
            last_use[number] = now
    resident = sorted(last_use, key=last_use.get)
    return {"faults": faults, "evictions": evictions, "resident": resident}


@alternative("paged_states")
def with_reservations_as_a_smaller_device(budget, events):
    pages, room, faults, evictions = {}, budget, 0, 0
    for kind, number in events:
        if kind == "touch":
            if number in pages:
                del pages[number]
            else:
                faults += 1
            keep = room - 1
        else:
            room += number if kind == "release" else -number
            keep = room
        while len(pages) > keep:
            pages.pop(next(iter(pages)))
            evictions += 1
        if kind == "touch":
            pages[number] = None
    return {"faults": faults, "evictions": evictions, "resident": list(pages)}


# awq


def _awq(weight, x, bits, group_size, num_alphas, *, magnitude=None, scaled_x=None, loss=None,
         ratios=None, normal=True, stored_as=None):  # fmt: skip
    """Right, but for the salience, the input, the loss, the grid, and what is stored."""
    size = x.abs().mean(0) if magnitude is None else magnitude(weight, x)
    size = size.clamp(min=1e-4)
    target, best = x @ weight.mT, None
    if ratios is None:
        ratios = [i / num_alphas for i in range(num_alphas)]
    for ratio in ratios:
        scale = size**ratio
        scale = scale / (scale.max() * scale.min()).sqrt() if normal else scale
        stored = _round_groups(weight * scale, bits, group_size)
        given = x / scale if scaled_x is None else scaled_x(x, scale)
        error = (given @ stored.mT - target) if loss is None else loss(weight, stored, scale)
        error = error.square().mean().item()
        if best is None or error < best[0]:
            best = error, stored, scale
    stored = best[1] if stored_as is None else stored_as(weight, x, best[1], best[2])
    return stored, best[2]


@misconception(
    "awq",
    "You keep the weights of the salient channels unrounded. AWQ has no 16-bit part: every weight "
    "is stored in the same few bits, and the scale alone protects.",
    see=AWQ,
)
def keeps_salient_weights_in_16_bits(weight, x, bits, group_size, num_alphas):
    def mixed(weight, x, stored, scale):
        salient = x.abs().mean(0).argmax()
        stored = stored.clone()
        stored[:, salient] = (weight * scale)[:, salient]
        return stored

    return _awq(weight, x, bits, group_size, num_alphas, stored_as=mixed)


@misconception(
    "awq",
    "You multiply both sides by the scale, so that the layer computes something else, and the "
    "search finds that no scale is best. Weights are multiplied, inputs divided.",
    see=AWQ,
)
def multiplies_both_sides_by_the_scale(weight, x, bits, group_size, num_alphas):
    return _awq(weight, x, bits, group_size, num_alphas, scaled_x=lambda x, s: x * s)


@misconception(
    "awq",
    "Your scale grows with the weights of a channel. Salient are the weights that meet large "
    "activations: take the mean of |x|, the weights have no say.",
    see=AWQ,
)
def salience_by_weight(weight, x, bits, group_size, num_alphas):
    return _awq(weight, x, bits, group_size, num_alphas, magnitude=lambda w, x: w.abs().mean(0))


@misconception(
    "awq",
    "You minimise the error of the weights. What counts is the error of the layer's outputs on x: "
    "a wrong weight that meets small activations does no harm.",
    see=AWQ,
)
def minimises_the_error_of_the_weights(weight, x, bits, group_size, num_alphas):
    return _awq(weight, x, bits, group_size, num_alphas, loss=lambda w, stored, s: stored / s - w)


@misconception(
    "awq",
    "Your magnitude is the largest |x| of a channel. AWQ takes the mean: one odd token must not "
    "decide.",
    see=AWQ,
)
def takes_the_largest_activation(weight, x, bits, group_size, num_alphas):
    return _awq(weight, x, bits, group_size, num_alphas, magnitude=lambda w, x: x.abs().amax(0))


@misconception(
    "awq",
    "Your magnitude is |mean of x|: positive and negative activations cancel. Take the absolute "
    "values first.",
    see=AWQ,
)
def averages_before_the_absolute_value(weight, x, bits, group_size, num_alphas):
    return _awq(weight, x, bits, group_size, num_alphas, magnitude=lambda w, x: x.mean(0).abs())


@misconception(
    "awq",
    "Your scale is not divided by sqrt(max * min). The outputs are the same without, but the "
    "scales drift away from one, where 16 bits have little room.",
    see=AWQ,
)
def does_not_centre_the_scale(weight, x, bits, group_size, num_alphas):
    return _awq(weight, x, bits, group_size, num_alphas, normal=False)


@misconception(
    "awq",
    "You do not search: alpha is 0.5 whatever x says. Try each alpha of the grid on x.",
    see=AWQ,
)
def takes_the_root_without_a_search(weight, x, bits, group_size, num_alphas):
    return _awq(weight, x, bits, group_size, num_alphas, ratios=[0.5])


@misconception(
    "awq",
    "You return Q(W s) / s. What is stored is Q(W s), in few bits; the division belongs to the "
    "input, or to the norm before the layer.",
    see=AWQ,
)
def stores_the_weight_scaled_back(weight, x, bits, group_size, num_alphas):
    return _awq(
        weight, x, bits, group_size, num_alphas, stored_as=lambda w, x, stored, s: stored / s
    )


@misconception(
    "awq",
    "You round the weight as it is, and scale afterwards. The scale must come before rounding: "
    "it is what makes the rounding error of a salient channel smaller.",
    see=AWQ,
)
def scales_after_rounding(weight, x, bits, group_size, num_alphas):
    return _awq(
        weight,
        x,
        bits,
        group_size,
        num_alphas,
        stored_as=lambda w, x, stored, s: _round_groups(w, bits, group_size) * s,
    )


@alternative("awq")
def all_candidates_first(weight, x, bits, group_size, num_alphas):
    size = torch.clamp(x.abs().sum(0) / len(x), min=1e-4)
    scales = [size.pow(i / num_alphas) for i in range(num_alphas)]
    scales = [s / torch.sqrt(s.max() * s.min()) for s in scales]
    stored = [_round_groups(weight * s, bits, group_size) for s in scales]
    errors = [
        float((x @ (q / s - weight).mT).pow(2).mean()) for q, s in zip(stored, scales, strict=True)
    ]
    best = min(range(num_alphas), key=errors.__getitem__)
    return stored[best], scales[best]


@alternative("awq")
def by_the_gram_matrix(weight, x, bits, group_size, num_alphas):
    """The mean squared error of outputs is trace(E X^T X E^T): no product with x in the loop."""
    log_size, gram = x.abs().mean(0).clamp_min(1e-4).log(), x.mT @ x
    best = (math.inf, None, None)
    for i in range(num_alphas):
        log_scale = log_size * (i / num_alphas)
        scale = torch.exp(log_scale - (log_scale.max() + log_scale.min()) / 2)
        stored = _round_groups(weight * scale, bits, group_size)
        difference = stored / scale - weight
        error = float(((difference @ gram) * difference).sum())
        if error < best[0]:
            best = (error, stored, scale)
    return best[1:]


# tiled_linear


def _tiled(x, packed, absmax, levels, num_rows, tile_rows, *, whole=None, swap=False, aligned=False,
           to=None):  # fmt: skip
    """Right, but for what is unpacked at once, the order of the halves and the tile's blocks."""
    width = x.shape[1]
    block_size = num_rows * width // len(absmax)
    every = absmax.repeat_interleave(block_size) if whole == "scales" else None
    numbers = _dequantize(packed, absmax, levels) if whole == "weight" else None
    unpacked = torch.stack([packed >> 4, packed & 15], -1).flatten() if whole == "codes" else None
    tiles = []
    for top in range(0, num_rows, tile_rows):
        start, stop = top * width, min(top + tile_rows, num_rows) * width
        if numbers is not None:
            tile = numbers[start:stop]
        else:
            codes = packed[start // 2 : stop // 2]
            halves = [codes & 15, codes >> 4] if swap else [codes >> 4, codes & 15]
            codes = torch.stack(halves, -1).flatten()
            codes = unpacked[start:stop] if unpacked is not None else codes
            first = start // block_size
            scales = absmax[first : -(-stop // block_size)].repeat_interleave(block_size)
            skip = 0 if aligned else start - first * block_size
            scales = scales[skip:][: stop - start] if every is None else every[start:stop]
            tile = levels.float()[codes.int()] * scales
        dtype = x.dtype if to is None else to
        tiles.append(x.to(dtype) @ tile.view(-1, width).to(dtype).mT)
    return torch.cat(tiles, 1)


@misconception(
    "tiled_linear",
    "Your values are right, but the whole weight is dequantised before the loop: what 4 bits saved "
    "is spent again. Cut the bytes first, then unpack.",
    see=COMPUTE,
)
def dequantizes_the_whole_weight(x, packed, absmax, levels, num_rows, tile_rows):
    return _tiled(x, packed, absmax, levels, num_rows, tile_rows, whole="weight")


@misconception(
    "tiled_linear",
    "Your values are right and the levels are looked up tile by tile, but all codes are unpacked "
    "at once: a byte for each number of W.",
    see=BLOCKS,
)
def unpacks_all_codes_at_once(x, packed, absmax, levels, num_rows, tile_rows):
    return _tiled(x, packed, absmax, levels, num_rows, tile_rows, whole="codes")


@misconception(
    "tiled_linear",
    "Your values are right and the codes are unpacked tile by tile, but the scales are repeated "
    "for every number of W at once.",
    see=BLOCKS,
)
def repeats_all_scales_at_once(x, packed, absmax, levels, num_rows, tile_rows):
    return _tiled(x, packed, absmax, levels, num_rows, tile_rows, whole="scales")


@misconception(
    "tiled_linear",
    "Your halves of a byte are swapped: the first of two neighbours is in the high four bits.",
    see=BLOCKS,
)
def reads_the_low_half_first(x, packed, absmax, levels, num_rows, tile_rows):
    return _tiled(x, packed, absmax, levels, num_rows, tile_rows, swap=True)


@misconception(
    "tiled_linear",
    "You let every tile begin with a new block. Blocks know nothing of rows: where the tile begins "
    "inside a block, a part of that block's numbers belongs to the tile before.",
    see=BLOCKS,
)
def a_tile_begins_with_a_new_block(x, packed, absmax, levels, num_rows, tile_rows):
    return _tiled(x, packed, absmax, levels, num_rows, tile_rows, aligned=True)


@misconception(
    "tiled_linear",
    "Your output is float32 whatever x is. The product is computed in the dtype of x: dequantise "
    "to that.",
    see=COMPUTE,
)
def returns_float32(x, packed, absmax, levels, num_rows, tile_rows):
    return _tiled(x, packed, absmax, levels, num_rows, tile_rows, to=torch.float32)


@misconception(
    "tiled_linear",
    "You multiply with codes times absmax. Codes are indices into `levels`, not numbers.",
    see=COMPUTE,
)
def multiplies_with_codes(x, packed, absmax, levels, num_rows, tile_rows):
    return _tiled(x, packed, absmax, torch.arange(16.0), num_rows, tile_rows)


@alternative("tiled_linear")
def tiles_joined_at_the_end(x, packed, absmax, levels, num_rows, tile_rows):
    return _tiled(x, packed, absmax, levels, num_rows, tile_rows)


@alternative("tiled_linear")
def by_index_of_each_number(x, packed, absmax, levels, num_rows, tile_rows):
    width = x.shape[1]
    block_size = num_rows * width // len(absmax)
    out = torch.zeros(len(x), num_rows, dtype=x.dtype)
    for top in range(0, num_rows, tile_rows):
        rows = min(tile_rows, num_rows - top)
        index = torch.arange(top * width, (top + rows) * width, dtype=torch.int32)
        byte = packed[index // 2]
        codes = torch.where(index % 2 == 0, byte >> 4, byte & 15).int()
        tile = levels.float()[codes] * absmax[index // block_size]
        out[:, top : top + rows] = torch.einsum("sd,nd->sn", x, tile.view(rows, width).to(x.dtype))
    return out
