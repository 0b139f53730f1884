"""Chapter 10: wrong answers that people give, and right ones in another form."""

import math

import numpy as np
import torch

from autograder import alternative, misconception

FORMATS = "2. What a format can say"
SUMS = "3. Sums stall"
GRADIENTS = "4. Where gradients lie"
RECIPE = "5. The recipe"
SCALE = "6. The scale finds its own size"
CLIP = "7. Unscale, then clip"
MEMORY = "8. What it costs and saves"
LOT = "9. Rounding by lot"
EIGHT = "10. Eight bits"


# float_limits


def _limits(exponent_bits, mantissa_bits, *, bias=None, top=None, subnormal=None, eps=None):
    bias = 2 ** (exponent_bits - 1) - 1 if bias is None else bias
    top = bias if top is None else top
    try:
        largest = math.ldexp(2 - 2.0**-mantissa_bits, top)
    except OverflowError:
        largest = math.inf
    return {
        "max": largest,
        "min_normal": 2.0 ** (1 - bias),
        "min_subnormal": 2.0 ** (1 - bias - mantissa_bits) if subnormal is None else subnormal,
        "eps": 2.0**-mantissa_bits if eps is None else eps,
    }


@misconception(
    "float_limits",
    "Your max uses the largest exponent field as if it were a number. That field is kept for "
    "infinity and NaN: the largest exponent of a number is bias itself.",
    see=FORMATS,
)
def counts_infinity_as_a_number(exponent_bits, mantissa_bits):
    bias = 2 ** (exponent_bits - 1) - 1
    return _limits(exponent_bits, mantissa_bits, top=bias + 1)


@misconception(
    "float_limits",
    "Your subnormals have the exponent 0 - bias. Exponent field 0 means 1 - bias, the exponent of "
    "the smallest normal numbers, so that there is no gap between both kinds.",
    see=FORMATS,
)
def gives_subnormals_an_exponent_of_their_own(exponent_bits, mantissa_bits):
    bias = 2 ** (exponent_bits - 1) - 1
    return _limits(exponent_bits, mantissa_bits, subnormal=2.0 ** -(bias + mantissa_bits))


@misconception(
    "float_limits",
    "Your smallest positive value is the smallest normal one. Below it lie the subnormals, spaced "
    "evenly down to zero: for float16 they add ten powers of two.",
    see=FORMATS,
)
def forgets_subnormals(exponent_bits, mantissa_bits):
    bias = 2 ** (exponent_bits - 1) - 1
    return _limits(exponent_bits, mantissa_bits, subnormal=2.0 ** (1 - bias))


@misconception(
    "float_limits",
    "Your eps is half the gap above 1. eps is the gap itself, 2^-m; half of it is the largest "
    "error of one rounding.",
    see=FORMATS,
)
def takes_the_rounding_error_for_eps(exponent_bits, mantissa_bits):
    return _limits(exponent_bits, mantissa_bits, eps=2.0 ** -(mantissa_bits + 1))


@misconception(
    "float_limits",
    "Your bias is 2^(exponent_bits - 1). It is one less, so that the fields 1 .. 2^e - 2 reach "
    "about as far up as down.",
    see=FORMATS,
)
def has_a_bias_one_too_large(exponent_bits, mantissa_bits):
    return _limits(exponent_bits, mantissa_bits, bias=2 ** (exponent_bits - 1))


@alternative("float_limits")
def by_building_the_values(exponent_bits, mantissa_bits):
    bias = 2 ** (exponent_bits - 1) - 1
    one = 2**mantissa_bits
    return {
        "max": math.ldexp(2 * one - 1, 2**exponent_bits - 2 - bias - mantissa_bits),
        "min_normal": math.ldexp(one, 1 - bias - mantissa_bits),
        "min_subnormal": math.ldexp(1, 1 - bias - mantissa_bits),
        "eps": math.ldexp(one + 1, -mantissa_bits) - 1.0,
    }


@alternative("float_limits")
def through_the_sum_of_bits(exponent_bits, mantissa_bits):
    bias = sum(2**i for i in range(exponent_bits - 1))
    mantissa = 1 + sum(2.0**-i for i in range(1, mantissa_bits + 1))
    tiny = 2.0 ** (1 - bias)
    eps = 1.0 / 2**mantissa_bits
    return {
        "max": mantissa * 2.0**bias,
        "min_normal": tiny,
        "min_subnormal": tiny * eps,
        "eps": eps,
    }


# to_bfloat16


def _bits(x):
    return x.view(torch.int32).long() & 0xFFFFFFFF


def _keep_nan(x, codes):
    return torch.where(x.isnan(), (_bits(x) >> 16) | 0x40, codes).to(torch.int32)


@misconception(
    "to_bfloat16",
    "You cut the lower bits off. That always rounds towards zero, with twice the error, and all "
    "errors on one side: weights shrink. Round to nearest.",
    see=FORMATS,
)
def cuts_instead_of_rounding(x):
    return _keep_nan(x, _bits(x) >> 16)


@misconception(
    "to_bfloat16",
    "You round every tie up in magnitude. Ties go to the even code, so that half of them go down "
    "and no drift builds up.",
    see=FORMATS,
)
def rounds_ties_away_from_zero(x):
    return _keep_nan(x, (_bits(x) + 0x8000) >> 16)


@misconception(
    "to_bfloat16",
    "You round every tie down. Ties go to the even code: add the lowest bit that is kept.",
    see=FORMATS,
)
def rounds_ties_towards_zero(x):
    return _keep_nan(x, (_bits(x) + 0x7FFF) >> 16)


@misconception(
    "to_bfloat16",
    "A NaN of yours became a number or infinity: rounding carried out of its mantissa, or cut all "
    "its bits. Treat NaN apart.",
    see=FORMATS,
)
def rounds_nan_like_a_number(x):
    bits = _bits(x)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to(torch.int32) & 0xFFFF


@misconception(
    "to_bfloat16",
    "You shift signed integers: the sign bit is copied into the upper half, and negative numbers "
    "get negative codes. Mask to 32 bits in int64 first, or to 16 at the end.",
    see=FORMATS,
)
def drags_the_sign_along(x):
    bits = x.view(torch.int32).long()
    codes = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return torch.where(x.isnan(), 0x7FC0, codes).to(torch.int32)


@misconception(
    "to_bfloat16",
    "Your largest values stop at the largest finite code. Where rounding to nearest carries beyond "
    "it, the result is infinity.",
    see=FORMATS,
)
def saturates_instead_of_overflowing(x):
    bits = _bits(x)
    codes = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    codes = torch.where(x.isfinite() & ((codes & 0x7FFF) == 0x7F80), codes - 1, codes)
    return _keep_nan(x, codes)


@alternative("to_bfloat16")
def by_comparing_the_lower_half(x):
    bits = _bits(x)
    upper, lower = bits >> 16, bits & 0xFFFF
    up = (lower > 0x8000) | ((lower == 0x8000) & (upper % 2 == 1))
    return torch.where(x.isnan(), torch.tensor(0x7FC0), upper + up).to(torch.int32)


@alternative("to_bfloat16")
def in_numpy(x):
    bits = x.numpy().view(np.uint32).astype(np.uint64)
    codes = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    codes = np.where(np.isnan(x.numpy()), bits >> 16 | 0x40, codes)
    return torch.from_numpy(codes.astype(np.int32))


# lost_fraction


def _share(gradients, threshold, scale, *, strictly=False, with_zeros=False):
    size = gradients.double().abs()
    size = (size if with_zeros else size[size > 0]) * scale
    if not size.numel():
        return 0.0
    return ((size < threshold) if strictly else (size <= threshold)).double().mean().item()


def _smallest(exponent_bits, mantissa_bits):
    return 2.0 ** (2 - 2 ** (exponent_bits - 1) - mantissa_bits)


@misconception(
    "lost_fraction",
    "You count what is below the smallest positive value. Between half of it and all of it a "
    "number is rounded up to it: only half of it and less is lost.",
    see=GRADIENTS,
)
def counts_everything_below_the_smallest_value(gradients, exponent_bits, mantissa_bits, scale=1.0):
    return _share(gradients, _smallest(exponent_bits, mantissa_bits), scale, strictly=True)


@misconception(
    "lost_fraction",
    "You count subnormal values as lost. They are kept, with fewer digits the smaller they are.",
    see=GRADIENTS,
)
def counts_subnormals_as_lost(gradients, exponent_bits, mantissa_bits, scale=1.0):
    threshold = 2.0 ** (2 - 2 ** (exponent_bits - 1))
    return _share(gradients, threshold, scale, strictly=True)


@misconception(
    "lost_fraction",
    "You divide by the scale, as if it guarded against overflow. The loss is multiplied by it, and "
    "so are the gradients: it lifts them out of underflow.",
    see=RECIPE,
)
def takes_the_scale_for_a_guard_against_overflow(
    gradients, exponent_bits, mantissa_bits, scale=1.0
):
    return _share(gradients, _smallest(exponent_bits, mantissa_bits) / 2, 1 / scale)


@misconception(
    "lost_fraction",
    "You judge bfloat16 by float16's range. bfloat16 has the exponent bits of float32: what is "
    "lost there is lost in float32 as well, and loss scaling has nothing to do.",
    see=GRADIENTS,
)
def thinks_that_bfloat16_needs_loss_scaling(gradients, exponent_bits, mantissa_bits, scale=1.0):
    return _share(gradients, _smallest(5, 10) / 2, scale)


@misconception(
    "lost_fraction",
    "Gradients that were zero before the cast are in your count. They lose nothing: do not count "
    "them.",
    see=GRADIENTS,
)
def counts_zeros_as_lost(gradients, exponent_bits, mantissa_bits, scale=1.0):
    threshold = _smallest(exponent_bits, mantissa_bits) / 2
    return _share(gradients, threshold, scale, with_zeros=True)


@alternative("lost_fraction")
def with_logarithms(gradients, exponent_bits, mantissa_bits, scale=1.0):
    values = [abs(g) for g in gradients.double().flatten().tolist() if g]
    limit = 1 - 2 ** (exponent_bits - 1) - mantissa_bits
    lost = [math.log2(v) + math.log2(scale) <= limit for v in values]
    return sum(lost) / max(1, len(lost))


@alternative("lost_fraction")
def by_rounding_to_the_grid_of_subnormals(gradients, exponent_bits, mantissa_bits, scale=1.0):
    step = _smallest(exponent_bits, mantissa_bits)
    nonzero = gradients[gradients != 0].double()
    if nonzero.numel() == 0:
        return 0.0
    return float(((nonzero * scale / step).round() == 0).double().mean())


# scale_trajectory


def _trajectory(overflows, scale, growth, backoff, interval, *, start=0, keep=False, after=False):
    """`keep`: the count survives a growth; `after`: it survives an overflow."""
    streak, scales = start, []
    for overflow in overflows:
        if overflow:
            scale *= backoff
            streak = streak if after else 0
        else:
            streak += 1
            if streak >= interval:
                scale *= growth
                streak = streak if keep else 0
        scales.append(scale)
    return scales


@misconception(
    "scale_trajectory",
    "Your count goes on after the scale has grown, so that it grows at every following step. The "
    "count starts anew.",
    see=SCALE,
)
def keeps_growing_after_the_first_growth(
    overflows, init_scale, growth_factor=2.0, backoff_factor=0.5, interval=2000
):
    return _trajectory(overflows, init_scale, growth_factor, backoff_factor, interval, keep=True)


@misconception(
    "scale_trajectory",
    "Your count survives an overflow. It must be `interval` good steps in a row: an overflow sets "
    "it back to zero.",
    see=SCALE,
)
def counts_on_after_an_overflow(
    overflows, init_scale, growth_factor=2.0, backoff_factor=0.5, interval=2000
):
    return _trajectory(overflows, init_scale, growth_factor, backoff_factor, interval, after=True)


@misconception(
    "scale_trajectory",
    "You grow the scale whenever the number of the step is a multiple of the interval. What counts "
    "is the streak of good steps since the last change.",
    see=SCALE,
)
def grows_by_the_clock(overflows, init_scale, growth_factor=2.0, backoff_factor=0.5, interval=2000):
    scale, scales = init_scale, []
    for step, overflow in enumerate(overflows, 1):
        if overflow:
            scale *= backoff_factor
        elif step % interval == 0:
            scale *= growth_factor
        scales.append(scale)
    return scales


@misconception(
    "scale_trajectory",
    "Your scale grows one step too late: after `interval` good steps, not after one more.",
    see=SCALE,
)
def grows_one_step_late(
    overflows, init_scale, growth_factor=2.0, backoff_factor=0.5, interval=2000
):
    return _trajectory(overflows, init_scale, growth_factor, backoff_factor, interval + 1)


@misconception(
    "scale_trajectory",
    "An overflow takes your scale back to where it began. It is multiplied by backoff_factor only: "
    "the right size is most likely near.",
    see=SCALE,
)
def starts_over_after_an_overflow(
    overflows, init_scale, growth_factor=2.0, backoff_factor=0.5, interval=2000
):
    scale, streak, scales = init_scale, 0, []
    for overflow in overflows:
        streak = 0 if overflow else streak + 1
        if overflow:
            scale = init_scale * backoff_factor
        elif streak == interval:
            scale, streak = scale * growth_factor, 0
        scales.append(scale)
    return scales


@misconception(
    "scale_trajectory",
    "Your list has the scale before each step. It should have the one after: what the next step "
    "will use.",
    see=SCALE,
)
def lists_the_scale_before_the_step(
    overflows, init_scale, growth_factor=2.0, backoff_factor=0.5, interval=2000
):
    after = _trajectory(overflows, init_scale, growth_factor, backoff_factor, interval)
    return ([init_scale, *after])[: len(after)]


@alternative("scale_trajectory")
def by_splitting_at_overflows(
    overflows, init_scale, growth_factor=2.0, backoff_factor=0.5, interval=2000
):
    scales, scale, last = [], init_scale, -1
    for step, overflow in enumerate(overflows):
        if overflow:
            scale, last = scale * backoff_factor, step
        elif (step - last) % interval == 0:
            scale = scale * growth_factor
        scales.append(scale)
    return scales


@alternative("scale_trajectory")
def by_counting_down(overflows, init_scale, growth_factor=2.0, backoff_factor=0.5, interval=2000):
    left, scales = interval, [init_scale]
    for overflow in overflows:
        left = interval if overflow else left - 1
        factor = backoff_factor if overflow else growth_factor if left == 0 else 1.0
        left = left or interval
        scales.append(scales[-1] * factor)
    return scales[1:]


# unscale_and_clip


def _is_bad(gradients):
    return any(not bool(g.isfinite().all()) for g in gradients)


def _norm(gradients):
    return torch.cat([g.flatten() for g in gradients]).norm().item()


@misconception(
    "unscale_and_clip",
    "You clip first and take the scale off afterwards. max_norm is meant for true gradients: yours "
    "end `scale` times shorter than that.",
    see=CLIP,
)
def clips_before_it_unscales(gradients, scale, max_norm):
    wide = [g.float() for g in gradients]
    norm = _norm(wide)
    factor = min(1.0, max_norm / norm) if math.isfinite(norm) else 1.0
    return [g * factor / scale for g in wide], norm / scale, _is_bad(gradients)


@misconception(
    "unscale_and_clip",
    "You never take the scale off. A larger scale would then be a larger learning rate, which it "
    "must not be.",
    see=CLIP,
)
def takes_the_scale_for_part_of_the_learning_rate(gradients, scale, max_norm):
    wide = [g.float() for g in gradients]
    norm = _norm(wide)
    return [g * min(1.0, max_norm / norm) for g in wide], norm, _is_bad(gradients)


@misconception(
    "unscale_and_clip",
    "You divide by the scale in float16: what it lifted out of underflow underflows again, and the "
    "squares of large values overflow. Widen first.",
    see=CLIP,
)
def unscales_in_float16(gradients, scale, max_norm):
    true = [g / scale for g in gradients]
    norm = _norm(true)
    return [(g * min(1.0, max_norm / norm)).float() for g in true], norm, _is_bad(gradients)


@misconception(
    "unscale_and_clip",
    "You clip each tensor by its own norm. That changes the direction of the step: all gradients "
    "together have one norm and get one factor.",
    see=CLIP,
)
def clips_each_tensor_for_itself(gradients, scale, max_norm):
    true = [g.float() / scale for g in gradients]
    clipped = [g * min(1.0, max_norm / g.norm().item()) for g in true]
    return clipped, _norm(true), _is_bad(gradients)


@misconception(
    "unscale_and_clip",
    "You bring every gradient to length max_norm, short ones too. Clipping only shrinks.",
    see=CLIP,
)
def stretches_short_gradients(gradients, scale, max_norm):
    true = [g.float() / scale for g in gradients]
    norm = _norm(true)
    return [g * (max_norm / norm) for g in true], norm, _is_bad(gradients)


@misconception(
    "unscale_and_clip",
    "You look for inf only. An overflow becomes NaN as soon as it meets another inf or a zero: "
    "isfinite finds both.",
    see=RECIPE,
)
def overlooks_nan(gradients, scale, max_norm):
    true = [g.float() / scale for g in gradients]
    norm = _norm(true)
    factor = min(1.0, max_norm / norm) if norm == norm else 1.0
    return [g * factor for g in true], norm, any(bool(g.isinf().any()) for g in gradients)


@misconception(
    "unscale_and_clip",
    "You limit each value to max_norm. Clipping by norm shortens the vector, in its own direction.",
    see=CLIP,
)
def clips_by_value(gradients, scale, max_norm):
    true = [g.float() / scale for g in gradients]
    return [g.clamp(-max_norm, max_norm) for g in true], _norm(true), _is_bad(gradients)


@alternative("unscale_and_clip")
def with_torch_clipping(gradients, scale, max_norm):
    leaves = [torch.nn.Parameter(torch.zeros_like(g, dtype=torch.float32)) for g in gradients]
    for leaf, g in zip(leaves, gradients, strict=True):
        leaf.grad = g.float() * (1 / scale)
    norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    return [leaf.grad for leaf in leaves], norm.item(), not math.isfinite(norm.item())


@alternative("unscale_and_clip")
def with_norms_of_norms(gradients, scale, max_norm):
    norms = torch.stack([torch.linalg.vector_norm(g.double()) for g in gradients]) / scale
    norm = torch.linalg.vector_norm(norms).item()
    factor = 1.0 / scale * (1.0 if not norm > max_norm else max_norm / norm)
    bad = any(bool((g - g).ne(0).any()) for g in gradients)
    return [g.float() * factor for g in gradients], norm, bad


# train_in_float16


def _train(weight, batches, rates, scale, max_norm, **change):
    """The right program, with one thing changed."""
    master, updates = weight.clone(), 0
    if change.get("no_master"):
        master = master.half()
    for step, (x, y) in enumerate(batches):
        w = master.half().requires_grad_()
        prediction = x.half() @ w
        loss = (prediction.float() - y).square().mean()
        (gradient,) = torch.autograd.grad(loss * scale, w)
        is_bad = not bool(gradient.isfinite().all())
        rate = rates[step if change.get("by_step") else updates]
        if is_bad and not change.get("no_skip"):
            scale = scale / 2
            continue
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        gradient = change.get("prepare", _unscale_then_clip)(gradient, scale, max_norm)
        scale = scale / 2 if is_bad else scale
        if change.get("off_the_rate"):
            gradient = gradient / scale
        master = (master - rate * gradient).to(master.dtype)
        updates += 1
    return master.float(), scale


def _clip(gradient, max_norm):
    norm = gradient.norm().item()
    return gradient * min(1.0, max_norm / norm) if norm > 0 else gradient


def _unscale_then_clip(gradient, scale, max_norm):
    return _clip(gradient.float() / scale, max_norm)


@misconception(
    "train_in_float16",
    "Your result is the program's as it came. Train with scale = 1 and with scale = 1024: the "
    "scale is not allowed to matter, and here it does. Where does it enter?",
    see=CLIP,
    is_starter=True,
)
def the_loop_is_not_repaired_yet(weight, batches, learning_rates, scale, max_norm):
    return _train(
        weight, batches, learning_rates, scale, max_norm,
        prepare=lambda g, s, m: _clip(g.float(), m) / s,
    )  # fmt: skip


@misconception(
    "train_in_float16",
    "A skipped step uses up a learning rate of yours. The schedule belongs to the updates: where "
    "there is none, it stands still.",
    see=SCALE,
)
def advances_the_schedule_on_skipped_steps(weight, batches, learning_rates, scale, max_norm):
    return _train(weight, batches, learning_rates, scale, max_norm, by_step=True)


@misconception(
    "train_in_float16",
    "You update after an overflow, with the bad values replaced by zeros. The other values of such "
    "a gradient are not to be trusted, and the update counts as one: skip the whole step.",
    see=SCALE,
)
def updates_after_an_overflow(weight, batches, learning_rates, scale, max_norm):
    return _train(weight, batches, learning_rates, scale, max_norm, no_skip=True)


@misconception(
    "train_in_float16",
    "Your weights are float16 between steps. An update below half a spacing is lost, however many "
    "there are, and a small learning rate makes all of them such: keep float32 master weights.",
    see=RECIPE,
)
def does_without_master_weights(weight, batches, learning_rates, scale, max_norm):
    return _train(weight, batches, learning_rates, scale, max_norm, no_master=True)


@misconception(
    "train_in_float16",
    "You take the scale off the learning rate instead of the gradients, after clipping. Clipping, "
    "and every optimizer with moments, then sees scaled gradients: the scale is no learning rate.",
    see=CLIP,
)
def takes_the_scale_off_twice(weight, batches, learning_rates, scale, max_norm):
    return _train(weight, batches, learning_rates, scale, max_norm, off_the_rate=True)


@misconception(
    "train_in_float16",
    "You divide by the scale while the gradient is float16: what the scale lifted out of underflow "
    "underflows again. Widen, then divide.",
    see=CLIP,
)
def unscales_before_it_widens(weight, batches, learning_rates, scale, max_norm):
    return _train(
        weight, batches, learning_rates, scale, max_norm,
        prepare=lambda g, s, m: _clip((g / s).float(), m),
    )  # fmt: skip


@misconception(
    "train_in_float16",
    "You never take the scale off. Only clipping keeps your updates small.",
    see=CLIP,
)
def never_unscales(weight, batches, learning_rates, scale, max_norm):
    return _train(
        weight, batches, learning_rates, scale, max_norm,
        prepare=lambda g, s, m: _clip(g.float(), m),
    )  # fmt: skip


@alternative("train_in_float16")
def with_backward_and_copies(weight, batches, learning_rates, scale, max_norm):
    master = torch.nn.Parameter(weight.clone())
    rates = list(learning_rates)
    for x, y in batches:
        model = torch.nn.Parameter(master.detach().half())
        error = torch.mv(x.half(), model).float() - y
        (error.pow(2).mean() * scale).backward()
        if model.grad.isfinite().all():
            master.grad = model.grad.float().mul(1 / scale)
            torch.nn.utils.clip_grad_norm_([master], max_norm)
            with torch.no_grad():
                master.sub_(master.grad, alpha=rates.pop(0))
        else:
            scale *= 0.5
    return master.detach(), scale


@alternative("train_in_float16")
def with_the_gradient_by_hand(weight, batches, learning_rates, scale, max_norm):
    master, left = weight.double(), list(reversed(learning_rates))
    for x, y in batches:
        x = x.half()
        error = (x @ master.float().half()).float() - y
        gradient = x.T @ (error * scale * 2 / len(y)).half()
        if not bool(gradient.isfinite().all()):
            scale /= 2
            continue
        gradient = gradient.double() / scale
        master = master - left.pop() * gradient / max(1.0, gradient.norm().item() / max_norm)
    return master.float(), scale


# training_memory


def _memory(num_parameters, recipe, table):
    return num_parameters * table[recipe]


@misconception(
    "training_memory",
    "Your mixed precision halves everything. Master weights and moments stay float32: "
    "2 + 2 + 4 + 8 = 16 bytes a parameter, as many as in float32. Activations and time are saved.",
    see=MEMORY,
)
def thinks_that_mixed_precision_halves_memory(num_parameters, recipe):
    return _memory(num_parameters, recipe, {"float32": 16, "mixed": 8, "bfloat16": 8})


@misconception(
    "training_memory",
    "The float32 master weights are missing in your mixed precision.",
    see=MEMORY,
)
def forgets_the_master_weights(num_parameters, recipe):
    return _memory(num_parameters, recipe, {"float32": 16, "mixed": 12, "bfloat16": 8})


@misconception(
    "training_memory",
    "You count one of Adam's moments. It keeps two: of the gradient and of its square.",
    see=MEMORY,
)
def counts_one_moment(num_parameters, recipe):
    return _memory(num_parameters, recipe, {"float32": 12, "mixed": 12, "bfloat16": 6})


@misconception(
    "training_memory",
    "The gradients are missing: they are as large as the weights they belong to.",
    see=MEMORY,
)
def forgets_the_gradients(num_parameters, recipe):
    return _memory(num_parameters, recipe, {"float32": 12, "mixed": 14, "bfloat16": 6})


@misconception(
    "training_memory",
    "Your gradients are float32 in mixed precision. In the recipe of the docstring they have the "
    "dtype of the weights that the model computes with: 2 bytes.",
    see=MEMORY,
)
def keeps_float32_gradients(num_parameters, recipe):
    return _memory(num_parameters, recipe, {"float32": 16, "mixed": 18, "bfloat16": 10})


@alternative("training_memory")
def with_real_tensors(num_parameters, recipe):
    wide, half, short = torch.float32, torch.float16, torch.bfloat16
    dtypes = {
        "float32": [wide] * 4,
        "mixed": [half, half, wide, wide, wide],
        "bfloat16": [short] * 4,
    }[recipe]
    return sum(torch.empty(num_parameters, dtype=d, device="meta").nbytes for d in dtypes)


@alternative("training_memory")
def with_a_table(num_parameters, recipe):
    return int(num_parameters * {"float32": 128, "mixed": 128, "bfloat16": 64}[recipe] // 8)


# stochastic_round


def _steps(x):
    _, exponent = torch.frexp(x)
    step = torch.exp2((exponent - 8).float())
    return x.abs() / step, step


@misconception(
    "stochastic_round",
    "You compare the wrong way round: the upper neighbour is taken the more often, the nearer x is "
    "to the lower one.",
    see=LOT,
)
def compares_the_wrong_way_round(x, noise):
    steps, step = _steps(x)
    low = steps.floor()
    up = (noise >= steps - low) & (steps > low)
    return torch.copysign((low + up) * step, x)


@misconception(
    "stochastic_round",
    "You add the noise and then round to nearest. That is half a step too much on average: cut "
    "after adding.",
    see=LOT,
)
def rounds_to_nearest_after_the_noise(x, noise):
    steps, step = _steps(x)
    return torch.copysign((steps + noise).round() * step, x)


@misconception(
    "stochastic_round",
    "You round to nearest and ignore the noise. Every small update then meets the same fate.",
    see=LOT,
)
def rounds_to_nearest(x, noise):
    return x.bfloat16().float()


@misconception(
    "stochastic_round",
    "You flip a fair coin between the neighbours. The nearer one must be taken more often, or the "
    "average is their middle.",
    see=LOT,
)
def flips_a_fair_coin(x, noise):
    steps, step = _steps(x)
    low = steps.floor()
    return torch.copysign((low + ((noise < 0.5) & (steps > low))) * step, x)


@misconception(
    "stochastic_round",
    "Your spacing is 2^-7 everywhere. It doubles with each power of two: 2^-7 is the spacing "
    "between 1 and 2 alone.",
    see=FORMATS,
)
def has_the_same_spacing_everywhere(x, noise):
    steps = x.abs() * 128
    low = steps.floor()
    return torch.copysign((low + (noise < steps - low)) / 128, x).bfloat16().float()


@misconception(
    "stochastic_round",
    "Your lower neighbour is cut towards minus infinity, so that for negative x the two neighbours "
    "change places. The docstring goes by magnitude; both are unbiased, but not the same draw.",
    see=LOT,
)
def goes_by_value_instead_of_magnitude(x, noise):
    steps, step = _steps(x)
    signed = torch.copysign(steps, x)
    low = signed.floor()
    return (low + (noise < signed - low)) * step


@misconception(
    "stochastic_round",
    "Your spacing is that of 8 mantissa bits. bfloat16 stores 7; the leading one is not stored.",
    see=FORMATS,
)
def counts_the_leading_one_as_stored(x, noise):
    steps, step = _steps(x)
    steps, step = steps * 2, step / 2
    low = steps.floor()
    return torch.copysign((low + (noise < steps - low)) * step, x)


@alternative("stochastic_round")
def by_adding_random_bits(x, noise):
    bits = x.view(torch.int32).long()
    lower = bits & 0xFFFF
    up = noise.double() < lower.double() / 65536
    return (((bits >> 16) + up) << 16).to(torch.int32).view(torch.float32)


@alternative("stochastic_round")
def between_neighbours(x, noise):
    low = (x.view(torch.int32) & -65536).view(torch.float32)
    high = (low.view(torch.int32) + 65536).view(torch.float32)
    part = (x - low) / (high - low)
    return torch.where(noise < part, high, low)


# fp8_linear


def _to_fp8(rows, *, dim=1, largest=None, limit=448.0, dtype=torch.float8_e4m3fn):
    peak = rows.abs().amax(dim, keepdim=True) if largest is None else largest
    factor = torch.where(peak > 0, limit / peak, 1.0)
    return (rows * factor).to(dtype).float(), factor


@misconception(
    "fp8_linear",
    "You scale each matrix as a whole. A row that is small beside the largest value is then left "
    "with few of e4m3's digits: give each row a factor of its own.",
    see=EIGHT,
)
def scales_the_whole_matrix(x, weight):
    x_codes, x_factor = _to_fp8(x, largest=x.abs().max())
    w_codes, w_factor = _to_fp8(weight, largest=weight.abs().max())
    return x_codes @ w_codes.T / x_factor / w_factor


@misconception(
    "fp8_linear",
    "You cast without a factor. What is beyond 448 saturates, what is below 2^-10 is lost, and the "
    "rest of the range is not used.",
    see=EIGHT,
)
def casts_without_scaling(x, weight):
    return x.to(torch.float8_e4m3fn).float() @ weight.to(torch.float8_e4m3fn).float().T


@misconception(
    "fp8_linear",
    "You cast to e5m2. It has the wider range, for gradients, and one mantissa bit less; with a "
    "factor for each row, e4m3's range is enough and its digits are worth more.",
    see=EIGHT,
)
def takes_e5m2(x, weight):
    x_codes, x_factor = _to_fp8(x, limit=57344.0, dtype=torch.float8_e5m2)
    w_codes, w_factor = _to_fp8(weight, limit=57344.0, dtype=torch.float8_e5m2)
    return x_codes @ w_codes.T / x_factor / w_factor.T


@misconception(
    "fp8_linear",
    "You bring the largest magnitude to 240, as if e4m3 kept its top exponent for infinity. This "
    "one has no infinity and reaches 448.",
    see=EIGHT,
)
def stops_at_240(x, weight):
    x_codes, x_factor = _to_fp8(x, limit=240.0)
    w_codes, w_factor = _to_fp8(weight, limit=240.0)
    return x_codes @ w_codes.T / x_factor / w_factor.T


@misconception(
    "fp8_linear",
    "You look for the largest value and not for the largest magnitude: rows whose extremes are "
    "negative saturate.",
    see=EIGHT,
)
def forgets_the_sign_of_extremes(x, weight):
    x_codes, x_factor = _to_fp8(x, largest=x.amax(1, keepdim=True))
    w_codes, w_factor = _to_fp8(weight, largest=weight.amax(1, keepdim=True))
    return x_codes @ w_codes.T / x_factor / w_factor.T


@misconception(
    "fp8_linear",
    "You divide by the largest magnitude of a row of zeros: 0 * inf is NaN. Give it the factor 1.",
    see=EIGHT,
)
def divides_by_the_zero_of_an_empty_row(x, weight):
    def quantise(rows):
        factor = 448 / rows.abs().amax(1, keepdim=True)
        return (rows * factor).to(torch.float8_e4m3fn).float(), factor

    (x_codes, x_factor), (w_codes, w_factor) = quantise(x), quantise(weight)
    return x_codes @ w_codes.T / x_factor / w_factor.T


@misconception(
    "fp8_linear",
    "The factors of the weights are still on your result. Both factors of a product must come off.",
    see=EIGHT,
)
def takes_one_factor_off(x, weight):
    x_codes, x_factor = _to_fp8(x)
    w_codes, _ = _to_fp8(weight)
    return x_codes @ w_codes.T / x_factor


@alternative("fp8_linear")
def with_scales_that_multiply(x, weight):
    x_scale = (x.abs().max(1).values / 448).where(x.abs().max(1).values > 0, torch.ones(()))
    w_scale = (weight.abs().max(1).values / 448).where(
        weight.abs().max(1).values > 0, torch.ones(())
    )
    x_codes = (x * (1 / x_scale)[:, None]).to(torch.float8_e4m3fn).float()
    w_codes = (weight * (1 / w_scale)[:, None]).to(torch.float8_e4m3fn).float()
    return torch.einsum("td,fd->tf", x_codes, w_codes) * torch.outer(x_scale, w_scale)


@alternative("fp8_linear")
def row_by_row(x, weight):
    def values(row):
        peak = row.abs().max()
        factor = 448 / peak if peak > 0 else torch.tensor(1.0)
        return (row * factor).to(torch.float8_e4m3fn).float() / factor

    weights = torch.stack([values(w) for w in weight])
    return torch.stack([weights @ values(row) for row in x])
