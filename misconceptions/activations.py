"""Chapter 02: wrong answers that people give, and right ones in another form."""

import math

import torch
import torch.nn.functional as F

from autograder import alternative, misconception

SATURATION = "3. Flat means silent: sigmoid and tanh"
DEAD = "4. Dead units"
SMOOTH = "5. GELU and SiLU"
BACKWARD = "6. The backward pass, by hand"
GATES = "7. Gates"
FUSED = "8. One matrix for gate and up"
KEPT = "9. What backward keeps"


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# soft_cap


def _soft_cap(x, cap, *, tanh=torch.tanh, slope=lambda t, cap: 1 - t * t):
    t = tanh(_wide(x) / cap)
    return (cap * t).to(x.dtype), slope(t, cap).to(x.dtype)


@misconception(
    "soft_cap",
    "Your curve is the mirror image of tanh: a minus sign is missing in an exponent. "
    "tanh(z) = (1 - e^-2z) / (1 + e^-2z), which grows with z.",
    see=SATURATION,
)
def forgets_the_minus_sign_in_the_exponent(x, cap):
    return _soft_cap(x, cap, tanh=lambda z: torch.tanh(-z))


@misconception(
    "soft_cap",
    "Your exponential overflows: (e^z - e^-z) / (e^z + e^-z) is inf / inf, NaN, from |z| = 89 on "
    "in float32. Take the exponential of -2|z|, which is never above 1, and put the sign back.",
    see=SATURATION,
)
def overflows_for_large_inputs(x, cap):
    def tanh(z):
        return (z.exp() - (-z).exp()) / (z.exp() + (-z).exp())

    return _soft_cap(x, cap, tanh=tanh)


@misconception(
    "soft_cap",
    "Your slope is cap times too small. The chain rule gives 1 / cap for the inside, and the cap "
    "in front takes it away again: at 0 the slope is 1.",
    see=SATURATION,
)
def divides_the_slope_by_the_cap(x, cap):
    return _soft_cap(x, cap, slope=lambda t, cap: (1 - t * t) / cap)


@misconception(
    "soft_cap",
    "Your slope is that of the sigmoid, s (1 - s), at most 1/4. tanh is a sigmoid stretched by 2 "
    "both ways, and its slope is 1 at 0: 1 - tanh^2.",
    see=SATURATION,
)
def takes_the_slope_of_the_sigmoid(x, cap):
    return _soft_cap(x, cap, slope=lambda t, cap: (1 + t) / 2 * (1 - t) / 2)


@misconception(
    "soft_cap",
    "Your slope takes the square of the capped value. 1 - tanh^2 is about the tanh itself, before "
    "the cap multiplies it.",
    see=SATURATION,
)
def squares_the_capped_value(x, cap):
    return _soft_cap(x, cap, slope=lambda t, cap: 1 - (cap * t) ** 2)


@misconception(
    "soft_cap",
    "You clip at the cap. A soft cap bends long before it: clipping has slope 0 beyond the cap, so "
    "that those values can never learn their way back.",
    see=SATURATION,
)
def clips_hard(x, cap):
    return x.clamp(-cap, cap), (x.abs() < cap).to(x.dtype)


@misconception(
    "soft_cap",
    "Your input is not divided by the cap, so small values come out cap times too large. The cap "
    "stands in two places: x / cap goes in, cap * tanh comes out.",
    see=SATURATION,
)
def forgets_to_divide_by_the_cap(x, cap):
    t = torch.tanh(_wide(x))
    return (cap * t).to(x.dtype), (cap * (1 - t * t)).to(x.dtype)


@misconception(
    "soft_cap",
    "The sign is lost: after the exponential of -2|z| every value comes out positive. tanh is odd, "
    "so put the sign of x back.",
    see=SATURATION,
)
def loses_the_sign(x, cap):
    return _soft_cap(x, cap, tanh=lambda z: torch.tanh(z).abs())


@misconception(
    "soft_cap",
    "float64 input is computed in float32. Half precision is to be widened, nothing narrowed: "
    "torch.promote_types(x.dtype, torch.float32).",
    see=SATURATION,
)
def narrows_float64(x, cap):
    t = torch.tanh(x.float() / cap)
    return (cap * t).to(x.dtype), (1 - t * t).to(x.dtype)


@alternative("soft_cap")
def by_the_sigmoid(x, cap):
    z = _wide(x) / cap
    s, mirrored = torch.sigmoid(2 * z), torch.sigmoid(-2 * z)
    return (cap * (s - mirrored)).to(x.dtype), (4 * s * mirrored).to(x.dtype)


@alternative("soft_cap")
def by_torchs_tanh(x, cap):
    return _soft_cap(x, cap)


@alternative("soft_cap")
def by_two_branches(x, cap):
    z = _wide(x) / cap
    e = torch.exp(torch.where(z > 0, -2 * z, 2 * z))
    t = torch.where(z > 0, 1 - e, e - 1) / (1 + e)
    return (t * cap).to(x.dtype), (1 - t.square()).to(x.dtype)


# gelu


@misconception(
    "gelu",
    "Your result is x * sigmoid(x), which is SiLU (Swish with beta = 1). GELU weighs x by the "
    "normal distribution: they differ by up to 0.2.",
    see=SMOOTH,
)
def takes_sigmoid_of_x(x):
    return F.silu(x)


@misconception(
    "gelu",
    "Your result is x * sigmoid(1.702 x), which is Swish with another beta: the coarser of GELU's "
    "two approximations, wrong by up to 0.02.",
    see=SMOOTH,
)
def takes_swish_for_gelu(x):
    wide = _wide(x)
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


@misconception(
    "gelu",
    "Your result is the tanh approximation. It is close, to 0.0005, but the exact form was asked "
    "for, and in the left tail the approximation has no right digit.",
    see=SMOOTH,
)
def approximates_by_tanh(x):
    return F.gelu(_wide(x), approximate="tanh").to(x.dtype)


@misconception(
    "gelu",
    "You take erf(x) without the root: Phi(x) = (1 + erf(x / sqrt(2))) / 2. erf is made for a "
    "normal distribution of variance 1/2.",
    see=SMOOTH,
)
def forgets_the_root_of_two(x):
    wide = _wide(x)
    return (0.5 * wide * torch.erfc(-wide)).to(x.dtype)


@misconception(
    "gelu",
    "You multiply by the density of the normal distribution. GELU multiplies by the distribution "
    "function Phi, the share BELOW x; the density is its slope.",
    see=SMOOTH,
)
def multiplies_by_the_density(x):
    wide = _wide(x)
    return (wide * torch.exp(-wide * wide / 2) / math.sqrt(2 * math.pi)).to(x.dtype)


@misconception(
    "gelu",
    "Right but for the tail: 1 + erf(...) is the difference of two numbers near 1, and cancels. "
    "torch.erfc(z) is 1 - erf(z) with all its digits.",
    see=SMOOTH,
)
def cancels_in_the_tail(x):
    wide = _wide(x)
    return (0.5 * wide * (1 + torch.erf(wide / math.sqrt(2)))).to(x.dtype)


@misconception(
    "gelu",
    "The result is float32 for half-precision input. Compute in float32, then return to the dtype "
    "of x.",
    see=SMOOTH,
)
def returns_float32(x):
    wide = _wide(x)
    return 0.5 * wide * torch.erfc(-wide / math.sqrt(2))


@alternative("gelu")
def by_the_logarithm_of_phi(x):
    return (_wide(x) * torch.special.log_ndtr(_wide(x)).exp()).to(x.dtype)


@alternative("gelu")
def through_float64(x):
    wide = x.double()
    return (wide * torch.erfc(wide * -math.sqrt(0.5)) / 2).to(x.dtype)


# swish_backward


def _bend(x, beta):
    return torch.sigmoid(beta * x) * torch.sigmoid(-beta * x)


def _beta_gradient(grad_y, x, beta):
    return (grad_y * x * x * _bend(x, beta)).sum()


@misconception(
    "swish_backward",
    "Your grad_x has the first half of the product rule only. x stands inside the sigmoid as well: "
    "slope = s + beta x s (1 - s).",
    see=BACKWARD,
)
def forgets_that_x_is_in_the_sigmoid(grad_y, x, beta):
    return grad_y * torch.sigmoid(beta * x), _beta_gradient(grad_y, x, beta)


@misconception(
    "swish_backward",
    "The inner derivative is missing: d/dx sigmoid(beta x) = beta s (1 - s). With beta = 1 nobody "
    "notices.",
    see=BACKWARD,
)
def forgets_the_inner_beta(grad_y, x, beta):
    slope = torch.sigmoid(beta * x) + x * _bend(x, beta)
    return grad_y * slope, _beta_gradient(grad_y, x, beta)


@misconception(
    "swish_backward",
    "Your grad_x is GELU's, Phi(x) + x phi(x). Swish is not GELU: its weight is a sigmoid, and its "
    "slope s + beta x s (1 - s).",
    see=BACKWARD,
)
def takes_gelus_slope(grad_y, x, beta):
    slope = torch.special.ndtr(x) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return grad_y * slope, _beta_gradient(grad_y, x, beta)


@misconception(
    "swish_backward",
    "Your grad_x is ReLU's: 1 where x > 0, else 0. Swish has a slope left of zero too, and even a "
    "negative one.",
    see=BACKWARD,
)
def takes_relus_slope(grad_y, x, beta):
    return grad_y * (x > 0), _beta_gradient(grad_y, x, beta)


@misconception(
    "swish_backward",
    "Your grad_beta has x once. The inner derivative of sigmoid(beta x) by beta is x, and x stands "
    "in front already: x^2 s (1 - s).",
    see=BACKWARD,
)
def counts_x_once_for_beta(grad_y, x, beta):
    bend = _bend(x, beta)
    grad_x = grad_y * (torch.sigmoid(beta * x) + beta * x * bend)
    return grad_x, (grad_y * x * bend).sum()


@misconception(
    "swish_backward",
    "Your grad_beta is one number for each element. One beta serves them all, so their "
    "contributions are added up.",
    see=BACKWARD,
)
def does_not_sum_for_beta(grad_y, x, beta):
    bend = _bend(x, beta)
    grad_x = grad_y * (torch.sigmoid(beta * x) + beta * x * bend)
    return grad_x, grad_y * x * x * bend


@misconception(
    "swish_backward",
    "NaN for large inputs: e^-z / (1 + e^-z)^2 is inf / inf. 1 - s is sigmoid(-z), so the product "
    "s(z) s(-z) has no large number in it.",
    see=SATURATION,
)
def overflows_in_the_slope(grad_y, x, beta):
    decay = torch.exp(-beta * x)
    share, bend = 1 / (1 + decay), decay / (1 + decay) ** 2
    return grad_y * (share + beta * x * bend), (grad_y * x * x * bend).sum()


@misconception(
    "swish_backward",
    "You differentiate SiLU: beta is nowhere in your answer. It stands inside the sigmoid, and "
    "before the second term of the slope.",
    see=BACKWARD,
)
def takes_beta_for_one(grad_y, x, beta):
    bend = _bend(x, 1)
    return grad_y * (torch.sigmoid(x) + x * bend), (grad_y * x * x * bend).sum()


@alternative("swish_backward")
def from_the_output(grad_y, x, beta):
    share = torch.sigmoid(beta * x)
    y = x * share
    slope = share + beta * y * (1 - share)
    return grad_y * slope, torch.einsum("i,i->", grad_y.flatten(), (x * y * (1 - share)).flatten())


@alternative("swish_backward")
def by_the_hyperbolic_tangent(grad_y, x, beta):
    t = torch.tanh(beta * x / 2)
    bend = (1 - t * t) / 4
    return grad_y * ((1 + t) / 2 + beta * x * bend), torch.sum(grad_y * x**2 * bend)


# dead_units


def _pre(batches, weight, bias):
    return [F.linear(batch, weight, bias) for batch in batches]


def _count(batches, weight, bias):
    return sum((pre > 0).sum(0) for pre in _pre(batches, weight, bias))


def _share(batches, weight, bias):
    return _count(batches, weight, bias).float() / sum(map(len, batches))


@misconception(
    "dead_units",
    "You call a unit dead when SOME input does not reach it. ReLU blocks the gradient only where "
    "x < 0; such a unit learns from all other inputs. Dead is one that NO input reaches.",
    see=DEAD,
)
def calls_a_unit_dead_for_one_negative_input(batches, weight, bias):
    share = _share(batches, weight, bias)
    return {"active_share": share, "is_dead": share < 1}


@misconception(
    "dead_units",
    "You call a unit dead when its mean pre-activation is negative. A unit may be negative on "
    "average and learn from its few positive inputs: that is what a selective unit does.",
    see=DEAD,
)
def judges_by_the_mean(batches, weight, bias):
    mean = sum(pre.sum(0) for pre in _pre(batches, weight, bias))
    return {"active_share": _share(batches, weight, bias), "is_dead": mean < 0}


@misconception(
    "dead_units",
    "You average the shares of the batches. They have different length: count inputs, and divide "
    "once, by all of them.",
    see=DEAD,
)
def averages_over_batches(batches, weight, bias):
    shares = [(pre > 0).float().mean(0) for pre in _pre(batches, weight, bias)]
    return {
        "active_share": sum(shares) / len(shares),
        "is_dead": _count(batches, weight, bias) == 0,
    }


@misconception(
    "dead_units",
    "You look at the last batch only. A unit that earlier batches reach is not dead.",
    see=DEAD,
)
def looks_at_the_last_batch(batches, weight, bias):
    share = _share(batches[-1:], weight, bias)
    return {"active_share": share, "is_dead": share == 0}


@misconception(
    "dead_units",
    "You count a unit dead when it is silent on a whole batch. Silence has to last over all "
    "batches.",
    see=DEAD,
)
def calls_a_unit_dead_for_one_silent_batch(batches, weight, bias):
    silent = [~(pre > 0).any(0) for pre in _pre(batches, weight, bias)]
    return {"active_share": _share(batches, weight, bias), "is_dead": sum(silent) > 0}


@misconception(
    "dead_units",
    "You count a pre-activation of exactly 0 as active. ReLU's slope there is 0, in torch as here: "
    "no gradient passes.",
    see=DEAD,
)
def counts_zero_as_active(batches, weight, bias):
    count = sum((pre >= 0).sum(0) for pre in _pre(batches, weight, bias))
    return {"active_share": count.float() / sum(map(len, batches)), "is_dead": count == 0}


@misconception(
    "dead_units",
    "The answers are right, but you joined the batches. Only counts need to outlive a batch.",
    see=DEAD,
)
def joins_the_batches(batches, weight, bias):
    active = F.linear(torch.cat(batches), weight, bias) > 0
    return {"active_share": active.float().mean(0), "is_dead": ~active.any(0)}


@misconception(
    "dead_units",
    "Your share is the mean of relu(x), a size. How often a unit is positive was asked for, not by "
    "how much: count.",
    see=DEAD,
)
def averages_the_activations(batches, weight, bias):
    total = sum(F.relu(pre).sum(0) for pre in _pre(batches, weight, bias))
    return {"active_share": total / sum(map(len, batches)), "is_dead": total == 0}


@alternative("dead_units")
def by_the_largest_preactivation(batches, weight, bias):
    top = torch.full_like(bias, -math.inf)
    seen, total = torch.zeros_like(bias), 0
    for pre in _pre(batches, weight, bias):
        top = torch.maximum(top, pre.amax(0))
        seen, total = seen + (pre > 0).float().sum(0), total + len(pre)
    return {"active_share": seen / total, "is_dead": top <= 0}


@alternative("dead_units")
def row_by_row(batches, weight, bias):
    count, total = torch.zeros(len(bias)), 0
    for batch in batches:
        for row in batch:
            count += torch.heaviside(weight @ row + bias, torch.zeros(()))
            total += 1
    return {"active_share": count / total, "is_dead": ~count.bool()}


# fused_feed_forward


def _halves(x, gate_up_weight):
    return F.linear(x, gate_up_weight).chunk(2, dim=-1)


@misconception(
    "fused_feed_forward",
    "The program is as it came. F.glu and Llama agree on the products; do they agree on the order?",
    see=FUSED,
    is_starter=True,
)
def activates_up(x, gate_up_weight, down_weight):
    gate, up = _halves(x, gate_up_weight)
    return F.linear(gate * F.silu(up), down_weight)


@misconception(
    "fused_feed_forward",
    "The activation is on both branches. Only the gate is bent; up stays linear, so that a hidden "
    "unit can be of any size and sign.",
    see=GATES,
)
def activates_both(x, gate_up_weight, down_weight):
    gate, up = _halves(x, gate_up_weight)
    return F.linear(F.silu(gate) * F.silu(up), down_weight)


@misconception(
    "fused_feed_forward",
    "Your gate is a plain sigmoid: that is GLU. SwiGLU's gate is silu(g) = g * sigmoid(g).",
    see=GATES,
)
def gates_by_the_sigmoid(x, gate_up_weight, down_weight):
    gate, up = _halves(x, gate_up_weight)
    return F.linear(torch.sigmoid(gate) * up, down_weight)


@misconception(
    "fused_feed_forward",
    "Your gate is GELU's: that is GEGLU. SwiGLU's gate is silu.",
    see=GATES,
)
def gates_by_gelu(x, gate_up_weight, down_weight):
    gate, up = _halves(x, gate_up_weight)
    return F.linear(F.gelu(gate) * up, down_weight)


@misconception(
    "fused_feed_forward",
    "You take every other row for the gate. Some checkpoints are stored so; here all rows of gate "
    "come first, then all rows of up.",
    see=FUSED,
)
def reads_the_rows_interleaved(x, gate_up_weight, down_weight):
    both = F.linear(x, gate_up_weight)
    return F.linear(F.silu(both[..., ::2]) * both[..., 1::2], down_weight)


@misconception(
    "fused_feed_forward",
    "You activate after the product. silu(gate * up) is not silu(gate) * up: the curve is on the "
    "gate alone.",
    see=GATES,
)
def activates_the_product(x, gate_up_weight, down_weight):
    gate, up = _halves(x, gate_up_weight)
    return F.linear(F.silu(gate * up), down_weight)


@alternative("fused_feed_forward")
def with_two_matrices(x, gate_up_weight, down_weight):
    width = down_weight.shape[1]
    gate, up = x @ gate_up_weight[:width].T, x @ gate_up_weight[width:].T
    return (gate * torch.sigmoid(gate) * up) @ down_weight.T


@alternative("fused_feed_forward")
def by_einsum(x, gate_up_weight, down_weight):
    both = torch.einsum("...d,gfd->g...f", x, gate_up_weight.unflatten(0, (2, -1)))
    return torch.einsum("...f,df->...d", F.silu(both[0]) * both[1], down_weight)


# feed_forward_plan


def _plan(model_dim, num_layers, hidden_dim, *, matrices=3, flops=2):
    parameters = num_layers * matrices * model_dim * hidden_dim
    return {
        "hidden_dim": hidden_dim,
        "parameters": parameters,
        "flops_per_token": flops * parameters,
        "versus_plain": parameters / (8 * num_layers * model_dim**2),
    }


def _two_thirds(model_dim, multiplier):
    return int(multiplier * int(8 * model_dim / 3))


def _round_up(width, multiple_of):
    return -(-width // multiple_of) * multiple_of


@misconception(
    "feed_forward_plan",
    "Your layer keeps the width 4 d. A third matrix at that width makes it half as large again; "
    "SwiGLU takes 2/3 of it, which leaves the number of weights as it was.",
    see=GATES,
)
def keeps_four_times_the_width(model_dim, num_layers, multiplier, multiple_of):
    width = _round_up(int(multiplier * 4 * model_dim), multiple_of)
    return _plan(model_dim, num_layers, width)


@misconception(
    "feed_forward_plan",
    "You round down. Llama rounds up to the next multiple.",
    see=GATES,
)
def rounds_down(model_dim, num_layers, multiplier, multiple_of):
    width = _two_thirds(model_dim, multiplier) // multiple_of * multiple_of
    return _plan(model_dim, num_layers, width)


@misconception(
    "feed_forward_plan",
    "You add a multiple even where the width is one already. Round up to the next multiple only "
    "where something is left over.",
    see=GATES,
)
def always_adds_a_multiple(model_dim, num_layers, multiplier, multiple_of):
    width = (_two_thirds(model_dim, multiplier) // multiple_of + 1) * multiple_of
    return _plan(model_dim, num_layers, width)


@misconception(
    "feed_forward_plan",
    "You round before the multiplier. First 2/3, then the multiplier, and the rounding last, so "
    "that the width is a multiple in the end.",
    see=GATES,
)
def rounds_before_the_multiplier(model_dim, num_layers, multiplier, multiple_of):
    width = int(multiplier * _round_up(_two_thirds(model_dim, 1.0), multiple_of))
    return _plan(model_dim, num_layers, width)


@misconception(
    "feed_forward_plan",
    "The multiplier is ignored. The larger Llamas widen their feed-forward layers by 1.2 or 1.3 on "
    "top of the 2/3 rule.",
    see=GATES,
)
def ignores_the_multiplier(model_dim, num_layers, multiplier, multiple_of):
    width = _round_up(_two_thirds(model_dim, 1.0), multiple_of)
    return _plan(model_dim, num_layers, width)


@misconception(
    "feed_forward_plan",
    "You count two matrices. A layer with a gate has three: gate, up and down.",
    see=GATES,
)
def counts_two_matrices(model_dim, num_layers, multiplier, multiple_of):
    width = _round_up(_two_thirds(model_dim, multiplier), multiple_of)
    return _plan(model_dim, num_layers, width, matrices=2)


@misconception(
    "feed_forward_plan",
    "You count a multiplication and its addition as one FLOP. By the field's convention they are "
    "two: 2 FLOPs a weight and token.",
    see=GATES,
)
def counts_one_flop_a_weight(model_dim, num_layers, multiplier, multiple_of):
    width = _round_up(_two_thirds(model_dim, multiplier), multiple_of)
    return _plan(model_dim, num_layers, width, flops=1)


@misconception(
    "feed_forward_plan",
    "You round to the nearest multiple. Llama rounds up, always, so that the layer is never "
    "smaller than the 2/3 rule asks.",
    see=GATES,
)
def rounds_to_the_nearest(model_dim, num_layers, multiplier, multiple_of):
    width = round(_two_thirds(model_dim, multiplier) / multiple_of) * multiple_of
    return _plan(model_dim, num_layers, width)


@alternative("feed_forward_plan")
def by_metas_formula(model_dim, num_layers, multiplier, multiple_of):
    width = int(multiplier * int(2 * (4 * model_dim) / 3))
    width = multiple_of * ((width + multiple_of - 1) // multiple_of)
    return _plan(model_dim, num_layers, width)


@alternative("feed_forward_plan")
def by_whole_numbers(model_dim, num_layers, multiplier, multiple_of):
    width = math.floor(multiplier * (8 * model_dim // 3))
    width += -width % multiple_of
    plan = _plan(model_dim, num_layers, width)
    return {**plan, "versus_plain": 3 * width / (8 * model_dim)}


# shard_gate_up


def _check_world_size(hidden_dim, world_size):
    if hidden_dim % world_size:
        raise ValueError(f"world_size: expected a divisor of {hidden_dim}, got {world_size}")


@misconception(
    "shard_gate_up",
    "You cut the packed matrix in one piece. With two devices the first then holds all gates and "
    "no up, the second all ups. Cut gate and up apart, then pack each device's own rows.",
    see=FUSED,
)
def cuts_the_packed_rows(gate_up_weight, down_weight, world_size):
    _check_world_size(down_weight.shape[1], world_size)
    rows = gate_up_weight.chunk(world_size)
    return list(zip(rows, down_weight.chunk(world_size, dim=1), strict=True))


@misconception(
    "shard_gate_up",
    "The rows of up stand first in your shards. A shard is a fused layer of its own: gate first.",
    see=FUSED,
)
def packs_up_first(gate_up_weight, down_weight, world_size):
    _check_world_size(down_weight.shape[1], world_size)
    gate, up = (half.chunk(world_size) for half in gate_up_weight.chunk(2))
    rows = [torch.cat((u, g)) for g, u in zip(gate, up, strict=True)]
    return list(zip(rows, down_weight.chunk(world_size, dim=1), strict=True))


@misconception(
    "shard_gate_up",
    "Your shards interleave the rows of gate and up. All rows of gate come first, then all of up.",
    see=FUSED,
)
def interleaves_the_rows(gate_up_weight, down_weight, world_size):
    _check_world_size(down_weight.shape[1], world_size)
    gate, up = (half.chunk(world_size) for half in gate_up_weight.chunk(2))
    rows = [torch.stack((g, u), 1).flatten(0, 1) for g, u in zip(gate, up, strict=True)]
    return list(zip(rows, down_weight.chunk(world_size, dim=1), strict=True))


@misconception(
    "shard_gate_up",
    "Device r gets every world_size-th unit in your answer. The sum is right, but ranges were "
    "asked for: a contiguous piece can be read from a checkpoint without reading all of it.",
    see=FUSED,
)
def deals_units_like_cards(gate_up_weight, down_weight, world_size):
    _check_world_size(down_weight.shape[1], world_size)
    gate, up = gate_up_weight.chunk(2)
    return [
        (torch.cat((gate[r::world_size], up[r::world_size])), down_weight[:, r::world_size])
        for r in range(world_size)
    ]


@misconception(
    "shard_gate_up",
    "You divide the down projection by the number of devices. The outputs are partial sums over "
    "different hidden units, not copies of one result: they are added as they are.",
    see=FUSED,
)
def averages_the_outputs(gate_up_weight, down_weight, world_size):
    _check_world_size(down_weight.shape[1], world_size)
    gate, up = (half.chunk(world_size) for half in gate_up_weight.chunk(2))
    rows = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
    columns = (down_weight / world_size).chunk(world_size, dim=1)
    return list(zip(rows, columns, strict=True))


@misconception(
    "shard_gate_up",
    "A width that the devices do not divide is cut unevenly, or units are lost. That must be a "
    "ValueError: devices of different work wait for the slowest.",
    see=FUSED,
)
def cuts_unevenly(gate_up_weight, down_weight, world_size):
    gate, up = (half.tensor_split(world_size) for half in gate_up_weight.chunk(2))
    rows = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
    return list(zip(rows, down_weight.tensor_split(world_size, dim=1), strict=True))


@misconception(
    "shard_gate_up",
    "You cut the rows of down. Its rows are the outputs, which every device adds to; the hidden "
    "units are its columns.",
    see=FUSED,
)
def cuts_the_rows_of_down(gate_up_weight, down_weight, world_size):
    _check_world_size(down_weight.shape[1], world_size)
    gate, up = (half.chunk(world_size) for half in gate_up_weight.chunk(2))
    rows = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
    return list(zip(rows, down_weight.tensor_split(world_size), strict=True))


@alternative("shard_gate_up")
def by_reshaping(gate_up_weight, down_weight, world_size):
    _check_world_size(down_weight.shape[1], world_size)
    rows = gate_up_weight.unflatten(0, (2, world_size, -1)).transpose(0, 1).flatten(1, 2)
    return list(zip(rows.unbind(), down_weight.chunk(world_size, dim=1), strict=True))


@alternative("shard_gate_up")
def by_index_lists(gate_up_weight, down_weight, world_size):
    hidden_dim = down_weight.shape[1]
    _check_world_size(hidden_dim, world_size)
    shards = []
    for units in torch.arange(hidden_dim).split(hidden_dim // world_size):
        rows = torch.cat((units, units + hidden_dim))
        shards.append((gate_up_weight.index_select(0, rows), down_weight.index_select(1, units)))
    return shards


# tiled_feed_forward


def _silu_slope(gate):
    share = torch.sigmoid(gate)
    return share * (1 + gate * (1 - share))


def _tiled(x, gate_up, down, grad_y, starts, tile, *, slope=_silu_slope, gather=torch.add):
    y, grad_x = torch.zeros_like(x), torch.zeros_like(x)
    grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    for start in starts:
        here = slice(start, start + tile)
        gate, up = F.linear(x[here], gate_up).chunk(2, dim=-1)
        hidden = F.silu(gate) * up
        y[here] = F.linear(hidden, down)
        grad_down = gather(grad_down, grad_y[here].T @ hidden)
        grad_hidden = grad_y[here] @ down
        both = torch.cat((grad_hidden * up * slope(gate), grad_hidden * F.silu(gate)), -1)
        grad_gate_up = gather(grad_gate_up, both.T @ x[here])
        grad_x[here] = both @ gate_up
    return {"y": y, "grad_x": grad_x, "grad_gate_up": grad_gate_up, "grad_down": grad_down}


@misconception(
    "tiled_feed_forward",
    "Your weight gradients are those of the last tile. All tiles use the same weights, so their "
    "gradients are added up.",
    see=KEPT,
)
def keeps_the_last_tiles_gradient(x, gate_up_weight, down_weight, grad_y, tile):
    starts = range(0, len(x), tile)
    return _tiled(
        x, gate_up_weight, down_weight, grad_y, starts, tile, gather=lambda total, new: new
    )


@misconception(
    "tiled_feed_forward",
    "Your weight gradients are averaged over the tiles. The gradient of a sum over tokens is a sum "
    "over tokens, however they are cut.",
    see=KEPT,
)
def averages_over_tiles(x, gate_up_weight, down_weight, grad_y, tile):
    starts = range(0, len(x), tile)
    result = _tiled(x, gate_up_weight, down_weight, grad_y, starts, tile)
    result["grad_gate_up"] /= len(starts)
    result["grad_down"] /= len(starts)
    return result


@misconception(
    "tiled_feed_forward",
    "The last tile is missing: the number of tokens need not be a multiple of the tile.",
    see=KEPT,
)
def drops_the_short_tile(x, gate_up_weight, down_weight, grad_y, tile):
    starts = range(0, len(x) // tile * tile, tile)
    return _tiled(x, gate_up_weight, down_weight, grad_y, starts, tile)


@misconception(
    "tiled_feed_forward",
    "The gate's gradient has half of the product rule: silu(g) = g s, and its slope is "
    "s + g s (1 - s), not s alone.",
    see=BACKWARD,
)
def takes_the_sigmoid_for_silus_slope(x, gate_up_weight, down_weight, grad_y, tile):
    starts = range(0, len(x), tile)
    return _tiled(x, gate_up_weight, down_weight, grad_y, starts, tile, slope=torch.sigmoid)


@misconception(
    "tiled_feed_forward",
    "The gate's gradient lacks the factor silu'(gate): it is passed on as if the gate were linear.",
    see=BACKWARD,
)
def forgets_the_gates_slope(x, gate_up_weight, down_weight, grad_y, tile):
    starts = range(0, len(x), tile)
    return _tiled(x, gate_up_weight, down_weight, grad_y, starts, tile, slope=torch.ones_like)


@misconception(
    "tiled_feed_forward",
    "The numbers are right, but the hidden activations of all tokens were held at once: that is "
    "the tensor which tiling is to avoid.",
    see=KEPT,
)
def holds_all_hidden_activations(x, gate_up_weight, down_weight, grad_y, tile):
    return _tiled(x, gate_up_weight, down_weight, grad_y, [0], max(1, len(x)))


@misconception(
    "tiled_feed_forward",
    "The two halves of your hidden gradient are exchanged: what belongs to gate stands where up "
    "should. The packed rows are gate first, so its gradient comes first as well.",
    see=FUSED,
)
def exchanges_the_gradients_of_gate_and_up(x, gate_up_weight, down_weight, grad_y, tile):
    result = _tiled(x, gate_up_weight, down_weight, grad_y, range(0, len(x), tile), tile)
    gate, up = F.linear(x, gate_up_weight).chunk(2, dim=-1)
    grad_hidden = grad_y @ down_weight
    both = torch.cat((grad_hidden * F.silu(gate), grad_hidden * up * _silu_slope(gate)), -1)
    return {**result, "grad_gate_up": both.T @ x, "grad_x": both @ gate_up_weight}


@alternative("tiled_feed_forward")
def by_autograd_on_each_tile(x, gate_up_weight, down_weight, grad_y, tile):
    weights = [w.detach().requires_grad_() for w in (gate_up_weight, down_weight)]
    ys, grad_xs, totals = [], [], [torch.zeros_like(w) for w in weights]
    for rows, grad in zip(x.split(tile), grad_y.split(tile), strict=True):
        rows = rows.detach().requires_grad_()
        gate, up = F.linear(rows, weights[0]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, weights[1])
        grad_x, *grads = torch.autograd.grad(y, (rows, *weights), grad)
        ys.append(y.detach())
        grad_xs.append(grad_x)
        totals = [total + g for total, g in zip(totals, grads, strict=True)]
    return {
        "y": torch.cat(ys),
        "grad_x": torch.cat(grad_xs),
        "grad_gate_up": totals[0],
        "grad_down": totals[1],
    }


@alternative("tiled_feed_forward")
def tile_by_tile(x, gate_up_weight, down_weight, grad_y, tile):
    starts = range(0, len(x), tile)
    return _tiled(x, gate_up_weight, down_weight, grad_y, starts, tile)
