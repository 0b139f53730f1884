"""Grades chapter 09: quantisation."""

import math
import random
from collections import OrderedDict
from statistics import NormalDist

import torch

from autograder import exercise, expect, points
from autograder.spies import largest_new_tensor


def randn(*shape, rng, mean=0.0, std=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=rng, dtype=torch.float64) * std + mean).to(dtype)


def _integer(rng, low, high):
    return int(torch.randint(low, high + 1, (), generator=rng))


def _levels(rng):
    """Sixteen uneven levels from -1 to 1, ascending, with a zero; float32."""
    inner = torch.rand(13, generator=rng) * 1.8 - 0.9
    return torch.cat([torch.tensor([-1.0, 0.0, 1.0]), inner]).sort().values


def _storage(rng, count, block_size):
    """Random packed codes and scales of `count` numbers, and the numbers, float32 in float64."""
    levels = _levels(rng)
    codes = torch.randint(16, (count,), generator=rng)
    absmax = torch.rand(count // block_size, generator=rng) + 0.5
    values = levels[codes].view(-1, block_size) * absmax[:, None]
    packed = (codes[::2] * 16 + codes[1::2]).to(torch.uint8)
    return packed, absmax, levels, values.flatten().double()


@exercise(
    "quantize_groups",
    kind="build",
    minutes=12,
    difficulty=1,
    see="3. Who shares a scale",
    hints=(
        "Write the formula for one group first: its low and high ends, the step between codes, the "
        "code of zero. Then give the groups a dimension of their own, so that the same lines do "
        "all of them.",
        "Values off in groups of one sign only: zero must lie between low and high. A code far "
        "off: clamp before the cast to uint8. All codes off by one here and "
        "there: round x / scale and the zero point separately, then add.",
        "groups = weight.float().unflatten(1, (-1, group_size)); low = min over the group, at most "
        "0; high = max, at least 0; scale = (high - low) / (2^bits - 1), 1 where that is 0; "
        "zero = round(-low / scale); codes = clamp(round(groups / scale) + zero, 0, 2^bits - 1)",
    ),
)
class TestQuantizeGroups:
    def _check(self, student, weight, bits, group_size, what="the result"):
        codes, scale, zero = student.quantize_groups(weight, bits, group_size)
        top, rows = 2**bits - 1, weight.shape[0]
        groups = weight.float().reshape(-1, group_size)
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        step = (high - low) / top
        step = torch.where(step == 0, torch.ones(()), step)
        zeros = (-low / step).round()
        ends = groups, step, zeros.int(), 0, 0, top
        values = torch.fake_quantize_per_channel_affine(*ends).view(rows, -1)
        expect.close(scale, step.view(rows, -1), f"scale of {what}")
        expect.equal(zero, zeros.view(rows, -1).to(torch.uint8), f"zero_point of {what}")
        expect.true(
            codes.dtype == torch.uint8 and codes.shape == weight.shape,
            f"codes of {what}: expected uint8 of shape {tuple(weight.shape)}, got {codes.dtype} "
            f"of shape {tuple(codes.shape)}.",
        )
        shared = (t.float().repeat_interleave(group_size, 1) for t in (scale, zero))
        spread, offset = shared
        got = spread * (codes.float() - offset)
        expect.close(got, values, f"scale * (codes - zero_point) of {what}", atol=1e-5)

    @points(2)
    def test_matches_torch(self, student, rng):
        """equals torch's fake quantisation in groups, for 3, 4 and 8 bits"""
        for bits in (3, 4, 8):
            weight = randn(3, 24, rng=rng) * torch.tensor([1.0, 5.0, 0.2]).repeat_interleave(8)
            self._check(student, weight, bits, 8, f"{bits} bits")

    @points(1)
    def test_one_sign(self, student, rng):
        """keeps zero exact where a group has one sign"""
        weight = randn(2, 8, rng=rng).abs() + 0.5
        self._check(student, torch.cat([weight, -weight], 1), 4, 8, "groups of one sign")

    @points(1)
    def test_zeros(self, student, rng):
        """takes a group of zeros"""
        weight = torch.stack([randn(8, rng=rng), torch.zeros(8)])
        self._check(student, weight, 4, 8, "a matrix with a row of zeros")

    @points(1)
    def test_half_precision(self, student, rng):
        """computes in float32 for float16 weights"""
        self._check(student, randn(2, 16, rng=rng, dtype=torch.float16), 8, 16, "float16")


@exercise(
    "normal_float",
    kind="derive",
    minutes=12,
    difficulty=2,
    see="5. Sixteen levels",
    hints=(
        "How many levels lie below zero, and how many above, if zero is one of them and their "
        "number is even?",
        "One level too many or zero twice: 0.5 is the probability whose quantile is 0; leave it "
        "out on both sides and put one 0 between. All values too large: divide by the largest at "
        "the end.",
        "positive = ndtri(linspace(0.5, offset, 2^(bits-1) + 1))[1:]; negative = "
        "ndtri(linspace(1 - offset, 0.5, 2^(bits-1)))[:-1]; levels = negative, 0, positive; "
        "divide by the last",
    ),
)
class TestNormalFloat:
    def _oracle(self, bits, offset):
        half, quantile = 2 ** (bits - 1), NormalDist().inv_cdf
        below = [1 - offset + i * (offset - 0.5) / (half - 1) for i in range(half - 1)]
        above = [0.5 + i * (offset - 0.5) / half for i in range(1, half + 1)]
        values = [*map(quantile, below), 0.0, *map(quantile, above)]
        return torch.tensor(values, dtype=torch.float64) / quantile(offset)

    @points(2)
    def test_four_bits(self, student, rng):
        """gives the sixteen levels of NF4"""
        expect.close(student.normal_float(4, 0.9677083), self._oracle(4, 0.9677083), "NF4")

    @points(2)
    def test_other_bits_and_offsets(self, student, rng):
        """takes other numbers of bits and other offsets"""
        for bits in (2, 3, 6):
            offset = 0.9 + 0.09 * float(torch.rand((), generator=rng))
            what = f"{bits} bits, offset {offset:.4f}"
            expect.close(student.normal_float(bits, offset), self._oracle(bits, offset), what)


@exercise(
    "quantize_blocks",
    kind="build",
    minutes=15,
    difficulty=2,
    see="6. Blocks and packed bytes",
    hints=(
        "The nearest of sorted levels changes at the points halfway between neighbours. How many "
        "of those lie below a number?",
        "Values fine, bytes wrong: the first of two neighbours goes into the high half, times 16. "
        "nan or a wrong code in a block of zeros: do not divide by an absmax of 0. Half precision "
        "off by one level: convert to float32 before dividing.",
        "blocks = x.float().reshape(-1, block_size); absmax = blocks.abs().amax(1); scaled = "
        "blocks / absmax (1 where 0); codes = torch.bucketize(scaled, midpoints of levels); "
        "packed = codes[::2] * 16 + codes[1::2]",
    ),
)
class TestQuantizeBlocks:
    def _check(self, student, x, levels, block_size, what="the result"):
        packed, absmax = student.quantize_blocks(x, levels, block_size)
        blocks = x.double().reshape(-1, block_size)
        largest = blocks.abs().amax(1)
        scaled = blocks / largest.clamp(min=1e-30)[:, None]
        codes = (scaled[..., None] - levels.double()).abs().argmin(-1).flatten()
        expect.close(absmax, largest.float(), f"absmax of {what}", rtol=1e-6, atol=0)
        expected = (codes[::2] * 16 + codes[1::2]).to(torch.uint8)
        expect.equal(packed, expected, f"packed of {what}")

    @points(3)
    def test_matches_exhaustive_search(self, student, rng):
        """stores the nearest level, two codes a byte"""
        x = randn(3, 32, rng=rng) * torch.tensor([[1.0], [4.0], [0.1]])
        x[:, ::16] = -5 * x[:, ::16].abs()  # the largest is often a negative number
        self._check(student, x, _levels(rng), 16)
        self._check(student, x, _levels(rng), 8, "blocks of 8")

    @points(1)
    def test_blocks_know_no_rows(self, student, rng):
        """reads the numbers in order of memory, across rows"""
        self._check(student, randn(4, 6, rng=rng), _levels(rng), 8, "a 4 x 6 tensor")
        flat = randn(16, rng=rng)
        self._check(student, flat, _levels(rng), 8, "a row of 16 numbers")

    @points(1)
    def test_zeros_and_half_precision(self, student, rng):
        """takes a block of zeros, and computes in float32"""
        x = torch.cat([torch.zeros(8), randn(8, rng=rng)])
        self._check(student, x, _levels(rng), 8, "a block of zeros")
        for dtype in (torch.float16, torch.bfloat16):
            x = randn(2048, rng=rng, dtype=dtype)
            self._check(student, x, _levels(rng), 32, str(dtype))

    @points(1)
    def test_memory(self, student, rng):
        """builds no tensor of 16 values for each number"""
        x, levels = randn(4096, rng=rng), _levels(rng)
        with largest_new_tensor() as spy:
            _, absmax = student.quantize_blocks(x, levels, 64)
        expect.close(absmax, x.view(-1, 64).abs().amax(1), "absmax of 4,096 numbers")
        expect.true(
            spy.bytes <= 4096 * 8,
            f"For 4,096 numbers the largest tensor that you make has shape {spy.shape}: "
            f"{spy.bytes // 4096} bytes for each number. Compare with the points halfway between "
            "levels instead of taking all distances.",
        )


@exercise(
    "qlora_bytes",
    kind="estimate",
    minutes=12,
    difficulty=2,
    see="14. Published figures",
    hints=(
        "Count three things for one matrix: its numbers, its blocks, its outer blocks. What is "
        "trained is counted apart: nothing of the base has a gradient.",
        "scales off by a few bytes: round the outer blocks up, and count one mean of 4 bytes a "
        "matrix. scales eight times too large: 8 bits are one byte.",
        "blocks = N * D / block_size; codes = N * D / 2; scales = blocks + 4 * ceil(blocks / "
        "outer) + 4, or 4 * blocks; trained = rank * (N + D); 2, 2 and 8 bytes of each",
    ),
)
class TestQloraBytes:
    def _oracle(self, matrices, rank, block_size, outer):
        total = dict.fromkeys(("codes", "scales", "adapters", "gradients", "optimizer"), 0)
        for n, d, count in matrices:
            blocks = n * d // block_size
            once = 4 * blocks if outer is None else blocks + 4 * math.ceil(blocks / outer) + 4
            p = rank * (n + d)
            each = (n * d // 2, once, 2 * p, 2 * p, 8 * p)
            for name, number in zip(total, each, strict=True):
                total[name] += count * number
        return total

    def _check(self, student, matrices, rank, block_size=64, outer=256):
        got = student.qlora_bytes(matrices, rank, block_size, outer)
        expect.close(got, self._oracle(matrices, rank, block_size, outer), "the bytes")

    @points(2)
    def test_llama(self, student, rng):
        """counts Llama 7B's linear layers"""
        dim, hidden, layers = 4096, 11008, 32
        matrices = [(dim, dim, 4 * layers), (hidden, dim, 2 * layers), (dim, hidden, layers)]
        self._check(student, matrices, 64)
        got = student.qlora_bytes(matrices, 16)
        expect.close(got, self._oracle(matrices, 16, 64, 256), "the bytes with default blocks")

    @points(1)
    def test_without_double_quantization(self, student, rng):
        """counts float32 scales without double quantisation"""
        self._check(student, [(64, 64 * _integer(rng, 2, 9), 3)], 4, 64, None)

    @points(1)
    def test_short_outer_blocks(self, student, rng):
        """rounds the outer blocks of each matrix up"""
        sizes = [(32 * _integer(rng, 3, 9), 32, 2), (32, 96, _integer(rng, 2, 5))]
        self._check(student, sizes, 8, 32, 100)


@exercise(
    "qlora_backward",
    kind="derive",
    minutes=15,
    difficulty=2,
    see="8. Nothing computes in four bits",
    hints=(
        "Two paths lead from x to y, so two lead back. Which inputs are numbers that training may "
        "change?",
        "grad_x small: the frozen path is missing; frozen weights have no gradient of their own, "
        "what passes through them does. grad_A or grad_B off by a factor: scaling belongs to all "
        "three.",
        "weight = dequantised, reshaped to (N, D); narrow = scaling * grad_y B; grad_x = grad_y W "
        "+ narrow A; grad_A = narrow^T x; grad_B = scaling * grad_y^T (x A^T); None twice",
    ),
)
class TestQloraBackward:
    def _check(self, student, rng, scaling, dtype=torch.float32):
        tokens, rows, columns, rank = 5, 6, 8, 2
        packed, absmax, levels, values = _storage(rng, rows * columns, 8)
        x, grad_y = (randn(tokens, n, rng=rng, dtype=dtype) for n in (columns, rows))
        A, B = randn(rank, columns, rng=rng, dtype=dtype), randn(rows, rank, rng=rng, dtype=dtype)
        leaves = [t.double().requires_grad_() for t in (x, A, B)]
        weight = values.view(rows, columns)
        y = leaves[0] @ weight.mT + scaling * leaves[0] @ leaves[1].mT @ leaves[2].mT
        grads = [g.to(dtype) for g in torch.autograd.grad(y, leaves, grad_y.double())]
        got = student.qlora_backward(grad_y, x, packed, absmax, levels, A, B, scaling)
        expected = (grads[0], None, None, grads[1], grads[2])
        expect.true(
            type(got) is tuple and len(got) == 5,
            "Expected a tuple of five: grad_x, grad_packed, grad_absmax, grad_A, grad_B.",
        )
        names = ("grad_x", "grad_packed", "grad_absmax", "grad_A", "grad_B")
        for name, ours, right in zip(names, got, expected, strict=True):
            if right is None:
                expect.true(ours is None, f"{name}: expected None, got a {type(ours).__name__}.")
            else:
                expect.close(ours, right, name)

    @points(2)
    def test_matches_autograd(self, student, rng):
        """equals autograd through the dequantised weight"""
        self._check(student, rng, 1.0)

    @points(2)
    def test_scaling(self, student, rng):
        """scales the low-rank path, and that alone"""
        self._check(student, rng, 0.25)
        self._check(student, rng, 4.0)

    @points(1)
    def test_float64(self, student, rng):
        """keeps the dtype of x"""
        self._check(student, rng, 2.0, torch.float64)


@exercise(
    "paged_states",
    kind="repair",
    minutes=10,
    difficulty=2,
    see="10. Paged optimizers",
    hints=(
        "Two of the promises are broken. Read them one by one, with a budget of 3: which pages are "
        "on the device after ('touch', 0), ('touch', 1), ('touch', 2), ('touch', 0), "
        "('reserve', 1)?",
        "Too many faults after a reservation: it takes every page. Right number of evictions, "
        "wrong pages: touching a page that is already there must count as use.",
        "reserve: while len(resident) + reserved + n > budget: evict the first. touch of a "
        "resident page: move it to the end of the list.",
    ),
)
class TestPagedStates:
    def _oracle(self, budget, events):
        cache, held, moved = OrderedDict(), 0, [0, 0]
        for kind, number in events:
            size = 0 if kind == "release" or number in cache and kind == "touch" else 1
            size = number if kind == "reserve" else size
            for _ in range(max(0, len(cache) + held + size - budget)):
                cache.popitem(last=False)
                moved[1] += 1
            if kind == "touch":
                moved[0] += size
                cache[number] = True
                cache.move_to_end(number)
            else:
                held += number if kind == "reserve" else -number
        return {"faults": moved[0], "evictions": moved[1], "resident": list(cache)}

    def _check(self, student, budget, events, what):
        expected = self._oracle(budget, events)
        expect.close(student.paged_states(budget, list(events)), expected, what)

    @points(1)
    def test_everything_fits(self, student, rng):
        """moves nothing twice where everything fits"""
        count = _integer(rng, 3, 6)
        self._check(student, count, [("touch", p) for p in [*range(count)] * 3], "a roomy device")

    @points(2)
    def test_thrashing(self, student, rng):
        """evicts the least recently touched"""
        draw = random.Random(_integer(rng, 0, 10**6))
        events = [("touch", p) for p in (0, 1, 2, 0, 3, 0, 1)]
        events += [("touch", draw.randrange(6)) for _ in range(30)]
        self._check(student, 3, events, "a device of 3 pages")

    @points(2)
    def test_peaks(self, student, rng):
        """gives activations what they need and no more"""
        draw = random.Random(_integer(rng, 0, 10**6))
        events = [("touch", p) for p in range(6)]
        for _ in range(4):
            n = draw.randint(1, 4)
            events += [("touch", draw.randrange(6)), ("reserve", n)]
            events += [("touch", draw.randrange(6)), ("release", n), ("touch", draw.randrange(6))]
        self._check(student, 7, events, "peaks of activations")
        self._check(student, 6, [*events, ("reserve", 6)], "a peak of the whole device")


@exercise(
    "awq",
    kind="build",
    minutes=20,
    difficulty=3,
    see="11. Which weights matter",
    hints=(
        "For one alpha: what is the scale, what is stored, and what does the layer compute? Then "
        "a loop that keeps the best.",
        "alpha 0 wins always: you scale the input in the wrong direction, or measure the error of "
        "the weights and not of the outputs. scale off by a factor: divide by sqrt(max * min).",
        "m = x.abs().mean(0), at least 1e-4; for i in range(n): s = m ** (i / n), s / sqrt(s.max() "
        "* s.min()); q = round_groups(weight * s); error of (x / s) q^T; keep the first smallest",
    ),
)
class TestAwq:
    def _draw(self, rng, rows=6, columns=16, tokens=24, power=-0.5):
        """Weights that shrink (power < 0) or grow with their channel's activations."""
        dtype = torch.float64
        size = torch.exp(randn(columns, rng=rng, dtype=dtype))
        size[3], size[7] = 12.0, 5.0
        weight = randn(rows, columns, rng=rng, dtype=dtype) * size**power
        x = randn(tokens, columns, rng=rng, dtype=dtype) * size
        x[:, 7] += 6.0 * torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0).to(dtype)
        return weight, x

    def _oracle(self, weight, x, bits, group_size, num_alphas):
        top, tries = 2 ** (bits - 1) - 1, []
        for i in range(num_alphas):
            powers = x.abs().mean(0).clamp(min=1e-4).pow(i / num_alphas)
            scale = powers / torch.sqrt(powers.max() * powers.min())
            groups = (weight * scale).reshape(-1, group_size)
            step = groups.abs().amax(1, keepdim=True) / top
            step = torch.where(step == 0, torch.ones_like(step), step)
            stored = (torch.round(groups / step) * step).view_as(weight)
            error = ((x / scale) @ stored.mT - x @ weight.mT).square().mean()
            tries.append((float(error), i, stored, scale))
        return min(tries, key=lambda t: t[:2])

    def _check(self, student, weight, x, bits, group_size, num_alphas):
        got = student.awq(weight, x, bits, group_size, num_alphas)
        _, _, stored, scale = self._oracle(weight, x, bits, group_size, num_alphas)
        expect.true(type(got) is tuple and len(got) == 2, "Expected a tuple of two: stored, scale.")
        expect.close(got[1], scale, "scale")
        expect.close(got[0], stored, "stored")

    @points(3)
    def test_matches_brute_force(self, student, rng):
        """finds the scale that a search over the grid finds"""
        for bits, power in ((3, -0.5), (4, 0.5)):
            weight, x = self._draw(rng, power=power)
            self._check(student, weight, x, bits, 8, 6)

    @points(1)
    def test_spikes(self, student, rng):
        """finds it where a salient channel has large weights, but never the largest"""
        weight, x = self._draw(rng, rows=12, power=0.0)
        weight *= 0.15
        columns = torch.randint(4, 16, (12, 1), generator=rng)
        weight.scatter_(1, columns, 1.0)
        weight[:, 3] = 0.4 + 0.2 * torch.rand(12, generator=rng, dtype=torch.float64)
        self._check(student, weight, x, 3, 16, 6)

    @points(1)
    def test_one_alpha_is_plain_rounding(self, student, rng):
        """leaves the weights unscaled where 0 is the only alpha"""
        self._check(student, *self._draw(rng), 4, 8, 1)

    @points(1)
    def test_every_weight_is_rounded(self, student, rng):
        """stores few values a group, in salient channels too"""
        weight, x = self._draw(rng, rows=2, columns=64)
        stored, _ = student.awq(weight, x, 3, 64, 5)
        for row in range(2):
            count = len(stored[row].unique())
            expect.true(
                count <= 7,
                f"3 bits tell 7 levels around zero apart; a row of `stored`, one group, has "
                f"{count} values.",
            )

    @points(1)
    def test_silent_channel(self, student, rng):
        """stays finite where a channel is never active"""
        weight, x = self._draw(rng)
        x[:, 5] = 0
        self._check(student, weight, x, 4, 8, 4)


@exercise(
    "tiled_linear",
    kind="challenge",
    minutes=25,
    difficulty=3,
    see="8. Nothing computes in four bits",
    hints=(
        "A tile's numbers are a stretch of the flat weight. Which bytes hold it, and which blocks "
        "does it touch?",
        "Right for a block size that divides D and wrong otherwise: the tile begins inside a "
        "block. Memory: unpack after you cut the bytes, and repeat only the tile's scales.",
        "for each tile: start, stop = top * D, bottom * D; codes from packed[start // 2 : stop // "
        "2]; blocks first = start // block, last = ceil(stop / block); repeat absmax[first:last], "
        "drop the start - first * block numbers before the tile; out[:, tile] = x tile^T",
    ),
)
class TestTiledLinear:
    def _check(self, student, rng, tokens, rows, columns, block_size, tile, dtype=torch.float32):
        packed, absmax, levels, values = _storage(rng, rows * columns, block_size)
        x = randn(tokens, columns, rng=rng, dtype=dtype)
        expected = (x.double() @ values.view(rows, columns).mT).to(dtype)
        got = student.tiled_linear(x, packed, absmax, levels, rows, tile)
        expect.close(got, expected, f"the output for {rows} rows in tiles of {tile}")

    @points(2)
    def test_matches_the_whole_product(self, student, rng):
        """equals the product with the whole weight"""
        self._check(student, rng, 3, 8, 16, 16, 4)
        self._check(student, rng, 3, 8, 16, 8, 1)

    @points(2)
    def test_blocks_across_rows(self, student, rng):
        """finds its blocks where rows begin inside them"""
        self._check(student, rng, 2, 8, 12, 16, 3)
        self._check(student, rng, 1, 4, 8, 32, 1)

    @points(1)
    def test_short_last_tile_and_dtype(self, student, rng):
        """takes a short last tile, and keeps the dtype of x"""
        self._check(student, rng, 2, 10, 8, 8, 4)
        self._check(student, rng, 2, 6, 8, 8, 4, torch.float64)

    @points(2)
    def test_memory(self, student, rng):
        """unpacks no more than a tile at a time"""
        rows, columns, block_size, tile = 64, 48, 16, 4
        packed, absmax, levels, values = _storage(rng, rows * columns, block_size)
        x = randn(3, columns, rng=rng)
        with largest_new_tensor() as spy:
            got = student.tiled_linear(x, packed, absmax, levels, rows, tile)
        expected = (x.double() @ values.view(rows, columns).mT).float()
        expect.close(got, expected, f"the output for {rows} rows")
        allowed = 8 * (tile * columns + 2 * block_size)
        expect.true(
            spy.bytes <= allowed,
            f"With tiles of {tile} x {columns} your largest tensor has {spy.bytes} bytes, shape "
            f"{spy.shape}; {allowed} are allowed. Something is unpacked for all {rows} rows.",
        )
