"""Grades chapter 08: LoRA and its relatives. Oracles: float64 products, autograd, closed forms."""

import math

import torch
import torch.nn.functional as F

from autograder import exercise, expect, points
from autograder.spies import largest_new_tensor


def _normal(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


def _whole(rng, low, high):
    return int(torch.randint(low, high, (), generator=rng))


@exercise(
    "lora_forward",
    kind="build",
    minutes=8,
    difficulty=1,
    see="2. Two thin matrices",
    hints=(
        "Follow one vector: D numbers, then r, then F. Which matrix comes first?",
        "Too large by r: alpha alone is not the factor. A tensor too large: B A was formed; "
        "multiply x by A first.",
        "s = alpha / r  (or / sqrt(r))\nx @ weight.T + (x @ a.T) @ b.T * s",
    ),
)
class TestLoraForward:
    def _expected(self, x, w, a, b, alpha, power):
        return F.linear(x, w + alpha / a.shape[0] ** power * b @ a)

    @points(2)
    def test_values(self, student, rng):
        """equals the layer with the product added to its weight"""
        x, w, a, b = (_normal(rng, *s) for s in ((2, 3, 5), (4, 5), (3, 5), (4, 3)))
        got = student.lora_forward(x, w, a, b, 7.0)
        expect.close(got, self._expected(x, w, a, b, 7.0, 1.0))

    def test_rank_stabilised(self, student, rng):
        """divides by the root of the rank where asked to"""
        x, w, a, b = (_normal(rng, *s) for s in ((4, 5), (6, 5), (3, 5), (6, 3)))
        got = student.lora_forward(x, w, a, b, 5.0, is_rank_stabilised=True)
        expect.close(got, self._expected(x, w, a, b, 5.0, 0.5))

    @points(2)
    def test_stays_thin(self, student, rng):
        """never forms B A"""
        x, a, b = (_normal(rng, *s) for s in ((2, 40), (1, 40), (30, 1)))
        w = _normal(rng, 30, 40)
        with largest_new_tensor() as spy:
            got = student.lora_forward(x, w, a, b, 2.0)
        expect.close(got, self._expected(x, w, a, b, 2.0, 1.0))
        expect.true(
            spy.bytes < 30 * 40 * 8,
            "a tensor as large as the weight was allocated: multiply x by A, then by B",
        )


@exercise(
    "initial_adapter",
    kind="build",
    minutes=6,
    difficulty=1,
    see="3. Where it begins",
    hints=(
        "B A must be zero. Both zero would do. Why can that not learn?",
        "Wrong spread: -1/sqrt(D) to 1/sqrt(D), D the width of the input.",
        "a = noise / sqrt(D); b = zeros (F, r)",
    ),
)
class TestInitialAdapter:
    def _grade(self, student, rng, rank, fan_in, fan_out, dtype):
        noise = (2 * torch.rand(rank, fan_in, generator=rng, dtype=torch.float64) - 1).to(dtype)
        got = student.initial_adapter(noise, fan_out)
        expected = noise / math.sqrt(fan_in), torch.zeros(fan_out, rank, dtype=dtype)
        expect.close(got, expected, "A and B")

    @points(2)
    def test_start(self, student, rng):
        """leaves the model as it was, with gradients from the first step on"""
        self._grade(student, rng, 3, 7, 5, torch.float32)

    def test_shapes_and_dtype(self, student, rng):
        """takes any widths, in the dtype of the noise"""
        self._grade(student, rng, 2, 4, 9, torch.bfloat16)


@exercise(
    "merge_adapters",
    kind="build",
    minutes=8,
    difficulty=1,
    see="5. Merging",
    hints=(
        "What is the one matrix that does x -> s (x A^T) B^T?",
        "Wrong with two adapters: (B1 + B2)(A1 + A2) has two products too many.",
        "W + sum of s_i * b_i @ a_i",
    ),
)
class TestMergeAdapters:
    def _adapters(self, rng, fan_out, fan_in, ranks):
        return [
            (_normal(rng, r, fan_in), _normal(rng, fan_out, r), 0.5 + i)
            for i, r in enumerate(ranks)
        ]

    def _grade(self, student, rng, fan_out, fan_in, ranks):
        weight, adapters = (
            _normal(rng, fan_out, fan_in),
            self._adapters(rng, fan_out, fan_in, ranks),
        )
        expected = weight + sum(s * b @ a for a, b, s in adapters)
        expect.close(student.merge_adapters(weight, adapters), expected)

    def test_one(self, student, rng):
        """merges one adapter"""
        self._grade(student, rng, 4, 6, [2])

    @points(2)
    def test_several(self, student, rng):
        """merges several, of different and of equal ranks"""
        self._grade(student, rng, 5, 4, [1, 3])
        self._grade(student, rng, 4, 4, [2, 2])

    def test_none(self, student, rng):
        """gives the weight itself without adapters"""
        weight = _normal(rng, 3, 2)
        expect.equal(student.merge_adapters(weight, []), weight)


@exercise(
    "batched_lora",
    kind="challenge",
    minutes=15,
    difficulty=3,
    see="6. Many adapters, one base",
    hints=(
        "a[rows] has one matrix for each row of the batch.",
        "Right but for -1: a[-1] is the last adapter, not none. Wrong by a factor for some rows: "
        "each adapter has a scaling of its own.",
        'low = einsum("btd,brd->btr", x, a[rows])\ny = einsum("btr,bfr->btf", low, b[rows])\n'
        "y * scalings[rows] along the batch; zero where rows is -1",
    ),
)
class TestBatchedLora:
    def _draw(self, rng, rows, num=3, t=2, d=4, r=2, f=5):
        x, a, b = (_normal(rng, *s) for s in ((len(rows), t, d), (num, r, d), (num, f, r)))
        return (
            x,
            a,
            b,
            torch.rand(num, generator=rng, dtype=torch.float64) + 0.5,
            torch.tensor(rows),
        )

    def _expected(self, x, a, b, scalings, rows):
        y = x.new_zeros(*x.shape[:2], b.shape[1])
        for i, n in enumerate(rows.tolist()):
            if n >= 0:
                y[i] = scalings[n] * (x[i] @ a[n].T @ b[n].T)
        return y

    @points(2)
    def test_rows(self, student, rng):
        """gives each row its own adapter"""
        given = self._draw(rng, [2, 0, 2, 1])
        expect.close(student.batched_lora(*given), self._expected(*given))

    @points(2)
    def test_no_adapter(self, student, rng):
        """adds nothing where a row has none"""
        given = self._draw(rng, [-1, 1, -1])
        expect.close(student.batched_lora(*given), self._expected(*given))

    def test_more_adapters_than_rows(self, student, rng):
        """takes more adapters than rows"""
        given = self._draw(rng, [3], num=5, t=1)
        expect.close(student.batched_lora(*given), self._expected(*given))


@exercise(
    "adapter_gradients",
    kind="derive",
    minutes=15,
    difficulty=2,
    see="4. What learns first",
    hints=(
        "Let h = x A^T. Then y = s h B^T: two linear layers, one after the other.",
        "Shapes right, values wrong: the scaling belongs into each of the three.",
        "g = s * grad_y @ B   (gradient of h)\ngrad_b = s * grad_y.T @ (x @ A.T)\n"
        "grad_a = g.T @ x; grad_x = g @ A",
    ),
)
class TestAdapterGradients:
    def _grade(self, student, rng, b=None, scaling=1.7):
        grad_y, x, a = (_normal(rng, *s) for s in ((6, 4), (6, 5), (2, 5)))
        b = _normal(rng, 4, 2) if b is None else b
        leaves = [t.clone().requires_grad_() for t in (a, b, x)]
        (leaves[2] @ leaves[0].T @ leaves[1].T * scaling).backward(grad_y)
        got = student.adapter_gradients(grad_y, x, a, b, scaling)
        expect.close(got, tuple(leaf.grad for leaf in leaves), "gradients of a, b and x")

    @points(2)
    def test_matches_autograd(self, student, rng):
        """equals autograd"""
        self._grade(student, rng)

    def test_at_the_start(self, student, rng):
        """gives B a gradient at the start, and A none"""
        self._grade(student, rng, torch.zeros(4, 2, dtype=torch.float64), 0.6)


@exercise(
    "training_bytes",
    kind="estimate",
    minutes=8,
    difficulty=1,
    see="7. What it costs",
    hints=(
        "Which parameters have a gradient? Those have Adam's two numbers as well.",
        "Far too much: a frozen weight has no gradient and no state. Too little: A and B both "
        "learn.",
        "count = sum of r (F + D)   (full: F D)\nparameters 4 count (full: 0), gradients 4 count, "
        "Adam 8 count",
    ),
)
class TestTrainingBytes:
    def _grade(self, student, shapes, rank):
        count = sum(f * d if rank is None else rank * (f + d) for f, d in shapes)
        expected = (0 if rank is None else 4 * count, 4 * count, 8 * count)
        got = student.training_bytes(shapes, rank)
        expect.true(
            isinstance(got, tuple | list) and len(got) == 3,
            f"expected three numbers (parameters, gradients, optimizer), got {got!r}",
        )
        for what, ours, theirs in zip(
            ("parameters", "gradients", "optimizer"), got, expected, strict=True
        ):
            expect.number(ours, theirs, what=f"bytes of {what}, rank {rank}")

    @points(2)
    def test_lora(self, student, rng):
        """counts adapters of matrices of any shape"""
        shapes = [(_whole(rng, 5, 20), _whole(rng, 5, 20)) for _ in range(3)]
        self._grade(student, shapes, _whole(rng, 1, 5))

    def test_full(self, student, rng):
        """counts full fine-tuning"""
        self._grade(student, [(_whole(rng, 5, 20), _whole(rng, 5, 20))] * 2, None)


@exercise(
    "layer_flops",
    kind="estimate",
    minutes=10,
    difficulty=2,
    see="7. What it costs",
    hints=(
        "Forward: which products are there with the adapter that were not there without?",
        "Training too cheap: the gradient must pass through the frozen weight to the layers "
        "below. Too dear: only the frozen weight's own gradient is saved.",
        "base = 2 N D F; low = 2 N r (D + F), or 0 when merged\n"
        "forward: base + low; training: 2 base + 3 low",
    ),
)
class TestLayerFlops:
    def _grade(self, student, d, f, r, n, **how):
        base, low = 2 * n * d * f, 0 if how.get("is_merged") else 2 * n * r * (d + f)
        expected = 2 * base + 3 * low if how.get("is_training") else base + low
        expect.number(student.layer_flops(d, f, r, n, **how), expected, what=f"FLOPs, {how}")

    def _sizes(self, rng):
        return _whole(rng, 10, 30), _whole(rng, 31, 60), _whole(rng, 1, 6), _whole(rng, 2, 9)

    @points(2)
    def test_forward(self, student, rng):
        """costs more than the base forward, and just the base when merged"""
        sizes = self._sizes(rng)
        self._grade(student, *sizes)
        self._grade(student, *sizes, is_merged=True)

    @points(2)
    def test_training(self, student, rng):
        """saves the frozen weight's gradient, nothing else"""
        self._grade(student, *self._sizes(rng), is_training=True)


@exercise(
    "prefix_attention",
    kind="build",
    minutes=15,
    difficulty=2,
    see="9. Prefixes and prompts",
    hints=(
        "Put the prefix before the text's keys and values. What does the mask look like?",
        "Wrong for early queries: the prefix stands before the text and is no future of anybody. "
        "tril of the joined matrix needs the offset p.",
        "keys = cat(prefix_k, k); values = cat(prefix_v, v)\n"
        "query i sees keys 0 ... p + i; softmax over all of them at once",
    ),
)
class TestPrefixAttention:
    def _grade(self, student, rng, b, h, t, p, d):
        q, k, v = (_normal(rng, b, h, t, d) for _ in range(3))
        prefix_k, prefix_v = _normal(rng, h, p, d), _normal(rng, h, p, d)
        sees = torch.ones(t, p + t, dtype=torch.bool)
        sees[:, p:] = torch.ones(t, t, dtype=torch.bool).tril()
        expected = F.scaled_dot_product_attention(
            q,
            torch.cat([prefix_k.expand(b, -1, -1, -1), k], 2),
            torch.cat([prefix_v.expand(b, -1, -1, -1), v], 2),
            attn_mask=sees,
        )
        expect.close(student.prefix_attention(q, k, v, prefix_k, prefix_v), expected)

    @points(2)
    def test_values(self, student, rng):
        """equals attention with the prefix before the text"""
        self._grade(student, rng, 2, 2, 4, 3, 6)

    def test_long_prefix(self, student, rng):
        """takes a prefix longer than the text, and a text of one token"""
        self._grade(student, rng, 1, 2, 2, 5, 4)
        self._grade(student, rng, 2, 1, 1, 2, 4)


@exercise(
    "galore_step",
    kind="challenge",
    minutes=15,
    difficulty=2,
    see="10. GaLore",
    hints=(
        "Three shapes: the gradient (F, D), its projection (F, r), the step (F, D) again.",
        "A small weight change only inside of the basis is right. Wrong moments: Adam sees the "
        "projected gradient, nothing else.",
        "small = gradient @ basis.T; Adam on small\nweight - lr * scale * (change @ basis)",
    ),
)
class TestGaloreStep:
    def _grade(self, student, rng, step, scale, lr=0.1):
        f, d, r = 6, 5, 2
        weight, gradient = _normal(rng, f, d), _normal(rng, f, d)
        basis = torch.linalg.qr(_normal(rng, d, r)).Q.T.contiguous()
        momentum, variance = _normal(rng, f, r), _normal(rng, f, r).square()
        if step == 1:
            momentum, variance = torch.zeros_like(momentum), torch.zeros_like(variance)
        small = gradient @ basis.T
        m, v = 0.9 * momentum + 0.1 * small, 0.999 * variance + 0.001 * small**2
        change = m / (v.sqrt() + 1e-6) * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        got = student.galore_step(weight, gradient, basis, momentum, variance, step, lr, scale)
        expect.close(got, (weight - lr * scale * change @ basis, m, v), "weight and moments")

    @points(2)
    def test_first_step(self, student, rng):
        """takes the first step"""
        self._grade(student, rng, 1, 1.0)

    @points(2)
    def test_later_steps(self, student, rng):
        """goes on from moments, with a scale"""
        self._grade(student, rng, _whole(rng, 2, 9), 0.25)
