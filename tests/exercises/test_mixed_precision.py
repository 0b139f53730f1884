"""Grades chapter 10: mixed precision. Oracles: torch's casts, finfo, GradScaler, closed forms."""

import torch

from autograder import exercise, expect, points

FLOAT16, BFLOAT16 = (5, 10), (8, 7)


def _normal(rng, *shape, std=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=rng) * std).to(dtype)


def _spread(rng, count, low, high):
    """Signed float32 values whose base-2 logarithms are uniform in [low, high)."""
    exponent = torch.rand(count, generator=rng) * (high - low) + low
    sign = torch.randint(0, 2, (count,), generator=rng) * 2 - 1
    return sign * torch.exp2(exponent)


@exercise(
    "float_limits",
    kind="derive",
    minutes=10,
    difficulty=1,
    see="2. What a format can say",
    hints=(
        "Write down the largest exponent field that is still a number, and the largest mantissa. "
        "Then the smallest of each, with and without the leading 1.",
        "max twice too large: the top exponent field is not a number. min_subnormal twice off: "
        "subnormals share the exponent of the smallest normal values, 1 - bias, not 0 - bias.",
        "bias = 2^(e-1) - 1;  largest field = 2^e - 2, so exponent bias\n"
        "max = 2^bias * (2 - 2^-m)\n"
        "min_normal = 2^(1 - bias);  min_subnormal = that times 2^-m;  eps = 2^-m",
    ),
)
class TestFloatLimits:
    @points(2)
    def test_matches_finfo(self, student, rng):
        """equals torch.finfo for float16, bfloat16, float32 and float8 e5m2"""
        for (exponent, mantissa), dtype in (
            (FLOAT16, torch.float16),
            (BFLOAT16, torch.bfloat16),
            ((8, 23), torch.float32),
            ((5, 2), torch.float8_e5m2),
        ):
            info, got = torch.finfo(dtype), student.float_limits(exponent, mantissa)
            expected = {
                "max": info.max,
                "min_normal": info.smallest_normal,
                "min_subnormal": info.smallest_normal * info.eps,
                "eps": info.eps,
            }
            for name, value in expected.items():
                expect.true(name in got, f'"{name}" is missing in what float_limits returns')
                expect.number(got[name], value, what=f"{name} of {dtype}")

    def test_float64(self, student, rng):
        """equals torch.finfo for float64, whose largest value must not overflow on the way"""
        info, got = torch.finfo(torch.float64), student.float_limits(11, 52)
        expect.number(got["max"], info.max, what="max of float64")
        expect.number(got["min_normal"], info.tiny, what="min_normal of float64")


@exercise(
    "to_bfloat16",
    kind="build",
    minutes=15,
    difficulty=2,
    see="2. What a format can say",
    hints=(
        "Keep the upper 16 of 32 bits. Which number, added before the lower 16 are cut off, turns "
        "cutting into rounding to nearest? And which for a tie?",
        "Negative codes: int32 is signed, so `>> 16` drags the sign along; widen to int64 and mask "
        "with 0xFFFFFFFF first. Off by one in rare places: ties. inf for a NaN: the addition "
        "carried out of its mantissa.",
        "bits = x's bits as int64, masked to 32\n"
        "odd = bit 16 of bits\n"
        "code = (bits + 0x7FFF + odd) >> 16\n"
        "where x is NaN: upper 16 bits with a mantissa bit set",
    ),
)
class TestToBfloat16:
    @points(2)
    def test_matches_torch_casts(self, student, rng):
        """gives the codes of torch's own cast, for numbers of both signs and all sizes"""
        x = torch.cat([_normal(rng, 200), _spread(rng, 200, -140, 127)])
        expected = x.bfloat16().view(torch.int16).to(torch.int32) & 0xFFFF
        expect.equal(student.to_bfloat16(x), expected, "the codes")

    def test_ties(self, student, rng):
        """rounds a number half way between two codes to the even one"""
        upper = torch.randint(0x3F00, 0x4100, (64,), generator=rng)
        x = ((upper << 16) + 0x8000).to(torch.int32).view(torch.float32)
        expected = (upper + (upper & 1)).to(torch.int32)
        expect.equal(student.to_bfloat16(x), expected, "the codes of ties")

    def test_limits(self, student, rng):
        """keeps zero, minus zero and infinity, and carries into infinity"""
        largest = torch.finfo(torch.float32).max
        x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, largest, -largest])
        expected = torch.tensor([0, 0x8000, 0x7F80, 0xFF80, 0x7F80, 0xFF80], dtype=torch.int32)
        expect.equal(student.to_bfloat16(x), expected, "the codes of limits")

    def test_nan(self, student, rng):
        """keeps every NaN a NaN"""
        patterns = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32)
        codes = student.to_bfloat16(patterns.view(torch.float32)).long()
        expect.equal(list(codes.shape), [4], "the shape of the codes")
        is_nan = ((codes & 0x7F80) == 0x7F80) & ((codes & 0x7F) > 0) & (codes <= 0xFFFF)
        expect.true(
            bool(is_nan.all()),
            "a NaN became a number or infinity: its mantissa was rounded away. Treat NaN apart",
        )


@exercise(
    "lost_fraction",
    kind="estimate",
    minutes=10,
    difficulty=1,
    see="4. Where gradients lie",
    hints=(
        "Below which size does a number round to zero? It is not the smallest positive value.",
        "A share that is too large: were gradients that are exactly zero counted as lost, or those "
        "that merely become subnormal? Too small: a value between half and all of the smallest "
        "positive one is rounded up to it.",
        "smallest = 2^(1 - bias - m)\nsizes = nonzero |g| * scale\nshare of sizes <= smallest / 2",
    ),
)
class TestLostFraction:
    @points(2)
    def test_matches_casts_to_float16(self, student, rng):
        """equals what torch's cast to float16 loses, without a scale and with one"""
        gradients = _spread(rng, 4000, -40, -10)
        for scale in (1.0, 8.0, 1024.0):
            lost = ((gradients * scale).half() == 0).double().mean().item()
            got = student.lost_fraction(gradients, *FLOAT16, scale)
            expect.number(got, lost, rel=1e-9, what=f"the share at scale {scale:g}")

    def test_bfloat16_has_range(self, student, rng):
        """equals what torch's cast to bfloat16 loses: nothing of these, next to all of tiny ones"""
        gradients = _spread(rng, 500, -40, -10)
        expect.number(student.lost_fraction(gradients, *BFLOAT16), 0.0, what="share in bfloat16")
        tiny = torch.tensor([2.0**-133, 2.0**-134, 2.0**-135, -(2.0**-134) * 1.5])
        expect.number(student.lost_fraction(tiny, *BFLOAT16), 0.5, what="share of tiny values")

    def test_zeros_do_not_count(self, student, rng):
        """leaves gradients that were zero before out of the count"""
        gradients = torch.tensor([[0.0, 1e-9], [1e-3, 0.0]])
        expect.number(student.lost_fraction(gradients, *FLOAT16), 0.5, what="the share")
        expect.number(student.lost_fraction(torch.zeros(3), *FLOAT16), 0.0, what="share of zeros")


def _grad_scaler(overflows, init_scale, growth, backoff, interval):
    scaler = torch.amp.GradScaler(
        "cpu",
        init_scale=init_scale,
        growth_factor=growth,
        backoff_factor=backoff,
        growth_interval=interval,
    )
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler.scale(torch.zeros(()))
    scales = []
    for overflow in overflows:
        weight.grad = torch.full((1,), torch.inf if overflow else 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@exercise(
    "scale_trajectory",
    kind="build",
    minutes=10,
    difficulty=1,
    see="6. The scale finds its own size",
    hints=(
        "Two pieces of state: the scale, and a count. What sets the count back to zero?",
        "A scale that grows too often: the count must restart after a growth as well. One that "
        "grows too early after an overflow: the count must restart there.",
        "for each step:\n"
        "  overflow: scale *= backoff, count = 0\n"
        "  else: count += 1; if count == interval: scale *= growth, count = 0\n"
        "  append scale",
    ),
)
class TestScaleTrajectory:
    @points(2)
    def test_matches_grad_scaler(self, student, rng):
        """equals torch.amp.GradScaler on random overflows"""
        for interval in (1, 3):
            overflows = (torch.rand(25, generator=rng) < 0.2).tolist()
            expected = _grad_scaler(overflows, 1024.0, 2.0, 0.5, interval)
            got = student.scale_trajectory(overflows, 1024.0, 2.0, 0.5, interval)
            expect.close(torch.tensor(got), torch.tensor(expected), f"scales, interval {interval}")

    def test_counts_restart(self, student, rng):
        """starts counting anew after a growth and after an overflow"""
        overflows = [False, True, *[False] * 10]
        expected = _grad_scaler(overflows, 64.0, 2.0, 0.5, 4)
        got = student.scale_trajectory(overflows, 64.0, 2.0, 0.5, 4)
        expect.close(torch.tensor(got), torch.tensor(expected), "the scales")

    def test_other_factors(self, student, rng):
        """uses the factors that it is given, and two overflows in a row lower it twice"""
        overflows = [True, True, False, False, False]
        expected = _grad_scaler(overflows, 4096.0, 4.0, 0.25, 2)
        got = student.scale_trajectory(overflows, 4096.0, 4.0, 0.25, 2)
        expect.close(torch.tensor(got), torch.tensor(expected), "the scales")

    def test_no_steps(self, student, rng):
        """returns an empty list for no steps"""
        expect.equal(student.scale_trajectory([], 2.0), [], "the scales")


@exercise(
    "unscale_and_clip",
    kind="build",
    minutes=10,
    difficulty=2,
    see="7. Unscale, then clip",
    hints=(
        "max_norm is meant for the true gradients. Which of the two operations must come first?",
        "A norm of inf from finite gradients: squares of float16 values overflow, so widen first. "
        "Gradients of length max_norm that were shorter before: clipping only ever shrinks.",
        "wide = each gradient in float32, divided by scale\n"
        "overflowed = any value not finite\n"
        "norm = root of the sum of squares of all of them together\n"
        "if norm > max_norm: multiply all by max_norm / norm",
    ),
)
class TestUnscaleAndClip:
    def _grade(self, student, rng, scale, max_norm, std=1.0):
        gradients = [_normal(rng, 3, 4, std=std), _normal(rng, 6, std=std)]
        scaled = [(g * scale).half() for g in gradients]
        true = [g.double() / scale for g in scaled]
        norm = torch.cat([g.flatten() for g in true]).norm()
        factor = min(1.0, max_norm / norm.item())
        got, got_norm, overflowed = student.unscale_and_clip(scaled, scale, max_norm)
        expect.number(got_norm, norm.item(), rel=1e-5, what="the norm")
        expect.close(got, [(g * factor).float() for g in true], "the gradients")
        expect.true(overflowed is False, "overflowed: expected False for finite gradients")

    @points(2)
    def test_clips_true_gradients(self, student, rng):
        """clips what is left after the scale is taken off"""
        self._grade(student, rng, 1024.0, 0.5)
        self._grade(student, rng, 2.0**15, 0.5, std=1e-6)  # without the scale, float16 cannot say

    def test_leaves_short_gradients_alone(self, student, rng):
        """leaves gradients alone whose norm is within max_norm"""
        self._grade(student, rng, 256.0, 50.0)

    def test_squares_of_large_values(self, student, rng):
        """takes the norm in float32: a square of 300 overflows float16"""
        self._grade(student, rng, 8192.0, 1.0)

    def test_overflow(self, student, rng):
        """reports an inf or a NaN in any gradient"""
        for bad in (torch.inf, -torch.inf, torch.nan):
            gradients = [
                torch.ones(2).half(),
                torch.tensor([1.0, bad]).half(),
                torch.ones(1).half(),
            ]
            *_, overflowed = student.unscale_and_clip(gradients, 2.0, 1.0)
            expect.true(bool(overflowed), f"overflowed: expected True where a gradient holds {bad}")


def _float16_regression(weight, batches, rates, scale, max_norm):
    """The recipe with the gradient by hand: 2/N x^T (x w - y), rounded to float16 where it is."""
    master, rates, skipped = weight.clone(), iter(rates), 0
    for x, y in batches:
        error = (x.half() @ master.half()).float() - y
        upstream = (error * (2 / len(y)) * scale).half()
        gradient = x.half().T @ upstream
        if gradient.isfinite().all():
            true = gradient.float() / scale
            master -= next(rates) * true * min(1.0, max_norm / true.norm().item())
        else:
            skipped += 1
    return master, scale / 2**skipped if skipped else scale


@exercise(
    "train_in_float16",
    kind="repair",
    minutes=20,
    difficulty=2,
    see="7. Unscale, then clip",
    hints=(
        "Read the docstring's recipe line by line beside the program. One line stands where it "
        "should not.",
        "Updates far too small: to what length were the gradients clipped, in which units? Change "
        "`scale` to 1 and the program is right, which tells you where to look.",
        "gradient in float32, divided by scale\n"
        "then clip to max_norm\n"
        "then update with the next learning rate",
    ),
)
class TestTrainInFloat16:
    def _batches(self, rng, count, width=6, size=8):
        x = [_normal(rng, size, width) for _ in range(count)]
        return [(batch, batch @ torch.ones(width) + 0.1 * _normal(rng, size)) for batch in x]

    @points(2)
    def test_clips_in_the_right_units(self, student, rng):
        """clips unscaled gradients"""
        batches, weight = self._batches(rng, 4), _normal(rng, 6)
        rates = [0.5, 0.4, 0.3, 0.2]
        expected, _ = _float16_regression(weight, batches, rates, 128.0, 1.0)
        got, scale = student.train_in_float16(weight, batches, rates, 128.0, 1.0)
        expect.close(got, expected, "the weights", rtol=5e-3, atol=5e-3)
        expect.number(scale, 128.0, what="the scale")

    @points(2)
    def test_skips_overflowing_steps(self, student, rng):
        """skips a step whose gradient overflows, halves the scale, and saves the learning rate"""
        batches, weight = self._batches(rng, 3), _normal(rng, 6)
        weight[0] = 4.0  # far from the answer, 1, so that the gradient of this weight overflows
        x = batches[1][0]
        x[0, 0] = 150.0
        batches[1] = (x, x @ torch.ones(6))
        rates = [0.5, 0.05, 0.2]
        expected, halved = _float16_regression(weight, batches, rates, 64.0, 2.0)
        got, scale = student.train_in_float16(weight, batches, rates, 64.0, 2.0)
        expect.close(got, expected, "the weights", rtol=5e-3, atol=5e-3)
        expect.number(scale, halved, what="the scale")

    def test_small_updates_add_up(self, student, rng):
        """keeps updates that are too small for float16"""
        x = torch.ones(4, 2)
        weight, rates = torch.full((2,), 1.0), [1e-4] * 30
        batches = [(x, torch.full((4,), 1.0))] * 30
        expected, _ = _float16_regression(weight, batches, rates, 64.0, 100.0)
        got, _ = student.train_in_float16(weight, batches, rates, 64.0, 100.0)
        expect.close(got, expected, "the weights", rtol=1e-4, atol=1e-4)

    def test_takes_the_scale_off_in_float32(self, student, rng):
        """takes the scale off in float32, where tiny gradients survive it"""
        x = torch.full((4, 2), 2.0**-8)
        batches = [(x, torch.full((4,), 2.0**-19))]
        expected, _ = _float16_regression(torch.zeros(2), batches, [2.0**12], 2.0**14, 1e3)
        got, _ = student.train_in_float16(torch.zeros(2), batches, [2.0**12], 2.0**14, 1e3)
        expect.close(got, expected, "the weights", rtol=1e-2, atol=1e-6)


@exercise(
    "training_memory",
    kind="estimate",
    minutes=5,
    difficulty=1,
    see="8. What it costs and saves",
    hints=(
        "Adam keeps two numbers for each parameter. List what lies in memory while step() runs.",
        "12 or 8 bytes a parameter in mixed precision: the master weights or a moment is missing. "
        "Mixed precision does not make this sum smaller.",
        "float32: 4 + 4 + 2*4\nmixed: 2 + 2 + 4 + 2*4\nbfloat16: 2 + 2 + 2*2",
    ),
)
class TestTrainingMemory:
    @points(2)
    def test_matches_zero(self, student, rng):
        """gives the 120 GB of the ZeRO paper for 7.5 billion parameters in mixed precision"""
        got = student.training_memory(7_500_000_000, "mixed")
        expect.number(got, 120e9, rel=1e-9, what="bytes in mixed precision")

    def test_float32(self, student, rng):
        """equals the bytes of torch's own float32 parameters, gradients and Adam states"""
        weight = torch.nn.Parameter(torch.zeros(50))
        weight.grad = torch.ones(50)
        optimizer = torch.optim.Adam([weight])
        optimizer.step()
        moments = [s for s in optimizer.state[weight].values() if s.shape == weight.shape]
        tensors = [weight.detach(), weight.grad, *moments]
        total = sum(t.nbytes for t in tensors)
        expect.number(student.training_memory(50, "float32"), total, what="bytes in float32")

    def test_bfloat16(self, student, rng):
        """equals the bytes of torch's own tensors with everything in bfloat16"""
        weight = torch.nn.Parameter(torch.zeros(30, dtype=torch.bfloat16))
        weight.grad = torch.ones_like(weight)
        optimizer = torch.optim.Adam([weight])
        optimizer.step()
        moments = [s for s in optimizer.state[weight].values() if s.shape == weight.shape]
        total = sum(t.nbytes for t in [weight.detach(), weight.grad, *moments])
        expect.number(student.training_memory(30, "bfloat16"), total, what="bytes in bfloat16")


@exercise(
    "stochastic_round",
    kind="build",
    minutes=15,
    difficulty=2,
    see="9. Rounding by lot",
    hints=(
        "Measure x in units of the spacing at its size: x = 17.3 steps. The lower neighbour is 17, "
        "and the upper one is taken in 3 of 10 cases.",
        "All results too large or small by the same tendency: compare noise with the fraction "
        "instead of rounding x + noise. Wrong only for large or small x: the spacing doubles with "
        "each power of two (torch.frexp gives the exponent).",
        "mantissa, e = frexp(x)      # 0.5 <= |mantissa| < 1\n"
        "step = 2^(e - 8)            # 7 mantissa bits below a leading one\n"
        "n = |x| / step;  low = floor(n)\n"
        "result = sign(x) * (low + (noise < n - low)) * step",
    ),
)
class TestStochasticRound:
    @points(2)
    def test_takes_the_right_neighbour(self, student, rng):
        """takes the upper neighbour where noise is below the fraction, for all sizes and signs"""
        low = _spread(rng, 300, -20, 20).bfloat16()
        codes = low.view(torch.int16)
        high = (codes + 1).view(torch.bfloat16).float()
        low = low.float()
        part = torch.randint(1, 16, low.shape, generator=rng) / 16
        noise = (torch.randint(0, 16, low.shape, generator=rng) + 0.5) / 16
        x = low + part * (high - low)
        expected = torch.where(noise < part, high, low)
        expect.equal(student.stochastic_round(x, noise), expected, "the rounded values")

    def test_unbiased(self, student, rng):
        """is right on average"""
        noise = (torch.arange(1024) + 0.5) / 1024
        x = torch.full((1024,), 1.0 + 0.3 * 2.0**-7)
        got = student.stochastic_round(x, noise)
        expect.equal(got.bfloat16().float(), got, "the results, rounded to bfloat16 once more")
        mean = got.double().mean().item()
        expect.number(mean, x[0].item(), rel=1e-5, what="the mean of the results")

    def test_keeps_values_of_bfloat16(self, student, rng):
        """leaves values alone that bfloat16 has"""
        x = _normal(rng, 50, std=100.0).bfloat16().float()
        noise = torch.rand(50, generator=rng)
        noise[:5] = 0.0
        expect.equal(student.stochastic_round(x, noise), x, "the rounded values")


@exercise(
    "fp8_linear",
    kind="challenge",
    minutes=20,
    difficulty=3,
    see="10. Eight bits",
    hints=(
        "A product of scaled factors is scaled by both of their factors. Row t of x and row f of "
        "weight meet in entry (t, f) only.",
        "nan: a row of zeros was divided by its largest magnitude. Saturated values (too small): "
        "the factor was applied the wrong way round, or the largest magnitude was taken without "
        "abs.",
        "largest = max |row|;  factor = 448 / largest (1 for a row of zeros)\n"
        "codes = (row * factor) to float8_e4m3fn, back to float32\n"
        "result = x_codes @ w_codes^T / x_factor (T, 1) / w_factor (1, F)",
    ),
)
class TestFp8Linear:
    def _expected(self, x, weight):
        """The same in float64, with NumPy-like loops over rows."""
        out = torch.zeros(len(x), len(weight), dtype=torch.float64)
        for t, row in enumerate(x):
            for f, w in enumerate(weight):
                a, b = (
                    448 / r.abs().max() if r.abs().max() > 0 else torch.ones(()) for r in (row, w)
                )
                codes = [(r * s).to(torch.float8_e4m3fn).double() for r, s in ((row, a), (w, b))]
                out[t, f] = (codes[0] @ codes[1]) / a.double() / b.double()
        return out.float()

    def _grade(self, student, x, weight, what):
        expected = self._expected(x, weight)
        size = expected.abs().max().item() or 1.0
        expect.close(student.fp8_linear(x, weight), expected, what, rtol=1e-4, atol=1e-4 * size)

    @points(2)
    def test_matches_a_loop_in_float64(self, student, rng):
        """equals the definition, row by row, in float64"""
        self._grade(student, _normal(rng, 5, 12), _normal(rng, 4, 12, std=0.05), "the product")

    @points(2)
    def test_rows_of_different_size(self, student, rng):
        """gives each row a factor of its own: small rows beside large ones keep their digits"""
        sizes = torch.tensor([1e-3, 1.0, 30.0]).view(3, 1)
        x, weight = _normal(rng, 3, 12) * sizes, _normal(rng, 3, 12) * sizes.flip(0)
        got, expected = student.fp8_linear(x, weight), self._expected(x, weight)
        relative = expected.abs().amax(1, keepdim=True)
        expect.close(
            got / relative, expected / relative, "rows of the product", rtol=1e-4, atol=1e-5
        )

    def test_negative_extremes(self, student, rng):
        """finds the largest magnitude among negative values too"""
        x = -_normal(rng, 2, 8).abs()
        x[:, 0] = 0.1
        self._grade(student, x, _normal(rng, 3, 8), "the product")

    def test_zero_rows(self, student, rng):
        """gives zeros for a row of zeros"""
        x, weight = _normal(rng, 3, 8), _normal(rng, 2, 8)
        x[1], weight[0] = 0.0, 0.0
        self._grade(student, x, weight, "the product with rows of zeros")
