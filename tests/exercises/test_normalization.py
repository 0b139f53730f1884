"""Grades chapter 01: normalization. Oracles: torch's kernels, autograd, float64, the papers."""

import torch
import torch.nn.functional as F

from autograder import exercise, expect, points
from autograder.spies import largest_new_tensor, order_of_reads


def _normal(rng, *shape, mean=0.0, std=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=rng) * std + mean).to(dtype)


@exercise(
    "rms_norm",
    kind="build",
    minutes=10,
    difficulty=1,
    see="3. RMSNorm",
    hints=(
        "Three steps: the mean of the squares, one over its root, a product. Which dimensions does "
        "a weight of shape (3, 8) stand for?",
        "A shape error means that the mean dropped its dimensions: keepdim=True keeps them. inf or "
        "zeros in float16 mean that the squares were taken before widening: 300^2 > 65504.",
        "wide = x in float32 (or float64 if x is)\n"
        "dims = the last weight.ndim dimensions\n"
        "r = 1 / sqrt(mean of wide^2 over dims, kept, + eps)\n"
        "return (wide * r * weight) in the dtype of x",
    ),
)
class TestRMSNorm:
    @points(2)
    def test_matches_torch(self, student, rng):
        """equals torch's rms_norm on tokens whose mean is not zero"""
        x, weight = _normal(rng, 4, 7, 16, mean=0.8, std=2.0), _normal(rng, 16)
        expect.close(student.rms_norm(x, weight, 1e-6), F.rms_norm(x, (16,), weight, 1e-6))

    def test_eps_stands_under_the_root(self, student, rng):
        """adds eps to the mean square, under the root"""
        x, weight = _normal(rng, 5, 16, std=0.1), _normal(rng, 16)
        expect.close(student.rms_norm(x, weight, 0.02), F.rms_norm(x, (16,), weight, 0.02))

    def test_trailing_dimensions(self, student, rng):
        """normalises over all the dimensions that weight has"""
        x, weight = _normal(rng, 2, 5, 3, 8, mean=0.5), _normal(rng, 3, 8)
        scale = torch.tensor([1.0, 5.0, 0.2]).view(3, 1)
        x = x * scale
        expect.close(student.rms_norm(x, weight, 1e-6), F.rms_norm(x, (3, 8), weight, 1e-6))

    def test_half_precision(self, student, rng):
        """computes float16 and bfloat16 in float32: the squares of 3000 do not fit float16"""
        weight = _normal(rng, 32)
        for dtype in (torch.float16, torch.bfloat16):
            x, w = _normal(rng, 6, 32, std=3000.0, dtype=dtype), weight.to(dtype)
            expected = F.rms_norm(x.float(), (32,), w.float(), 1e-6).to(dtype)
            expect.close(student.rms_norm(x, w, 1e-6), expected, f"the output in {dtype}")

    def test_edges(self, student, rng):
        """takes one token without a batch, an empty batch, strided and float64 input"""
        weight = _normal(rng, 6, dtype=torch.float64)
        x = _normal(rng, 6, 4, dtype=torch.float64).T
        for case in (x, x[0], x[:0]):
            expected = F.rms_norm(case, (6,), weight, 1e-6)
            expect.close(student.rms_norm(case, weight, 1e-6), expected)


@exercise(
    "layer_norm",
    kind="build",
    minutes=15,
    difficulty=1,
    see="2. LayerNorm",
    hints=(
        "Centre first, then take the mean of the squares of what is left. Then think about which "
        "shape weight needs to lie along dimension `dim`.",
        "Values about 2 % to 10 % too small: the variance divides by n - 1 (tensor.var's default). "
        "A broadcast error with dim=1: weight of shape (C,) lines up with the last dimension.",
        "wide = x in float32 (or float64 if x is)\n"
        "c = wide - mean along dim, kept\n"
        "y = c / sqrt(mean of c^2 along dim, kept, + eps)\n"
        "lay weight and bias along dim: shape of ones with -1 at dim\n"
        "return (y * weight + bias) in the dtype of x",
    ),
)
class TestLayerNorm:
    @points(2)
    def test_matches_torch_along_the_last_dimension(self, student, rng):
        """equals torch's layer_norm along the last dimension"""
        x, weight, bias = _normal(rng, 5, 3, 6, mean=1.5, std=2), _normal(rng, 6), _normal(rng, 6)
        expected = F.layer_norm(x, (6,), weight, bias)
        expect.close(student.layer_norm(x, weight, bias, 2, 1e-5), expected)

    @points(2)
    def test_along_channels(self, student, rng):
        """normalises along dimension 1, the channels of an image"""
        x, weight, bias = _normal(rng, 2, 4, 4, 4, mean=1.0), _normal(rng, 4), _normal(rng, 4)
        for dim in (1, -3):
            moved = F.layer_norm(x.movedim(1, -1), (4,), weight, bias, 1e-5)
            expected = moved.movedim(-1, 1)
            expect.close(student.layer_norm(x, weight, bias, dim, 1e-5), expected, f"dim={dim}")

    def test_eps_stands_under_the_root(self, student, rng):
        """adds eps to the variance, under the root"""
        x, weight, bias = _normal(rng, 5, 8, std=0.1), _normal(rng, 8), _normal(rng, 8)
        expected = F.layer_norm(x, (8,), weight, bias, 0.02)
        expect.close(student.layer_norm(x, weight, bias, -1, 0.02), expected)

    def test_half_precision(self, student, rng):
        """computes float16 and bfloat16 in float32, and returns the dtype of x"""
        weight, bias = _normal(rng, 32), _normal(rng, 32)
        for dtype in (torch.float16, torch.bfloat16):
            x = _normal(rng, 6, 32, mean=500.0, std=1500.0, dtype=dtype)
            w, b = weight.to(dtype), bias.to(dtype)
            expected = F.layer_norm(x.float(), (32,), w.float(), b.float()).to(dtype)
            got = student.layer_norm(x, w, b, -1, 1e-5)
            expect.close(got, expected, f"the output in {dtype}")

    def test_large_mean(self, student, rng):
        """keeps its digits where the mean is thousands and the spread is one"""
        x = _normal(rng, 6, 64, mean=4096.0)
        ones, zeros = torch.ones(64), torch.zeros(64)
        expected = F.layer_norm(x.double(), (64,)).float()
        got = student.layer_norm(x, ones, zeros, -1, 1e-5)
        expect.close(got, expected, atol=5e-3)

    def test_edges(self, student, rng):
        """takes one token without a batch, a constant token, which gives the bias, and float64"""
        weight, bias = _normal(rng, 6), _normal(rng, 6)
        for x in (_normal(rng, 6), torch.full((2, 6), 3.0)):
            expected = F.layer_norm(x, (6,), weight, bias)
            expect.close(student.layer_norm(x, weight, bias, -1, 1e-5), expected)
        x, weight, bias = (t.double() for t in (_normal(rng, 3, 6, mean=2.0), weight, bias))
        expected = F.layer_norm(x, (6,), weight, bias)
        got = student.layer_norm(x, weight, bias, -1, 1e-5)
        expect.close(got, expected, "the output in float64")


def _batch_norm_oracle(batches, held_out, weight, bias, momentum, eps):
    norm = torch.nn.BatchNorm1d(weight.numel(), eps=eps, momentum=momentum)
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
        outputs = [norm(batch) for batch in batches]
        return outputs, norm.running_mean, norm.running_var, norm.eval()(held_out)


@exercise(
    "BatchNorm",
    kind="build",
    minutes=20,
    difficulty=2,
    see="6. BatchNorm",
    through="run_batch_norm",
    hints=(
        "Write training first, then keep the two running averages, then evaluation, which reads "
        "them and writes nothing. self.training says which it is.",
        "Right in training but wrong running_var: it takes the variance with n - 1. Right there "
        "but wrong afterwards: evaluation normalises by the running statistics, and momentum is "
        "the share of the NEW batch.",
        "training: n = values per channel (ValueError if n < 2); mean, var over all but dim 1\n"
        "    running_mean = (1 - m) * running_mean + m * mean\n"
        "    running_var = (1 - m) * running_var + m * var * n / (n - 1)     (no gradient)\n"
        "evaluation: mean, var = the running ones\n"
        "return (x - mean) / sqrt(var + eps) * weight + bias, each along dim 1",
    ),
)
class TestBatchNorm:
    def _draw(self, rng, *shape, num_batches=2):
        batches = [
            _normal(rng, *shape, mean=2.0 + i, std=1.5 + 0.5 * i) for i in range(num_batches)
        ]
        return batches, _normal(rng, *shape, mean=-1.0, std=3.0)

    @points(2)
    def test_training(self, student, rng):
        """normalises each channel by the batch in training"""
        batches, held_out = self._draw(rng, 6, 4)
        weight, bias = _normal(rng, 4), _normal(rng, 4)
        expected = _batch_norm_oracle(batches, held_out, weight, bias, 0.1, 1e-5)[0]
        got = student.run_batch_norm(batches, held_out, weight, bias, 0.1, 1e-5)
        expect.close(got["outputs"], expected, "the outputs in training")
        expect.close(got["weight_at_start"], torch.ones(4), "weight as it starts")
        expect.close(got["bias_at_start"], torch.zeros(4), "bias as it starts")

    def test_positions(self, student, rng):
        """takes (N, C, L) input, with statistics over examples and positions"""
        batches, held_out = self._draw(rng, 3, 4, 5)
        weight, bias = _normal(rng, 4), _normal(rng, 4)
        outputs, mean, var, _ = _batch_norm_oracle(batches, held_out, weight, bias, 0.1, 1e-5)
        got = student.run_batch_norm(batches, held_out, weight, bias, 0.1, 1e-5)
        expect.close(got["outputs"], outputs, "the outputs in training")
        expect.close(got["running_mean"], mean, "running_mean")
        expect.close(got["running_var"], var, "running_var")

    @points(2)
    def test_running_statistics(self, student, rng):
        """keeps a running mean and a running, unbiased variance, both without gradient"""
        batches, held_out = self._draw(rng, 4, 3)
        weight, bias = _normal(rng, 3), _normal(rng, 3)
        _, mean, var, _ = _batch_norm_oracle(batches, held_out, weight, bias, 0.3, 1e-5)
        got = student.run_batch_norm(batches, held_out, weight, bias, 0.3, 1e-5)
        expect.close(got["running_mean"], mean, "running_mean")
        expect.close(got["running_var"], var, "running_var")
        expect.true(
            not got["has_graph"],
            "running_mean and running_var require a gradient, so that each step keeps the graph of "
            "all steps before it: update them under torch.no_grad(), and not as nn.Parameter.",
        )

    @points(2)
    def test_evaluation(self, student, rng):
        """normalises by the running statistics in evaluation, whatever the batch"""
        batches, held_out = self._draw(rng, 4, 3)
        weight, bias = _normal(rng, 3), _normal(rng, 3)
        expected = _batch_norm_oracle(batches, held_out, weight, bias, 0.3, 1e-5)[3]
        for size in (4, 1):
            got = student.run_batch_norm(batches, held_out[:size], weight, bias, 0.3, 1e-5)
            expect.close(got["evaluated"], expected[:size], f"evaluation on {size} examples")
            expect.close(
                got["running_mean_after"], got["running_mean"], "running_mean after evaluation"
            )

    def test_eps(self, student, rng):
        """adds eps to the variance, under the root, in both modes"""
        batches, held_out = [_normal(rng, 5, 3, std=0.1) for _ in range(3)], _normal(rng, 5, 3)
        weight, bias = _normal(rng, 3), _normal(rng, 3)
        outputs, _, _, evaluated = _batch_norm_oracle(batches, held_out, weight, bias, 0.9, 0.02)
        got = student.run_batch_norm(batches, held_out, weight, bias, 0.9, 0.02)
        expect.close(got["outputs"], outputs, "the outputs in training")
        expect.close(got["evaluated"], evaluated, "the output in evaluation")

    def test_one_value_a_channel(self, student, rng):
        """refuses to train on one value a channel, and takes one example of several positions"""
        x, ones, zeros = _normal(rng, 1, 3, 4), torch.ones(3), torch.zeros(3)
        expected = _batch_norm_oracle([x], x, ones, zeros, 0.1, 1e-5)[0]
        got = student.run_batch_norm([x], x, ones, zeros, 0.1, 1e-5)
        expect.close(got["outputs"], expected, "training on one example of four positions")
        x = x[..., 0]
        expect.raises(
            ValueError,
            lambda: student.run_batch_norm([x], x, ones, zeros, 0.1, 1e-5),
            "training on one example of one position",
        )


@exercise(
    "add_rms_norm_backward",
    kind="derive",
    minutes=25,
    difficulty=3,
    see="8. The backward pass",
    hints=(
        "total leaves by two doors: what comes back through each is added. Through the norm, the "
        "quotient depends on every feature twice: in the numerator and in the mean square.",
        "Right only where the gradient is small: the term from the mean square is missing. Wrong "
        "only when weight is not one: the weight belongs to the gradient before the projection.",
        "r = 1 / sqrt(mean(total^2) + eps);  n = total * r;  g = grad_y * weight\n"
        "through the norm: r * (g - n * mean(g * n))\n"
        "grad = grad_total + through the norm\n"
        "grad_weight = sum over all tokens of grad_y * n",
    ),
)
class TestAddRMSNormBackward:
    def _check(self, student, total, weight, grad_y, grad_total, eps, what):
        leaf, w = total.clone().requires_grad_(), weight.clone().requires_grad_()
        y = F.rms_norm(leaf, w.shape, w, eps)
        expected = torch.autograd.grad((y, leaf * 1), (leaf, w), (grad_y, grad_total))
        got = student.add_rms_norm_backward(grad_y, grad_total, total, weight, eps)
        expect.true(
            type(got) is tuple and len(got) == 2, "Return a tuple of two: (grad, grad_weight)."
        )
        if "weight" in what:
            expect.close(got[1], expected[1], what)
        else:
            expect.close(got[0], expected[0], what)

    def _draw(self, rng, *shape, dtype=torch.float64):
        total = _normal(rng, *shape, mean=0.7, std=2.0, dtype=dtype)
        weight = _normal(rng, shape[-1], mean=1.0, dtype=dtype)
        grads = [_normal(rng, *shape, mean=0.5, dtype=dtype) for _ in range(2)]
        return total, weight, *grads

    @points(2)
    def test_through_the_norm(self, student, rng):
        """the gradient through the norm alone, with a weight of ones"""
        total, weight, grad_y, grad_total = self._draw(rng, 5, 6)
        ones, zeros = torch.ones_like(weight), torch.zeros_like(grad_total)
        self._check(student, total, ones, grad_y, zeros, 1e-6, "grad without a skip gradient")

    def test_with_weight(self, student, rng):
        """the gradient through the norm, with any weight"""
        total, weight, grad_y, grad_total = self._draw(rng, 5, 6)
        zeros = torch.zeros_like(grad_total)
        self._check(student, total, weight, grad_y, zeros, 1e-6, "grad without a skip gradient")

    @points(2)
    def test_with_skip_path(self, student, rng):
        """adds what comes back along the skip path"""
        self._check(student, *self._draw(rng, 3, 8), 1e-6, "grad")

    def test_weight(self, student, rng):
        """the gradient of the weight, summed over every token"""
        self._check(student, *self._draw(rng, 2, 3, 6), 1e-6, "grad_weight")

    def test_edges(self, student, rng):
        """one token without a batch, float32, and an eps that is not small"""
        self._check(student, *self._draw(rng, 7), 1e-6, "grad of one token")
        self._check(student, *self._draw(rng, 7), 1e-6, "grad_weight of one token")
        draw = self._draw(rng, 4, 5, dtype=torch.float32)
        self._check(student, *draw, 1e-6, "grad in float32")
        self._check(student, *self._draw(rng, 4, 5), 0.5, "grad with eps 0.5")


@exercise(
    "deepnorm_residual",
    kind="repair",
    minutes=5,
    difficulty=1,
    see="10. DeepNorm",
    hints=(
        "Which of the two branches should weigh more, so that a deep stack moves little in one "
        "step of the optimizer: the skip path or the sublayer?",
        "With alpha = 1 the program is right, so the norm is; what differs is what alpha "
        "multiplies.",
        "total = alpha * x + update\nthe rest stays as it is",
    ),
)
class TestDeepNormResidual:
    def _check(self, student, rng, alpha, eps=1e-5, std=1.0):
        x, update = _normal(rng, 3, 5, 8, mean=0.5, std=std), _normal(rng, 3, 5, 8, std=std)
        weight, bias = _normal(rng, 8), _normal(rng, 8)
        expected = F.layer_norm(alpha * x + update, (8,), weight, bias, eps)
        got = student.deepnorm_residual(x, update, weight, bias, alpha, eps)
        expect.close(got, expected, f"the output with alpha = {alpha:.3f}")

    @points(2)
    def test_twelve_layers(self, student, rng):
        """equals DeepNorm with the alpha of 12 and of 1000 layers"""
        for num_layers in (12, 1000):
            self._check(student, rng, (2 * num_layers) ** 0.25)

    def test_takes_alpha_as_given(self, student, rng):
        """takes any alpha, below 1 as well"""
        self._check(student, rng, 0.4)

    def test_eps(self, student, rng):
        """keeps eps under the root"""
        self._check(student, rng, 2.0, eps=0.02, std=0.1)


@exercise(
    "deepnorm_plan",
    kind="estimate",
    minutes=15,
    difficulty=2,
    see="10. DeepNorm",
    hints=(
        "N counts layers; a decoder layer has two sublayers, each with its own residual connection "
        "and norm. What of all this does the optimizer change?",
        "update off by a constant factor: v^2 + w^2 is two terms. alpha off by 2^(1/4): the "
        "paper's N is layers, not sublayers. trainable slightly too large: is alpha a parameter?",
        "deepnorm: alpha = (2N)^(1/4), beta = (8N)^(-1/4);  post: 1, 1\n"
        "sublayers = 2N\n"
        "trainable = sublayers * (weight + bias of one LayerNorm)\n"
        "update = sublayers * (beta^2 + beta^2) / alpha^2",
    ),
)
class TestDeepNormPlan:
    CASES = ((12, 768), (100, 1024), (500, 64))

    def _plan(self, student, placement, num_layers, dim):
        plan = student.deepnorm_plan(placement, num_layers, dim)
        keys = ("alpha", "beta", "trainable", "update")
        expect.true(
            type(plan) is dict and sorted(plan) == sorted(keys),
            f"Return a dict with the keys {', '.join(keys)}.",
        )
        return plan

    @points(2)
    def test_constants(self, student, rng):
        """alpha and beta of the paper for 12, 100 and 500 layers"""
        published = {12: (2.213364, 0.319472), 100: (3.760603, 0.188030), 500: (5.623413, 0.125743)}
        for num_layers, dim in self.CASES:
            plan = self._plan(student, "deepnorm", num_layers, dim)
            alpha, beta = published[num_layers]
            expect.number(plan["alpha"], alpha, rel=1e-5, what=f"alpha for N = {num_layers}")
            expect.number(plan["beta"], beta, rel=1e-5, what=f"beta for N = {num_layers}")

    def test_post_ln(self, student, rng):
        """alpha and beta of Post-LN are 1"""
        plan = self._plan(student, "post", 12, 768)
        expect.number(plan["alpha"], 1.0, what="alpha of Post-LN")
        expect.number(plan["beta"], 1.0, what="beta of Post-LN")

    def test_trainable(self, student, rng):
        """counts what the optimizer may change"""
        for placement in ("post", "deepnorm"):
            for num_layers, dim in self.CASES:
                plan = self._plan(student, placement, num_layers, dim)
                expect.equal(
                    plan["trainable"], 4 * num_layers * dim, f"trainable, {placement}, {num_layers}"
                )

    @points(2)
    def test_update(self, student, rng):
        """how one step of the optimizer grows with depth"""
        for num_layers, dim in self.CASES:
            post = self._plan(student, "post", num_layers, dim)
            expect.number(post["update"], 4 * num_layers, what=f"update of Post-LN, {num_layers}")
            deep = self._plan(student, "deepnorm", num_layers, dim)
            expect.number(deep["update"], 1.0, what=f"update of DeepNorm, {num_layers}")


@exercise(
    "masked_batch_norm",
    kind="build",
    minutes=15,
    difficulty=2,
    see="7. When the batch cannot be trusted",
    hints=(
        "Choose the real positions first; then this is BatchNorm of a plain (n, C) matrix.",
        "Slightly wrong everywhere: padding counts, in the sums or in the number that divides. NaN "
        "in the output: 0 * NaN is NaN; choose by torch.where or by indexing, not by a product.",
        "real = x[is_real]                       (n, C)\n"
        "y = (real - mean over rows) / sqrt(variance over rows, by n, + eps) * weight + bias\n"
        "out = zeros shaped as x;  out[is_real] = y",
    ),
)
class TestMaskedBatchNorm:
    def _draw(self, rng, batch=3, seq_len=6, dim=4):
        x = _normal(rng, batch, seq_len, dim, mean=1.5, std=2.0)
        # Each sequence keeps its first two tokens; what follows is padding at random. The first is
        # nearly full and the second nearly empty, so that their means weigh differently.
        is_real = torch.rand(batch, seq_len, generator=rng) < 0.5
        is_real[0], is_real[1] = True, False
        is_real[:, :2], is_real[:, -1] = True, False
        return x, is_real, _normal(rng, dim), _normal(rng, dim, mean=1.0)

    def _expected(self, x, is_real, weight, bias, eps=1e-5):
        out = torch.zeros_like(x)
        out[is_real] = F.batch_norm(x[is_real], None, None, weight, bias, True, eps=eps)
        return out

    @points(2)
    def test_real_positions(self, student, rng):
        """normalises real positions by the statistics of real positions"""
        x, is_real, weight, bias = self._draw(rng)
        got = student.masked_batch_norm(x, is_real, weight, bias, 1e-5)
        expect.true(got.shape == x.shape, f"Return the shape of x, {tuple(x.shape)}.")
        expected = self._expected(x, is_real, weight, bias)
        expect.close(got[is_real], expected[is_real], "the real positions")

    def test_padding_is_zero(self, student, rng):
        """returns exact zeros at padded positions"""
        x, is_real, weight, bias = self._draw(rng)
        got = student.masked_batch_norm(x, is_real, weight, bias, 1e-5)
        expect.true(
            not got[~is_real].any(), "The padded positions of the output are not zero, as asked."
        )

    def test_no_padding(self, student, rng):
        """is plain BatchNorm where nothing is padded, also with a visible eps"""
        x, is_real, weight, bias = self._draw(rng)
        everywhere = torch.ones_like(is_real)
        for eps in (1e-5, 0.5):
            got = student.masked_batch_norm(x, everywhere, weight, bias, eps)
            expect.close(got, self._expected(x, everywhere, weight, bias, eps), f"eps={eps}")

    def test_what_padding_holds(self, student, rng):
        """does not look at what padded positions hold: thousands, or NaN"""
        x, is_real, weight, bias = self._draw(rng)
        expected = self._expected(x, is_real, weight, bias)
        for filling in (5000.0, float("nan")):
            filled = x.masked_fill(~is_real[..., None], filling)
            got = student.masked_batch_norm(filled, is_real, weight, bias, 1e-5)
            expect.close(got, expected, f"the output where padding holds {filling}")


@exercise(
    "streamed_statistics",
    kind="challenge",
    minutes=30,
    difficulty=3,
    see="11. Statistics in one pass",
    hints=(
        "For each part keep three things: how many rows, their mean, the sum of squared deviations "
        "from it. What does the sum become when two parts have different means?",
        "A variance that is too small: the distance between the means of two parts counts as well. "
        "A variance that is noise or negative: E[x^2] - E[x]^2 cancels. A memory refusal: the "
        "blocks were joined, or copied to float64.",
        "count, mean, dev = 0, 0, 0\n"
        "for block with n rows (n > 0): m = its mean, s = sum of (block - m)^2, gap = m - mean\n"
        "    dev += s + gap^2 * count * n / (count + n)\n"
        "    mean += gap * n / (count + n);  count += n\n"
        "return mean, dev / count",
    ),
)
class TestStreamedStatistics:
    def _check(self, student, blocks, atol):
        joined = torch.cat(blocks).double()
        got = student.streamed_statistics(blocks)
        expect.true(
            type(got) is tuple and len(got) == 2, "Return a tuple of two: (mean, variance)."
        )
        expect.close(got[0], joined.mean(0).float(), "the mean", atol=atol)
        expect.close(got[1], joined.var(0, correction=0).float(), "the variance", atol=atol)

    @points(2)
    def test_equal_blocks(self, student, rng):
        """mean and variance of equal blocks with different means"""
        self._check(student, [_normal(rng, 8, 4, mean=3.0 * i) for i in range(4)], 1e-4)

    @points(2)
    def test_uneven_blocks(self, student, rng):
        """blocks of different length, some empty, some of one row"""
        sizes = (1, 0, 13, 2, 0, 5)
        blocks = [_normal(rng, n, 4, mean=2.0 * i, std=1.0 + i) for i, n in enumerate(sizes)]
        self._check(student, blocks, 1e-4)

    @points(2)
    def test_large_mean(self, student, rng):
        """keeps the digits of the variance where the mean is thousands"""
        self._check(student, [_normal(rng, 24, 4, mean=8192.0) for _ in range(5)], 5e-3)

    @points(2)
    def test_memory(self, student, rng):
        """creates no tensor larger than the largest block"""
        blocks = [_normal(rng, 20, 16, mean=1.0) for _ in range(4)]
        with largest_new_tensor() as spy:
            student.streamed_statistics(blocks)
        limit = 20 * 16 * 4
        expect.true(
            spy.bytes <= limit,
            f"A tensor of {spy.bytes:,} bytes was created, shape {spy.shape}; the largest block "
            f"has {limit:,}. Read the blocks one by one, and stay in float32.",
        )

    def test_one_pass(self, student, rng):
        """reads each block once, and comes back to none"""
        blocks = [_normal(rng, 6, 3, mean=2.0 * i) for i in range(4)]
        with order_of_reads(blocks) as spy:
            student.streamed_statistics(blocks)
        again = [i for i, j in enumerate(spy.order) if j in spy.order[:i]]
        expect.true(
            not again,
            f"Blocks were read in the order {', '.join(map(str, spy.order))}: a stream passes by "
            "once. Take from each block all that you need before you go on.",
        )

    def test_one_row(self, student, rng):
        """one row has variance zero, and an empty first block is no obstacle"""
        self._check(student, [torch.empty(0, 3), _normal(rng, 1, 3, mean=5.0)], 1e-5)
