"""Grades chapter 03: positions. Oracles: the formulas in Python's math, complex numbers, autograd,
torch's attention."""

import cmath
import math

import torch
import torch.nn.functional as F

from autograder import exercise, expect, points


def _normal(rng, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=rng).to(dtype)


def _turned(x, positions, base):
    """RoPE on neighbouring pairs by complex numbers, in float64."""
    theta = base ** (-torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1])
    angles = positions.double()[..., None] * theta
    if positions.ndim == 2:
        angles = angles[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


@exercise(
    "sinusoidal_encoding",
    kind="build",
    minutes=10,
    difficulty=1,
    see="2. Sinusoids",
    hints=(
        "A table of angles first: positions down, frequencies across. How many frequencies are "
        "there for dim features?",
        "The right numbers in wrong columns: sine and cosine of one frequency stand side by side. "
        "Frequencies too high: the exponent is 2i/dim, with i counting pairs.",
        "i = 0, 1, ..., dim/2 - 1\n"
        "angle[m, i] = m / base^(2i/dim)\n"
        "row m: sin angle[m,0], cos angle[m,0], sin angle[m,1], ...",
    ),
)
class TestSinusoidalEncoding:
    def _expected(self, num_positions, dim, base):
        return torch.tensor(
            [
                [
                    (math.sin if j % 2 == 0 else math.cos)(m / base ** ((j - j % 2) / dim))
                    for j in range(dim)
                ]
                for m in range(num_positions)
            ]
        )

    @points(2)
    def test_matches_the_formula(self, student, rng):
        """equals the formula, entry by entry"""
        for dim in (8, 12):
            got = student.sinusoidal_encoding(7, dim)
            expect.close(got, self._expected(7, dim, 10000.0), f"dim={dim}", atol=1e-5)

    def test_more_positions_than_features(self, student, rng):
        """goes on beyond as many positions as there are features"""
        got = student.sinusoidal_encoding(25, 4)
        expect.close(got, self._expected(25, 4, 10000.0), "the table", atol=1e-5)

    def test_base(self, student, rng):
        """uses the base that it is given"""
        got = student.sinusoidal_encoding(5, 6, 100.0)
        expect.close(got, self._expected(5, 6, 100.0), "the table", atol=1e-5)


@exercise(
    "rotate_pairs",
    kind="build",
    minutes=15,
    difficulty=2,
    see="4. RoPE: turn, do not add",
    hints=(
        "Bring the last dimension into the shape (d/2, 2). What are the two columns?",
        "Wrong from the second position on, right at position 0: the pairs or the frequencies. "
        "A shape error for positions (B, T): a dimension for the heads is missing in the angles.",
        "theta = base^(-2i/d), i = 0 ... d/2 - 1\n"
        "angles = positions[..., None] * theta; for (B, T): a head dimension after B\n"
        "a, b = the two members of each pair\n"
        "stack (a cos - b sin, a sin + b cos), flatten, back to the dtype of x",
    ),
)
class TestRotatePairs:
    @points(2)
    def test_matches_complex_numbers(self, student, rng):
        """equals the product with e^(j m theta)"""
        x, positions = _normal(rng, 2, 2, 5, 8), torch.arange(5)
        expected = _turned(x, positions, 10000.0).float()
        expect.close(student.rotate_pairs(x, positions), expected, rtol=1e-5, atol=1e-5)

    def test_positions_of_each_sequence(self, student, rng):
        """takes positions (B, T) that need not begin at 0"""
        x = _normal(rng, 2, 3, 4, 6)
        positions = torch.tensor([[3, 4, 5, 6], [0, 0, 1, 2]])
        expected = _turned(x, positions, 10000.0).float()
        expect.close(student.rotate_pairs(x, positions), expected, rtol=1e-5, atol=1e-5)

    def test_base(self, student, rng):
        """uses the base that it is given"""
        x, positions = _normal(rng, 1, 1, 6, 8), torch.arange(6)
        expected = _turned(x, positions, 50.0).float()
        expect.close(student.rotate_pairs(x, positions, 50.0), expected, rtol=1e-5, atol=1e-5)

    def test_half_precision(self, student, rng):
        """computes angles in float32: bfloat16 has no 257"""
        x, positions = (
            _normal(rng, 1, 2, 3, 8, dtype=torch.bfloat16),
            torch.tensor([257, 515, 1027]),
        )
        expected = _turned(x, positions, 10000.0).bfloat16()
        expect.close(student.rotate_pairs(x, positions), expected)


@exercise(
    "rope_backward",
    kind="derive",
    minutes=10,
    difficulty=2,
    see="7. The backward pass",
    hints=(
        "Write y for one pair: y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2. Which of them does x1 "
        "appear in?",
        "Nearly right, with the wrong sign in one half: the inverse of a turn is a turn back. "
        "Wrong only where the halves of sin differ: which sine stood with x1?",
        "dx1 = g1 c1 + g2 s2\ndx2 = g2 c2 - g1 s1",
    ),
)
class TestRopeBackward:
    def _grade(self, student, rng, cos, sin):
        x, grad = _normal(rng, 2, 2, 4, 6), _normal(rng, 2, 2, 4, 6)
        x.requires_grad_()
        first, second = x.chunk(2, -1)
        y = x * cos + torch.cat((-second, first), -1) * sin
        (expected,) = torch.autograd.grad(y, x, grad)
        expect.close(student.rope_backward(grad, cos, sin), expected)

    @points(2)
    def test_matches_autograd(self, student, rng):
        """equals autograd for the tables of RoPE"""
        angles = torch.arange(4.0)[:, None] * torch.tensor([1.0, 0.3, 0.1])
        angles = torch.cat((angles, angles), -1)
        self._grade(student, rng, angles.cos(), angles.sin())

    def test_any_tables(self, student, rng):
        """equals autograd for tables whose halves differ"""
        self._grade(student, rng, _normal(rng, 4, 6), _normal(rng, 4, 6))


@exercise(
    "relative_scores",
    kind="derive",
    minutes=15,
    difficulty=3,
    see="6. Only the distance matters",
    hints=(
        "Read a pair as a complex number. The real part of a product with a conjugate is the "
        "product of two vectors.",
        "Right for distance 0 and mirrored elsewhere: the sign of the sine. Wrong for all but "
        "distance 0 and even there too large: the conjugate is missing.",
        "score = Re sum_i q_i conj(k_i) e^(j s theta_i)\n"
        "with q = (a, b), k = (c, e):\n"
        "q conj(k) = (ac + be) + j (bc - ae)\n"
        "score = sum (ac + be) cos(s theta) + (ae - bc) sin(s theta)",
    ),
)
class TestRelativeScores:
    @points(2)
    def test_matches_turned_vectors(self, student, rng):
        """equals the product of turned q and k, wherever the pair stands"""
        q, k = _normal(rng, 8, dtype=torch.float64), _normal(rng, 8, dtype=torch.float64)
        distances = torch.tensor([0, 1, 2, 5, 17])
        for start in (0, 40):
            expected = torch.stack(
                [
                    _turned(q.view(1, 1, 1, -1), torch.tensor([start + s]), 10000.0).flatten()
                    @ _turned(k.view(1, 1, 1, -1), torch.tensor([start]), 10000.0).flatten()
                    for s in distances.tolist()
                ]
            )
            got = student.relative_scores(q, k, distances)
            expect.close(got, expected, "the scores", rtol=1e-9, atol=1e-9)

    def test_keys_after_the_query(self, student, rng):
        """takes negative distances: the score is not symmetric"""
        q, k = _normal(rng, 4, dtype=torch.float64), _normal(rng, 4, dtype=torch.float64)
        distances = torch.tensor([-3, -1, 3])
        theta = [1.0, 0.01]
        pairs = [complex(*p) * complex(*r).conjugate() for p, r in
                 zip(q.view(-1, 2).tolist(), k.view(-1, 2).tolist(), strict=True)]  # fmt: skip
        expected = [
            sum((h * cmath.exp(1j * s * t)).real for h, t in zip(pairs, theta, strict=True))
            for s in distances.tolist()
        ]
        got = student.relative_scores(q, k, distances)
        expect.close(got, torch.tensor(expected, dtype=torch.float64), "the scores")

    def test_base(self, student, rng):
        """uses the base that it is given"""
        q, k = _normal(rng, 6, dtype=torch.float64), _normal(rng, 6, dtype=torch.float64)
        expected = _turned(q.view(1, 1, 1, -1), torch.tensor([4]), 30.0).flatten() @ k
        got = student.relative_scores(q, k, torch.tensor([4]), 30.0)
        expect.close(got, expected[None], "the scores", rtol=1e-9, atol=1e-9)


@exercise(
    "convert_weights",
    kind="repair",
    minutes=15,
    difficulty=2,
    see="5. Two layouts",
    hints=(
        "Which of the three projections does RoPE touch?",
        "The scores are right and the output is scrambled: what multiplies the attention weights? "
        "With fewer key/value heads: each matrix has its own number of heads.",
        "reorder w_q with num_heads, w_k with num_kv_heads; w_v stays",
    ),
)
class TestConvertWeights:
    def _attention(self, x, w_q, w_k, w_v, num_heads, num_kv_heads, is_interleaved):
        def heads(weight, n):
            return (x @ weight.T).unflatten(-1, (n, -1)).transpose(1, 2)

        def turn(y):
            if is_interleaved:
                return _turned(y, torch.arange(y.shape[2]), 10000.0)
            y = y.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
            return _turned(y, torch.arange(y.shape[2]), 10000.0)

        q, k, v = heads(w_q, num_heads), heads(w_k, num_kv_heads), heads(w_v, num_kv_heads)
        return F.scaled_dot_product_attention(turn(q), turn(k), v, enable_gqa=True)

    def _grade(self, student, rng, num_heads, num_kv_heads):
        x = _normal(rng, 1, 5, 12, dtype=torch.float64)
        w_q = _normal(rng, num_heads * 6, 12, dtype=torch.float64)
        w_k, w_v = (_normal(rng, num_kv_heads * 6, 12, dtype=torch.float64) for _ in range(2))
        expected = self._attention(x, w_q, w_k, w_v, num_heads, num_kv_heads, True)
        converted = student.convert_weights(w_q, w_k, w_v, num_heads, num_kv_heads)
        expect.true(
            isinstance(converted, (tuple, list)) and len(converted) == 3,
            "expected three matrices, those of q, k and v in this order",
        )
        for name, got, weight in zip("qkv", converted, (w_q, w_k, w_v), strict=True):
            expect.true(got.shape == weight.shape, f"w_{name}: the shape changed")
        got = self._attention(x, *converted, num_heads, num_kv_heads, False)
        expect.close(got, expected, "the attention of the converted model", rtol=1e-9, atol=1e-9)

    @points(2)
    def test_same_attention(self, student, rng):
        """computes the same attention after conversion"""
        self._grade(student, rng, 3, 3)

    @points(2)
    def test_grouped_queries(self, student, rng):
        """works with fewer key/value heads than query heads"""
        self._grade(student, rng, 4, 2)


@exercise(
    "rope_attention",
    kind="build",
    minutes=20,
    difficulty=2,
    see="4. RoPE: turn, do not add",
    hints=(
        "Turn after the projection, head by head: the angle depends on the feature within a head.",
        "Right for the first token only: the turning. Right in nothing: how the heads were cut; "
        "(B, T, H, d), then transpose.",
        "q, k, v = heads of x W^T\n"
        "q, k = turned by m * base^(-2i/d); v stays\n"
        "causal attention, merge heads",
    ),
)
class TestRopeAttention:
    def _expected(self, x, w_q, w_k, w_v, num_heads, base):
        def heads(weight):
            return (x.double() @ weight.double().T).unflatten(-1, (num_heads, -1)).transpose(1, 2)

        def turn(y):
            y = y.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
            return _turned(y, torch.arange(y.shape[2]), base)

        out = F.scaled_dot_product_attention(
            turn(heads(w_q)), turn(heads(w_k)), heads(w_v), is_causal=True
        )
        return out.transpose(1, 2).flatten(2)

    def _grade(self, student, rng, dim, base, *options):
        x = _normal(rng, 2, 6, dim, dtype=torch.float64)
        weights = [_normal(rng, 12, dim, dtype=torch.float64) for _ in range(3)]
        expected = self._expected(x, *weights, 2, base)
        got = student.rope_attention(x, *weights, 2, *options)
        expect.close(got, expected, rtol=1e-8, atol=1e-8)

    @points(2)
    def test_matches_torch(self, student, rng):
        """equals torch's attention on queries and keys turned by complex numbers"""
        self._grade(student, rng, 12, 10000.0)

    def test_other_widths(self, student, rng):
        """works where the model is wider than its heads together"""
        self._grade(student, rng, 20, 10000.0)

    def test_base(self, student, rng):
        """uses the base that it is given"""
        self._grade(student, rng, 12, 20.0, 20.0)

    def test_order_matters(self, student, rng):
        """gives the last token another output when the tokens before it change places"""
        x = _normal(rng, 1, 4, 12, dtype=torch.float64)
        weights = [_normal(rng, 12, 12, dtype=torch.float64) / 6 for _ in range(3)]
        swapped = x[:, [1, 0, 2, 3]]
        last = [student.rope_attention(y, *weights, 2)[:, -1] for y in (x, swapped)]
        expect.true(bool(torch.stack(last).isfinite().all()), "the output is not finite")
        expect.true(
            not torch.allclose(*last),
            "the last token does not notice that others changed places: no order is left",
        )


@exercise(
    "pairs_in_context",
    kind="estimate",
    minutes=10,
    difficulty=1,
    see="9. Beyond the training length",
    hints=(
        "How many tokens does pair i need for a full circle?",
        "Too many: a full turn is 2 pi radians, not 1. One off: i counts from 0.",
        "for i in 0 ... d/2 - 1: tokens for a turn = 2 pi * base^(2i/d)\n"
        "count those that are at most num_tokens",
    ),
)
class TestPairsInContext:
    def _expected(self, head_dim, base, num_tokens):
        # 2 pi base^(2i/d) <= n   <=>   i <= d/2 * log(n / 2 pi) / log(base)
        last = head_dim / 2 * math.log(num_tokens / (2 * math.pi)) / math.log(base)
        return max(0, min(head_dim // 2, math.floor(last) + 1))

    @points(2)
    def test_published_models(self, student, rng):
        """is right for Llama 2, Llama 3 and SmolLM2"""
        for name, case in (
            ("Llama 2", (128, 10000.0, 4096)),
            ("Llama 3", (128, 500000.0, 8192)),
            ("SmolLM2", (64, 100000.0, 2048)),
        ):
            got = student.pairs_in_context(*case)
            expect.number(got, self._expected(*case), what=f"pairs of {name}")

    def test_other_sizes(self, student, rng):
        """is right for other widths, bases and lengths"""
        for case in ((32, 100.0, 50), (16, 10000.0, 1_000_000), (64, 1e6, 7)):
            expect.number(student.pairs_in_context(*case), self._expected(*case), what=f"{case}")

    def test_no_pair(self, student, rng):
        """is 0 where the text is shorter than one turn of the fastest pair"""
        expect.number(student.pairs_in_context(64, 10000.0, 6), 0, what="pairs within 6 tokens")


@exercise(
    "stretched_frequencies",
    kind="challenge",
    minutes=25,
    difficulty=3,
    see="10. Stretching the context",
    hints=(
        "Compute the number of turns of every pair first. Then one formula with a clamped t does "
        "all three cases.",
        "Frequencies of the slow end too high: they must be divided. A jump in the middle: check "
        "that t is 1 for the fast pairs and 0 for the slow ones.",
        "theta = base^(-2i/d)\n"
        "r = num_trained * theta / (2 pi)\n"
        "t = (r - low) / (high - low), clamped to [0, 1]\n"
        "t * theta + (1 - t) * theta / factor",
    ),
)
class TestStretchedFrequencies:
    def _expected(self, head_dim, base, factor, low, high, num_trained):
        values = []
        for i in range(head_dim // 2):
            theta = base ** (-2 * i / head_dim)
            wavelength = 2 * math.pi / theta
            if wavelength < num_trained / high:
                values.append(theta)
            elif wavelength > num_trained / low:
                values.append(theta / factor)
            else:
                t = (num_trained / wavelength - low) / (high - low)
                values.append((1 - t) * theta / factor + t * theta)
        return torch.tensor(values)

    def _grade(self, student, *case):
        got, expected = student.stretched_frequencies(*case), self._expected(*case)
        expect.close(got[:0], expected[:0], "frequencies")  # the type and dtype
        expect.true(
            got.shape == expected.shape, f"expected {len(expected)} frequencies, one a pair"
        )
        theta = case[1] ** (-torch.arange(0, case[0], 2) / case[0])
        expect.close(
            theta / got, theta / expected, "theta / frequency of each pair", rtol=1e-4, atol=1e-4
        )

    @points(2)
    def test_llama_3_1(self, student, rng):
        """gives the frequencies of Llama 3.1"""
        self._grade(student, 128, 500000.0, 8.0, 1.0, 4.0, 8192)

    @points(2)
    def test_other_models(self, student, rng):
        """is right for Llama 3.2 and for another base, length and range"""
        self._grade(student, 64, 500000.0, 32.0, 1.0, 4.0, 8192)
        self._grade(student, 64, 10000.0, 4.0, 2.0, 16.0, 2048)

    def test_factor_1(self, student, rng):
        """changes nothing for factor 1"""
        self._grade(student, 32, 10000.0, 1.0, 1.0, 4.0, 512)
