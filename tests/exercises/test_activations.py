"""Grades chapter 02: activations. Oracles: torch's kernels, autograd, float64, Llama's widths."""

import torch
import torch.nn.functional as F

from autograder import exercise, expect, points
from autograder.spies import largest_new_tensor


def _normal(rng, *shape, mean=0.0, std=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=rng, dtype=torch.float64) * std + mean).to(dtype)


def _pair(got, names):
    expect.true(type(got) is tuple and len(got) == 2, f"Return a tuple of two: {names}.")
    return got


def _keys(got, *keys):
    expect.true(
        type(got) is dict and sorted(got) == sorted(keys),
        f"Return a dict with the keys {', '.join(keys)}.",
    )
    return got


@exercise(
    "soft_cap",
    kind="build",
    minutes=15,
    difficulty=1,
    see="3. Flat means silent: sigmoid and tanh",
    hints=(
        "tanh(z) = (1 - e^-2z) / (1 + e^-2z). For which z does the exponential overflow, and what "
        "does the symmetry tanh(-z) = -tanh(z) buy you?",
        "NaN for large inputs: inf / inf; take the exponential of -2|z| only. The mirror image of "
        "the right curve: a minus sign is missing in an exponent. Slope off by a constant factor: "
        "the chain rule gives 1 / cap, and cap stands in front.",
        "z = x in float32 (or float64 if x is) / cap\n"
        "e = exp(-2 |z|)\n"
        "y = cap * sign(z) * (1 - e) / (1 + e)\n"
        "slope = 4 e / (1 + e)^2\n"
        "return both in the dtype of x",
    ),
)
class TestSoftCap:
    def _check(self, student, x, cap, which):
        (leaf,) = [x.double().requires_grad_()]
        y = cap * torch.tanh(leaf / cap)
        (slope,) = torch.autograd.grad(y.sum(), leaf)
        got = _pair(student.soft_cap(x, cap), "(y, slope)")
        expected = (y.detach(), slope)[which].to(x.dtype)
        expect.close(got[which], expected, ("y", "the slope")[which] + f" with cap = {cap}")

    @points(2)
    def test_values(self, student, rng):
        """cap * tanh(x / cap), for several caps"""
        for cap in (1.0, 30.0, 0.5):
            self._check(student, _normal(rng, 4, 9, mean=0.3 * cap, std=1.5 * cap), cap, 0)
        self._check(student, _normal(rng, 12, dtype=torch.float64), 2.0, 0)

    @points(2)
    def test_slopes(self, student, rng):
        """its slope, for several caps"""
        for cap in (1.0, 30.0, 0.5):
            self._check(student, _normal(rng, 4, 9, mean=0.3 * cap, std=1.5 * cap), cap, 1)

    def test_large_inputs(self, student, rng):
        """reaches the cap, and a slope of zero, without overflow"""
        x = torch.tensor([-1e4, -300.0, 0.0, 300.0, 1e4])
        for which in (0, 1):
            self._check(student, x, 1.0, which)

    def test_half_precision(self, student, rng):
        """computes float16 and bfloat16 in float32 and returns the dtype of x"""
        for dtype in (torch.float16, torch.bfloat16):
            x = _normal(rng, 64, std=40.0, dtype=dtype)
            for which in (0, 1):
                self._check(student, x, 30.0, which)

    def test_small_inputs(self, student, rng):
        """passes inputs much smaller than the cap, to four digits"""
        x = _normal(rng, 12, mean=0.004, std=0.001, dtype=torch.float32)
        got = _pair(student.soft_cap(x, 50.0), "(y, slope)")
        expected = (50 * torch.tanh(x.double() / 50)).float()
        expect.close(got[0], expected, "y with cap = 50.0", atol=0.0, rtol=1e-2)


@exercise(
    "gelu",
    kind="build",
    minutes=10,
    difficulty=1,
    see="5. GELU and SiLU",
    hints=(
        "Phi(x) is a small number for x = -6, and 1 + erf(...) is the difference of two numbers "
        "near 1. Which function returns 1 - erf directly?",
        "Wrong by up to 0.2 everywhere: that is SiLU, or erf without the root of 2. Wrong by 0.02 "
        "or 0.0005: an approximation. Wrong only in the tail: 1 + erf(z) = erfc(-z).",
        "wide = x in float32 (or float64 if x is)\n"
        "return (wide / 2 * erfc(-wide / sqrt(2))) in the dtype of x",
    ),
)
class TestGELU:
    def _expected(self, x):
        # log_ndtr keeps the digits of the tail; ndtr is 1 + erf and loses them, in float64 as well.
        return (x.double() * torch.special.log_ndtr(x.double()).exp()).to(x.dtype)

    @points(2)
    def test_matches_the_definition(self, student, rng):
        """equals x * Phi(x), to four digits"""
        x = _normal(rng, 6, 20, std=2.0)
        expect.close(student.gelu(x), self._expected(x))

    @points(2)
    def test_left_tail(self, student, rng):
        """keeps a relative error below 1e-4 between -8 and -3"""
        x = -3 - 5 * torch.rand(40, generator=rng)
        expect.close(student.gelu(x), self._expected(x), "the left tail", rtol=1e-4, atol=0.0)

    def test_half_precision(self, student, rng):
        """computes float16 and bfloat16 in float32 and returns the dtype of x"""
        for dtype, rtol in ((torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
            x = _normal(rng, 40, mean=-2.0, dtype=dtype).clamp(min=-2.8)
            got = student.gelu(x)
            expect.close(got, self._expected(x), f"the output in {dtype}", rtol=rtol, atol=0.0)

    def test_edges(self, student, rng):
        """takes float64, a scalar, zero, and large inputs"""
        x = _normal(rng, 30, std=2.0, dtype=torch.float64)
        expect.close(student.gelu(x), self._expected(x), "the output in float64")
        for value in (0.0, 1.3, 1e4, -1e4):
            x = torch.tensor(value)
            expect.close(student.gelu(x), self._expected(x), f"gelu({value:g})")


@exercise(
    "swish_backward",
    kind="derive",
    minutes=20,
    difficulty=2,
    see="6. The backward pass, by hand",
    hints=(
        "x stands in y twice: as the factor, and inside the sigmoid. beta stands in it once, for "
        "every element.",
        "grad_x right for small x only: the second term of the product rule. Wrong unless "
        "beta = 1: the inner derivative is beta. NaN: e^z / (1 + e^z)^2 is inf / inf; write "
        "s(z) s(-z). A shape error of grad_beta: one number for the whole tensor, so a sum.",
        "s = sigmoid(beta x);  bend = s * sigmoid(-beta x)\n"
        "grad_x = grad_y * (s + beta x bend)\n"
        "grad_beta = sum of grad_y * x^2 * bend",
    ),
)
class TestSwishBackward:
    def _check(self, student, x, grad_y, beta, which):
        beta = torch.tensor(beta, dtype=x.dtype)
        leaves = x.clone().requires_grad_(), beta.clone().requires_grad_()
        y = leaves[0] * torch.sigmoid(leaves[1] * leaves[0])
        expected = torch.autograd.grad(y, leaves, grad_y)
        got = _pair(student.swish_backward(grad_y, x, beta), "(grad_x, grad_beta)")
        name = ("grad_x", "grad_beta")[which]
        expect.close(got[which], expected[which], f"{name} with beta = {beta:g}")

    def _draw(self, rng, *shape, dtype=torch.float64):
        return _normal(rng, *shape, std=2.0, dtype=dtype), _normal(
            rng, *shape, mean=0.5, dtype=dtype
        )

    @points(2)
    def test_silu(self, student, rng):
        """grad_x with beta = 1, which is SiLU"""
        self._check(student, *self._draw(rng, 5, 6), 1.0, 0)

    @points(2)
    def test_any_beta(self, student, rng):
        """grad_x with other beta, zero and below zero as well"""
        for beta in (1.7, 0.3, 0.0, -0.8):
            self._check(student, *self._draw(rng, 5, 6), beta, 0)

    @points(2)
    def test_beta(self, student, rng):
        """grad_beta, summed over every element"""
        for beta in (1.0, 1.7, -0.8):
            self._check(student, *self._draw(rng, 2, 3, 4), beta, 1)

    def test_large_inputs(self, student, rng):
        """no NaN where beta * x is a thousand"""
        x = torch.tensor([-1000.0, -100.0, 0.0, 100.0, 1000.0])
        grad_y = _normal(rng, 5, mean=1.0)
        for which in (0, 1):
            self._check(student, x, grad_y, 1.0, which)


@exercise(
    "dead_units",
    kind="build",
    minutes=15,
    difficulty=2,
    see="4. Dead units",
    hints=(
        "A unit learns from an input where its pre-activation is positive, else not. Dead means: "
        "from none. Count, batch by batch, and divide once at the end.",
        "Too many dead units: a negative pre-activation does not kill a unit, nor does a negative "
        "mean. Shares slightly off: batches have different lengths, so a mean of means is wrong; "
        "or a pre-activation of exactly 0 was counted.",
        "count = 0 for each unit\n"
        "for each batch: count += number of rows with batch @ weight.T + bias > 0\n"
        "active_share = count / number of rows in all batches\n"
        "is_dead = count == 0",
    ),
)
class TestDeadUnits:
    def _draw(self, rng, sizes=(7, 1, 20, 3)):
        batches = [_normal(rng, n, 5, mean=0.5 * i - 1) for i, n in enumerate(sizes)]
        weight, bias = _normal(rng, 12, 5), _normal(rng, 12, mean=-1.0)
        bias[[2, 5, 9]] = torch.tensor([-1000.0, 1000.0, -500.0])  # dead, always on, dead
        return batches, weight, bias

    def _gradient(self, batches, weight, bias):
        """For each unit, how many inputs send it a gradient, by autograd."""
        x = torch.cat(batches)
        bias = bias.repeat(len(x), 1).requires_grad_()
        F.relu(x @ weight.T + bias).sum().backward()
        return (bias.grad != 0).sum(0)

    @points(2)
    def test_is_dead(self, student, rng):
        """finds the units to which autograd sends no gradient"""
        batches, weight, bias = self._draw(rng)
        got = _keys(student.dead_units(batches, weight, bias), "active_share", "is_dead")
        expect.close(got["is_dead"], self._gradient(batches, weight, bias) == 0, "is_dead")

    @points(2)
    def test_active_share(self, student, rng):
        """the share of all inputs that reach each unit"""
        batches, weight, bias = self._draw(rng)
        got = _keys(student.dead_units(batches, weight, bias), "active_share", "is_dead")
        share = self._gradient(batches, weight, bias) / sum(map(len, batches))
        expect.close(got["active_share"], share, "active_share")

    def test_one_input_is_enough(self, student, rng):
        """a unit that one input in a hundred reaches is alive"""
        x = torch.eye(100)
        weight = -torch.ones(3, 100)
        weight[1, 41] = 1.0
        got = _keys(
            student.dead_units([x[:60], x[60:]], weight, torch.zeros(3)),
            "active_share",
            "is_dead",
        )
        expect.close(got["is_dead"], torch.tensor([True, False, True]), "is_dead")
        expect.close(got["active_share"], torch.tensor([0.0, 0.01, 0.0]), "active_share")

    def test_zero(self, student, rng):
        """a pre-activation of exactly zero sends no gradient"""
        x = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, -1.0]])
        weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        got = _keys(student.dead_units([x], weight, torch.zeros(2)), "active_share", "is_dead")
        expect.close(got["is_dead"], torch.tensor([True, False]), "is_dead")
        expect.close(got["active_share"], torch.tensor([0.0, 2 / 3]), "active_share")

    def test_memory(self, student, rng):
        """does not join the batches"""
        batches = [_normal(rng, 40, 5) for _ in range(12)]
        weight, bias = _normal(rng, 8, 5), _normal(rng, 8)
        with largest_new_tensor() as spy:
            student.dead_units(batches, weight, bias)
        limit = 40 * 8 * 8
        expect.true(
            spy.bytes <= limit,
            f"A tensor of {spy.bytes:,} bytes was created, shape {spy.shape}; one batch needs "
            f"{limit:,} at most. Count batch by batch.",
        )


def _feed_forward(x, gate_up_weight, down_weight):
    half = len(gate_up_weight) // 2
    gate, up = F.linear(x, gate_up_weight[:half]), F.linear(x, gate_up_weight[half:])
    return F.linear(F.silu(gate) * up, down_weight)


def _layer(rng, num_tokens=5, model_dim=6, hidden_dim=8, dtype=torch.float64):
    return (
        _normal(rng, num_tokens, model_dim, dtype=dtype),
        _normal(rng, 2 * hidden_dim, model_dim, dtype=dtype),
        _normal(rng, model_dim, hidden_dim, dtype=dtype),
    )


@exercise(
    "fused_feed_forward",
    kind="repair",
    minutes=5,
    difficulty=1,
    see="8. One matrix for gate and up",
    hints=(
        "Which half of the product does each name get, and which half does the docstring promise?",
        "torch's F.glu(a, b joined) is a * sigmoid(b): there the gate is the second half. In Llama "
        "and Phi-3 it is the first.",
        "gate, up = the two halves, in this order\nthe rest stays as it is",
    ),
)
class TestFusedFeedForward:
    @points(2)
    def test_matches_the_separate_form(self, student, rng):
        """equals the layer with two separate matrices"""
        x, gate_up, down = _layer(rng)
        got = student.fused_feed_forward(x, gate_up, down)
        expect.close(got, _feed_forward(x, gate_up, down))

    def test_any_leading_shape(self, student, rng):
        """takes one token, and a batch of sequences"""
        _, gate_up, down = _layer(rng)
        for shape in ((6,), (2, 4, 6)):
            x = _normal(rng, *shape, dtype=torch.float64)
            got = student.fused_feed_forward(x, gate_up, down)
            expect.close(got, _feed_forward(x, gate_up, down), f"the output for {shape}")

    def test_up_is_linear(self, student, rng):
        """doubles its output when the rows of up double"""
        x, gate_up, down = _layer(rng)
        doubled = gate_up.clone()
        doubled[8:] *= 2
        got = student.fused_feed_forward(x, doubled, down)
        expect.close(got, 2 * _feed_forward(x, gate_up, down), "the output with up doubled")


@exercise(
    "feed_forward_plan",
    kind="estimate",
    minutes=10,
    difficulty=1,
    see="7. Gates",
    hints=(
        "How many matrices has a layer with a gate, how many one without? Both have equally many "
        "weights for 2/3 of the width.",
        "hidden_dim too large by 1.5: the 2/3 are missing. Off by one multiple: round up, always, "
        "and only after the multiplier. parameters off by 1.5: gate, up and down are three.",
        "h = int(2 * 4 * d / 3);  h = int(multiplier * h);  h = next multiple of multiple_of\n"
        "parameters = layers * 3 * d * h;  flops = 2 * parameters\n"
        "versus_plain = parameters / (layers * 8 d^2)",
    ),
)
class TestFeedForwardPlan:
    # model_dim, num_layers, multiplier, multiple_of, and the width in the checkpoint
    LLAMAS = (
        ("Llama 2 7B", 4096, 32, 1.0, 256, 11008),
        ("Llama 2 13B", 5120, 40, 1.0, 256, 13824),
        ("Llama 1 65B", 8192, 80, 1.0, 256, 22016),
        ("Llama 2 70B", 8192, 80, 1.3, 4096, 28672),
        ("Llama 3 8B", 4096, 32, 1.3, 1024, 14336),
        ("Llama 3.1 405B", 16384, 126, 1.2, 4096, 53248),
    )
    KEYS = ("hidden_dim", "parameters", "flops_per_token", "versus_plain")

    def _plans(self, student):
        for name, dim, layers, multiplier, multiple, width in self.LLAMAS:
            plan = _keys(student.feed_forward_plan(dim, layers, multiplier, multiple), *self.KEYS)
            yield name, plan, dim, layers, width

    @points(2)
    def test_widths(self, student, rng):
        """the hidden width of six published Llamas"""
        for name, plan, _, _, width in self._plans(student):
            expect.equal(plan["hidden_dim"], width, f"hidden_dim of {name}")

    def test_exact_multiple(self, student, rng):
        """a width that is a multiple already stays as it is"""
        plan = _keys(student.feed_forward_plan(96, 2, 1.0, 64), *self.KEYS)
        expect.equal(plan["hidden_dim"], 256, "hidden_dim of model_dim = 96, multiple_of = 64")

    def test_parameters(self, student, rng):
        """the weights of all layers"""
        for name, plan, dim, layers, width in self._plans(student):
            expect.equal(plan["parameters"], 3 * layers * dim * width, f"parameters of {name}")

    def test_flops(self, student, rng):
        """the FLOPs of one token"""
        for name, plan, dim, layers, width in self._plans(student):
            flops = 6 * layers * dim * width
            expect.equal(plan["flops_per_token"], flops, f"flops_per_token of {name}")

    def test_versus_plain(self, student, rng):
        """how many plain layers' weights that is"""
        for name, plan, dim, _, width in self._plans(student):
            ratio = 3 * width / (8 * dim)
            expect.number(plan["versus_plain"], ratio, what=f"versus_plain of {name}")


@exercise(
    "shard_gate_up",
    kind="build",
    minutes=20,
    difficulty=2,
    see="8. One matrix for gate and up",
    hints=(
        "A hidden unit is one row of gate, one row of up, and one column of down. All three must "
        "go to the same device.",
        "Right shapes, wrong sum: rows cut from the packed matrix in one piece give device 0 gates "
        "without ups. Off by a factor: the outputs are added, so nothing is divided.",
        "gate, up = the two halves of the rows\n"
        "for r: units = range r of F / world_size\n"
        "    shard = rows `units` of gate, then rows `units` of up;  columns `units` of down",
    ),
)
class TestShardGateUp:
    def _shards(self, student, gate_up, down, world_size):
        shards = student.shard_gate_up(gate_up, down, world_size)
        expect.true(
            type(shards) is list
            and len(shards) == world_size
            and all(type(s) is tuple and len(s) == 2 for s in shards),
            f"Return a list of {world_size} tuples (gate_up_shard, down_shard).",
        )
        return shards

    @points(2)
    def test_shards_are_the_right_units(self, student, rng):
        """device r holds gate, up and down of the r-th range of units"""
        _, gate_up, down = _layer(rng, hidden_dim=12)
        for world_size in (1, 2, 3):
            width = 12 // world_size
            expected = []
            for r in range(world_size):
                units = [*range(r * width, (r + 1) * width)]
                rows = units + [12 + unit for unit in units]
                expected.append((gate_up[rows], down[:, units]))
            got = self._shards(student, gate_up, down, world_size)
            expect.close(got, expected, f"the shards for {world_size}")

    @points(2)
    def test_outputs_add_up(self, student, rng):
        """the shards' outputs add up to the layer's"""
        x, gate_up, down = _layer(rng, hidden_dim=8)
        for world_size in (2, 4, 8):
            shards = self._shards(student, gate_up, down, world_size)
            for g, d in shards:
                expect.true(
                    g.shape == (16 // world_size, 6) and d.shape == (6, 8 // world_size),
                    f"A shard of {world_size} has shapes {tuple(g.shape)} and {tuple(d.shape)}; "
                    f"expected {(16 // world_size, 6)} and {(6, 8 // world_size)}.",
                )
            total = sum(_feed_forward(x, g, d) for g, d in shards)
            expect.close(total, _feed_forward(x, gate_up, down), f"the sum of {world_size}")

    def test_uneven(self, student, rng):
        """refuses a number of devices that does not divide the width"""
        _, gate_up, down = _layer(rng, hidden_dim=8)
        for world_size in (3, 16):
            expect.raises(
                ValueError,
                lambda n=world_size: student.shard_gate_up(gate_up, down, n),
                f"8 hidden units on {world_size} devices",
            )


@exercise(
    "tiled_feed_forward",
    kind="challenge",
    minutes=35,
    difficulty=3,
    see="9. What backward keeps",
    hints=(
        "Tokens do not meet in a feed-forward layer. So a tile can do its forward and its backward "
        "at once and forget its hidden activations. What do all tiles share?",
        "Weight gradients of the last tile only: they must be added up, not replaced. Missing "
        "tokens: the last tile may be short. A memory refusal: something has all T tokens and the "
        "hidden width.",
        "for each tile: gate, up = halves of x W_gu^T;  s = sigmoid(gate);  h = gate s up\n"
        "    y = h W_d^T;  grad_down += grad_y^T h;  gh = grad_y W_d\n"
        "    both = [gh up s (1 + gate (1 - s)),  gh gate s]\n"
        "    grad_gate_up += both^T x;  grad_x = both W_gu",
    ),
)
class TestTiledFeedForward:
    KEYS = ("y", "grad_x", "grad_gate_up", "grad_down")

    def _check(self, student, rng, num_tokens, tile, keys, dtype=torch.float64):
        x, gate_up, down = _layer(rng, num_tokens, 5, 7, dtype=dtype)
        grad_y = _normal(rng, num_tokens, 5, mean=0.3, dtype=dtype)
        leaves = [t.clone().requires_grad_() for t in (x, gate_up, down)]
        y = _feed_forward(*leaves)
        grads = torch.autograd.grad(y, leaves, grad_y)
        expected = dict(zip(self.KEYS, (y.detach(), *grads), strict=True))
        got = student.tiled_feed_forward(x, gate_up, down, grad_y, tile)
        got = _keys(got, *self.KEYS)
        for key in keys:
            expect.close(got[key], expected[key], f"{key} of {num_tokens} tokens, tile {tile}")

    def test_forward(self, student, rng):
        """y, also with a short last tile"""
        for num_tokens, tile in ((6, 6), (6, 3), (7, 3)):
            self._check(student, rng, num_tokens, tile, ("y",))

    @points(2)
    def test_gradient_of_x(self, student, rng):
        """grad_x"""
        for num_tokens, tile in ((6, 6), (6, 2), (7, 3)):
            self._check(student, rng, num_tokens, tile, ("grad_x",))

    @points(2)
    def test_gradients_of_one_tile(self, student, rng):
        """the weights' gradients, all tokens in one tile"""
        self._check(student, rng, 6, 6, ("grad_gate_up", "grad_down"))

    @points(2)
    def test_gradients_of_many_tiles(self, student, rng):
        """the weights' gradients over several tiles"""
        for num_tokens, tile in ((6, 2), (7, 3), (5, 1)):
            self._check(student, rng, num_tokens, tile, ("grad_gate_up", "grad_down"))

    def test_edges(self, student, rng):
        """a tile larger than the input, and float32"""
        self._check(student, rng, 3, 100, self.KEYS)
        self._check(student, rng, 5, 2, self.KEYS, dtype=torch.float32)

    @points(2)
    def test_memory(self, student, rng):
        """never holds the hidden activations of all tokens"""
        x, gate_up, down = _layer(rng, 64, 8, 32, dtype=torch.float32)
        grad_y = _normal(rng, 64, 8)
        with largest_new_tensor() as spy:
            student.tiled_feed_forward(x, gate_up, down, grad_y, 8)
        limit = 4 * max(64 * 8, 2 * 32 * 8, 8 * 2 * 32)
        expect.true(
            spy.bytes <= limit,
            f"A tensor of {spy.bytes:,} bytes was created, shape {spy.shape}; {limit:,} are "
            "allowed. Each tile does its forward and its backward, and forgets.",
        )
