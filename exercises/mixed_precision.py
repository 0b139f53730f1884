# Exercise 984f750dcb37: write your answers below, and leave this line as it is.
"""Chapter 10: mixed precision."""

import torch


def float_limits(exponent_bits, mantissa_bits):
    """The landmarks of an IEEE format with these widths (and one sign bit).

    returns a dict of floats: "max", the largest finite value; "min_normal"; "min_subnormal", the
    smallest positive value; "eps", the gap between 1 and the next value

    A normal value is 2^(E - bias) * (1 + M / 2^m) with bias = 2^(exponent_bits - 1) - 1; exponent
    field 0 is subnormal, and the largest exponent field is kept for infinity and NaN.

    Source: IEEE 754-2019, sec. 3.3 and 3.4.
    """
    raise NotImplementedError("float_limits: not written yet")


def to_bfloat16(x):
    """The bfloat16 codes of float32 numbers, by integer arithmetic alone.

    x: any shape, float32    returns int32 codes in 0 .. 65535, same shape

    A bfloat16 is the upper half of a float32's bits, rounded to nearest, ties to the even code.
    Rounding may carry into the exponent, and from the largest values into infinity: that is right.
    NaN must stay NaN (any code of one).

    `x.view(torch.int32)` gives the bits as signed integers; no cast to torch.bfloat16.
    """
    raise NotImplementedError("to_bfloat16: not written yet")


def lost_fraction(gradients, exponent_bits, mantissa_bits, scale=1.0):
    """Which share of the nonzero gradients becomes zero when they are cast after loss scaling?

    gradients: any shape, float32    returns a float in [0, 1]; 0.0 where no gradient is nonzero

    The format has the given widths (IEEE, with subnormals); the loss was multiplied by `scale`,
    a power of two. Rounding to nearest turns half of the smallest positive value, and all below,
    into zero. No cast: count.
    """
    raise NotImplementedError("lost_fraction: not written yet")


def scale_trajectory(overflows, init_scale, growth_factor=2.0, backoff_factor=0.5, interval=2000):
    """The loss scale after each step of dynamic loss scaling.

    overflows: a list of bools, one a step: did a gradient overflow in it?
    returns a list of floats of the same length

    An overflow multiplies the scale by backoff_factor. `interval` steps in a row without one
    multiply it by growth_factor, and the counting starts anew; an overflow starts it anew as well.

    Source: torch.amp.GradScaler.
    """
    raise NotImplementedError("scale_trajectory: not written yet")


def unscale_and_clip(gradients, scale, max_norm):
    """Make scaled float16 gradients ready for the optimizer.

    gradients: a list of float16 tensors of any shapes, those of loss * scale
    returns (new list of float32 tensors, their total norm before clipping, overflowed)

    Widen, take the scale off, then shrink all of them by one common factor so that their total
    Euclidean norm is at most max_norm; leave them alone where it already is. `overflowed` is True
    where any gradient holds an inf or a NaN; the caller then skips the step and the other two
    results do not matter. Neither argument is changed.

    Source: arXiv 1710.03740, sec. 3.2 (the factor is taken off before clipping).
    """
    raise NotImplementedError("unscale_and_clip: not written yet")


def train_in_float16(weight, batches, learning_rates, scale, max_norm):
    """Linear regression by SGD in float16, with float32 master weights and a dynamic loss scale.

    weight: (D,), float32, where to start    batches: a list of (x, y) with x (N, D), y (N,)
    learning_rates: one for each *update*; a skipped step does not use one up
    returns (weight after training, float32; scale after training, float)

    For each batch: round the weights to float16, predict x w in float16, take the mean squared
    error in float32, multiply by the scale, compute the gradient of w in float16. An inf or NaN in
    it halves the scale and skips the update. Otherwise: unscale in float32, clip to max_norm, and
    update the float32 weights with the next learning rate. (No growth of the scale here.)

    A program that somebody wrote is below. Its losses look plausible. Repair it.
    """
    master, updates = weight.clone(), 0
    for x, y in batches:
        w = master.half().requires_grad_()
        loss = (x.half() @ w).float().sub(y).square().mean()
        (gradient,) = torch.autograd.grad(loss * scale, w)
        if not gradient.isfinite().all():
            scale = scale / 2
            continue
        gradient = gradient.float()
        gradient = gradient * min(1.0, max_norm / gradient.norm().item())
        gradient = gradient / scale
        master = master - learning_rates[updates] * gradient
        updates += 1
    return master, scale


def training_memory(num_parameters, recipe):
    """Bytes that weights, gradients, master weights and Adam's moments take while training.

    recipe: "float32"    everything in float32
            "mixed"      float16 weights and gradients, float32 master weights and moments
            "bfloat16"   weights, gradients and moments in bfloat16, no master weights
    returns an int. Activations are not counted.

    Source: arXiv 1910.02054, sec. 3.1.
    """
    raise NotImplementedError("training_memory: not written yet")


def stochastic_round(x, noise):
    """Round float32 numbers to bfloat16's values so that the error is zero on average.

    x: any shape, float32, normal and finite    noise: same shape, uniform in [0, 1)
    returns float32 holding values that bfloat16 has

    Let `low` be x with its magnitude cut to bfloat16's 7 mantissa bits, and `step` the distance to
    the next larger magnitude. The result is that next value where noise < (|x| - |low|) / step,
    and low elsewhere. Values that bfloat16 has stay as they are, whatever the noise.

    Source: arXiv 1502.02551, sec. 3.
    """
    raise NotImplementedError("stochastic_round: not written yet")


def fp8_linear(x, weight):
    """x @ weight.T with both factors in float8 e4m3, scaled row by row.

    x: (T, D) float32    weight: (F, D) float32    returns (T, F) float32

    e4m3 reaches 448 and has 3 mantissa bits: each row of x (a token) and each row of weight (an
    output) gets a factor of its own that brings its largest magnitude to 448 before it is cast to
    torch.float8_e4m3fn. The product is computed in float32 on the values of the codes, and both
    factors are taken off the result. A row of zeros gives zeros.

    Source: arXiv 2209.05433 (the format); the per-row scaling is common practice.
    """

    raise NotImplementedError("fp8_linear: not written yet")
