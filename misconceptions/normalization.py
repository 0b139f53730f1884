"""Chapter 01: wrong answers that people give, and right ones in another form."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from autograder import alternative, misconception

LAYER_NORM = "2. LayerNorm"
RMS_NORM = "3. RMSNorm"
HALF = "4. Half precision and eps"
BATCH_NORM = "6. BatchNorm"
PADDING = "7. When the batch cannot be trusted"
BACKWARD = "8. The backward pass"
PLACEMENT = "9. Where the norm stands"
DEEPNORM = "10. DeepNorm"
ONE_PASS = "11. Statistics in one pass"


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# rms_norm


def _rms_norm(x, weight, eps, *, dims=None, statistic=None):
    wide = _wide(x)
    dims = tuple(range(-weight.ndim, 0)) if dims is None else dims
    rms = statistic(wide, dims) if statistic else (wide.square().mean(dims, True) + eps).sqrt()
    return (wide / rms * weight).to(x.dtype)


@misconception(
    "rms_norm",
    "Your result equals RMSNorm with the mean subtracted. RMSNorm does not centre: it divides by "
    "the root mean square of x itself.",
    see=RMS_NORM,
)
def subtracts_the_mean(x, weight, eps=1e-6):
    wide = _wide(x)
    dims = tuple(range(-weight.ndim, 0))
    return _rms_norm(wide - wide.mean(dims, True), weight, eps).to(x.dtype)


@misconception(
    "rms_norm",
    "Your eps is added after the root. It belongs under it, to the mean square: there eps = 1e-6 "
    "guards a root mean square of 1e-3, outside it would guard one of 1e-6 only.",
    see=HALF,
)
def adds_eps_outside_the_root(x, weight, eps=1e-6):
    return _rms_norm(x, weight, eps, statistic=lambda w, d: w.square().mean(d, True).sqrt() + eps)


@misconception(
    "rms_norm",
    "Your norm is computed in float16. A square overflows from |x| = 256 on and the quotient "
    "becomes 0: widen x to float32 first, and round once at the end.",
    see=HALF,
)
def computes_in_half_precision(x, weight, eps=1e-6):
    dims = tuple(range(-weight.ndim, 0))
    return x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps) * weight


@misconception(
    "rms_norm",
    "You divide by the Euclidean norm. The root MEAN square is smaller by sqrt(D), so that a "
    "feature has size 1 whatever the width.",
    see=RMS_NORM,
)
def divides_by_the_length_of_the_vector(x, weight, eps=1e-6):
    return _rms_norm(x, weight, eps, statistic=lambda w, d: (w.square().sum(d, True) + eps).sqrt())


@misconception(
    "rms_norm",
    "You normalise over the last dimension alone. A weight of shape (3, 8) stands for the last "
    "two: the mean of the squares is over both.",
    see=RMS_NORM,
)
def normalises_the_last_dimension_only(x, weight, eps=1e-6):
    return _rms_norm(x, weight, eps, dims=(-1,))


@misconception(
    "rms_norm",
    "One statistic for the whole tensor: then a token's output depends on the other tokens. Each "
    "token has its own mean square.",
    see=RMS_NORM,
)
def shares_one_statistic_among_all_tokens(x, weight, eps=1e-6):
    return _rms_norm(x, weight, eps, dims=tuple(range(x.ndim)))


@misconception(
    "rms_norm",
    "The result is float32 for half-precision input. Compute in float32, then return to the dtype "
    "of x: the residual stream keeps its dtype.",
    see=HALF,
)
def returns_float32(x, weight, eps=1e-6):
    return _rms_norm(_wide(x), weight, eps)


@misconception(
    "rms_norm",
    "You compute in float32 whatever comes. float32 is wider than float16 and bfloat16, and "
    "narrower than float64, which should keep its digits.",
    see=HALF,
)
def narrows_float64_to_float32(x, weight, eps=1e-6):
    return _rms_norm(x.float(), weight.float(), eps).to(x.dtype)


@alternative("rms_norm")
def rounds_before_the_weight(x, weight, eps=1e-6):
    return _rms_norm(x, torch.ones_like(weight), eps) * weight


@alternative("rms_norm")
def flattens_the_trailing_dimensions(x, weight, eps=1e-6):
    flat = _wide(x).reshape(*x.shape[: x.ndim - weight.ndim], weight.numel())
    mean_square = torch.einsum("...d,...d->...", flat, flat) / weight.numel()
    return (flat / (mean_square + eps).sqrt()[..., None] * weight.flatten()).view(x.shape).to(x)


@alternative("rms_norm")
def divides_token_by_token(x, weight, eps=1e-6):
    rows = _wide(x).reshape(-1, *weight.shape).clone()
    for row in rows:
        row /= (row.pow(2).mean() + eps) ** 0.5
    return (rows * weight).reshape(x.shape).to(x.dtype)


# layer_norm


def _layer_norm(x, weight, bias, dim, eps, *, over=None, correction=0, widen=True, rstd=None):
    wide = _wide(x) if widen else x
    over = (dim,) if over is None else over
    centred = wide - wide.mean(over, keepdim=True)
    variance = centred.square().sum(over, keepdim=True)
    variance = variance / (x.numel() // variance.numel() - correction)
    scale = torch.rsqrt(variance + eps) if rstd is None else rstd(variance)
    return _affine(centred * scale, weight, bias, dim).to(x.dtype)


def _affine(y, weight, bias, dim):
    along = [1] * y.ndim
    along[dim] = -1
    return y * weight.view(along) + bias.view(along)


@misconception(
    "layer_norm",
    "Your variance divides by n - 1, tensor.var's default. LayerNorm takes the plain mean of the "
    "squares: correction=0.",
    see=LAYER_NORM,
)
def divides_the_variance_by_one_less(x, weight, bias, dim, eps=1e-5):
    return _layer_norm(x, weight, bias, dim, eps, correction=1)


@misconception(
    "layer_norm",
    "Your eps is added to the standard deviation. It belongs under the root, to the variance.",
    see=HALF,
)
def adds_eps_to_the_standard_deviation(x, weight, bias, dim, eps=1e-5):
    return _layer_norm(x, weight, bias, dim, eps, rstd=lambda v: 1 / (v.sqrt() + eps))


@misconception(
    "layer_norm",
    "Your statistics are over the batch, one for each feature: that is BatchNorm. LayerNorm takes "
    "each token by itself, over its features.",
    see=LAYER_NORM,
)
def takes_statistics_over_the_batch(x, weight, bias, dim, eps=1e-5):
    over = tuple(d for d in range(x.ndim) if d != dim % x.ndim)
    if not over:
        return _affine(torch.zeros_like(x), weight, bias, dim)
    return _layer_norm(x, weight, bias, dim, eps, over=over)


@misconception(
    "layer_norm",
    "Your norm is computed in float16: squares overflow from 256 on. Widen x to float32 first, and "
    "round once at the end.",
    see=HALF,
)
def computes_in_the_dtype_of_x(x, weight, bias, dim, eps=1e-5):
    return _layer_norm(x, weight, bias, dim, eps, widen=False)


@misconception(
    "layer_norm",
    "Your result equals RMSNorm plus the bias: the mean was not subtracted.",
    see=LAYER_NORM,
)
def does_not_centre(x, weight, bias, dim, eps=1e-5):
    wide = _wide(x)
    y = wide * torch.rsqrt(wide.square().mean(dim, keepdim=True) + eps)
    return _affine(y, weight, bias, dim).to(x.dtype)


@misconception(
    "layer_norm",
    "weight and bias lie along the last dimension of x. They belong to the features, which lie "
    "along `dim`: reshape them, or equal sizes hide the mistake.",
    see=LAYER_NORM,
)
def lays_the_weight_along_the_last_dimension(x, weight, bias, dim, eps=1e-5):
    ones = torch.ones(x.shape[dim])
    y = _layer_norm(_wide(x), ones, torch.zeros_like(ones), dim, eps)
    return (y * weight + bias).to(x.dtype)


@misconception(
    "layer_norm",
    "Your variance is E[x^2] - E[x]^2. With a mean of thousands both terms are millions, and their "
    "difference is rounding noise: subtract the mean first, then square.",
    see=ONE_PASS,
)
def subtracts_two_large_squares(x, weight, bias, dim, eps=1e-5):
    wide = _wide(x)
    mean = wide.mean(dim, keepdim=True)
    variance = (wide.square().mean(dim, keepdim=True) - mean.square()).clamp(min=0)
    return _affine((wide - mean) * torch.rsqrt(variance + eps), weight, bias, dim).to(x.dtype)


@misconception(
    "layer_norm",
    "You compute in float32 whatever comes. float32 is wider than float16 and bfloat16, and "
    "narrower than float64, which should keep its digits.",
    see=HALF,
)
def drops_the_digits_of_float64(x, weight, bias, dim, eps=1e-5):
    return _layer_norm(x.float(), weight.float(), bias.float(), dim, eps).to(x.dtype)


@misconception(
    "layer_norm",
    "You moved `dim` to the end and did not bring it back: the values are right, in the wrong "
    "places. The inverse of movedim(dim, -1) is movedim(-1, dim).",
    see=LAYER_NORM,
)
def leaves_the_features_at_the_end(x, weight, bias, dim, eps=1e-5):
    return _layer_norm(x.movedim(dim, -1), weight, bias, -1, eps)


@alternative("layer_norm")
def moves_the_dimension_to_the_end(x, weight, bias, dim, eps=1e-5):
    wide = _wide(x).movedim(dim, -1)
    variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    y = (wide - mean) / (variance + eps).sqrt() * weight + bias
    return y.movedim(-1, dim).to(x.dtype)


@alternative("layer_norm")
def computes_in_float64(x, weight, bias, dim, eps=1e-5):
    y = _layer_norm(x.double(), weight.double(), bias.double(), dim, eps)
    return y.to(x.dtype)


@alternative("layer_norm")
def projects_with_a_matrix(x, weight, bias, dim, eps=1e-5):
    wide = _wide(x).movedim(dim, -1)
    size = wide.shape[-1]
    centring = torch.eye(size, dtype=wide.dtype) - 1 / size
    centred = (wide - wide[..., :1]) @ centring
    y = centred / (torch.einsum("...d,...d->...", centred, centred) / size + eps).sqrt()[..., None]
    return (y * weight + bias).movedim(-1, dim).to(x.dtype)


# BatchNorm


class _BatchNorm(nn.Module):
    """A right BatchNorm with a joint wherever a misconception bends it."""

    def __init__(self, dim, momentum=0.1, eps=1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def over(self, x):
        return [d for d in range(x.ndim) if d != 1]

    def batch_statistics(self, x):
        return x.mean(self.over(x), True), x.var(self.over(x), correction=0, keepdim=True)

    def unbiased(self, x):
        return x.detach().var(self.over(x))

    def share(self):
        return self.momentum

    def remember(self, x):
        with torch.no_grad():
            self.running_mean.lerp_(x.mean(self.over(x)), self.share())
            self.running_var.lerp_(self.unbiased(x), self.share())

    def channel(self, v, x):
        return v.view(-1, *[1] * (x.ndim - 2))

    def scale(self, variance):
        return torch.rsqrt(variance + self.eps)

    def running_statistics(self, x):
        return self.channel(self.running_mean, x), self.channel(self.running_var, x)

    def check(self, x):
        if x.numel() // x.shape[1] < 2:
            raise ValueError("more than one value per channel")

    def forward(self, x):
        if self.training:
            self.check(x)
            self.remember(x)
            mean, variance = self.batch_statistics(x)
        else:
            mean, variance = self.running_statistics(x)
        y = (x - mean) * self.scale(variance)
        return y * self.channel(self.weight, x) + self.channel(self.bias, x)


@misconception(
    "BatchNorm",
    "Your evaluation uses the statistics of the batch at hand. It must use the running ones: an "
    "example's output may not depend on its neighbours, and a batch of one has no variance.",
    see=BATCH_NORM,
)
class uses_batch_statistics_in_evaluation(_BatchNorm):
    def running_statistics(self, x):
        return self.batch_statistics(x)


@misconception(
    "BatchNorm",
    "Your running variance takes the biased variance. Normalising divides by n, but the running "
    "variance estimates the population's: it takes the one divided by n - 1.",
    see=BATCH_NORM,
)
class keeps_a_biased_running_variance(_BatchNorm):
    def unbiased(self, x):
        return x.var(self.over(x), correction=0)


@misconception(
    "BatchNorm",
    "You normalise by the unbiased variance in training. Only the running variance divides by "
    "n - 1; the batch is normalised by its own, divided by n.",
    see=BATCH_NORM,
)
class normalises_by_the_unbiased_variance(_BatchNorm):
    def batch_statistics(self, x):
        return x.mean(self.over(x), True), x.var(self.over(x), keepdim=True)


@misconception(
    "BatchNorm",
    "Your momentum is the share of the old statistics, as in an optimizer. Here it is the share of "
    "the new batch: running = (1 - momentum) * running + momentum * batch.",
    see=BATCH_NORM,
)
class gives_momentum_to_the_old_statistics(_BatchNorm):
    def share(self):
        return 1 - self.momentum


@misconception(
    "BatchNorm",
    "Your running statistics change in evaluation. Then the test data leak into the model, and the "
    "order of evaluation matters.",
    see=BATCH_NORM,
)
class keeps_learning_in_evaluation(_BatchNorm):
    def running_statistics(self, x):
        before = super().running_statistics(x)
        before = [t.clone() for t in before]
        if x.shape[0] > 1:
            self.remember(x)
        return before


@misconception(
    "BatchNorm",
    "Your statistics are over the features of each example: that is LayerNorm. BatchNorm has one "
    "mean and variance a channel, over the batch.",
    see=BATCH_NORM,
)
class normalises_each_example(_BatchNorm):
    def batch_statistics(self, x):
        return x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)


@misconception(
    "BatchNorm",
    "For (N, C, L) your statistics are over the examples only. Positions count too: there is one "
    "mean and variance a channel.",
    see=BATCH_NORM,
)
class forgets_the_positions(_BatchNorm):
    def batch_statistics(self, x):
        return x.mean(0, keepdim=True), x.var(0, correction=0, keepdim=True)


@misconception(
    "BatchNorm",
    "Your eps is added to the standard deviation. It belongs under the root, to the variance.",
    see=HALF,
)
class adds_eps_beside_the_root(_BatchNorm):
    def scale(self, variance):
        return 1 / (variance.sqrt() + self.eps)


@misconception(
    "BatchNorm",
    "Your running variance takes n for the number of examples. With (N, C, L) input a channel has "
    "N * L values: n / (n - 1) counts them all.",
    see=BATCH_NORM,
)
class counts_the_examples_only(_BatchNorm):
    def unbiased(self, x):
        count = x.shape[0]
        return x.detach().var(self.over(x), correction=0) * count / max(count - 1, 1)


@misconception(
    "BatchNorm",
    "You refuse every batch of one example. What training needs is two values a channel: one "
    "example with several positions has them.",
    see=BATCH_NORM,
)
class refuses_a_batch_of_one(_BatchNorm):
    def check(self, x):
        if x.shape[0] < 2:
            raise ValueError("more than one example")


@misconception(
    "BatchNorm",
    "You normalise by the running statistics in training as well. In training each batch is "
    "normalised by its own mean and variance; the running ones are only kept for later.",
    see=BATCH_NORM,
)
class normalises_by_the_running_statistics_in_training(_BatchNorm):
    def batch_statistics(self, x):
        return self.running_statistics(x)


@misconception(
    "BatchNorm",
    "Your values are right, but the running statistics carry the graph of the step, and it that of "
    "the step before: memory grows with every step. Update them under torch.no_grad().",
    see=BATCH_NORM,
)
class keeps_the_graph_of_every_step(_BatchNorm):
    def remember(self, x):
        share = self.momentum
        mean, variance = x.mean(self.over(x)), x.var(self.over(x))
        self.running_mean = (1 - share) * self.running_mean + share * mean
        self.running_var = (1 - share) * self.running_var + share * variance


@alternative("BatchNorm")
class wraps_torch(nn.BatchNorm1d):
    def __init__(self, dim, momentum=0.1, eps=1e-5):
        super().__init__(dim, eps=eps, momentum=momentum)


@alternative("BatchNorm")
class flattens_to_a_matrix(_BatchNorm):
    def forward(self, x):
        rows = x.transpose(0, 1).flatten(1)  # (C, n)
        mean, variance = self.running_mean, self.running_var
        if self.training:
            self.check(x)
            mean, variance = rows.mean(1), rows.var(1, correction=0)
            m, n = self.momentum, rows.shape[1]
            self.running_mean = (1 - m) * self.running_mean + m * mean.detach()
            self.running_var = (1 - m) * self.running_var + m * variance.detach() * n / (n - 1)
        scale = self.weight / (variance + self.eps).sqrt()
        rows = rows * scale[:, None] + (self.bias - mean * scale)[:, None]
        return rows.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)


# add_rms_norm_backward


def _add_rms_norm_backward(grad_y, grad_total, total, weight, eps, *, through=None, reduce=None):
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    n, g = total * rstd, grad_y * weight
    grad = rstd * (g - n * (g * n).mean(-1, True)) if through is None else through(rstd, n, g)
    tokens = (grad_y * n).reshape(-1, weight.numel())
    return grad_total + grad, tokens.sum(0) if reduce is None else reduce(tokens)


@misconception(
    "add_rms_norm_backward",
    "You treat the root mean square as a constant. It depends on every feature, which takes away "
    "the part of the gradient that points along x.",
    see=BACKWARD,
)
def treats_the_root_mean_square_as_constant(grad_y, grad_total, total, weight, eps=1e-6):
    return _add_rms_norm_backward(
        grad_y, grad_total, total, weight, eps, through=lambda r, n, g: r * g
    )


@misconception(
    "add_rms_norm_backward",
    "Your gradient loses its mean as well, which is LayerNorm's. That normalising 'costs "
    "gradients' is true of one direction: RMSNorm forgets the length of x, so nothing comes back "
    "along x; all D - 1 others come back, scaled by 1 / rms.",
    see=BACKWARD,
)
def normalising_costs_gradients(grad_y, grad_total, total, weight, eps=1e-6):
    def through(r, n, g):
        return r * (g - g.mean(-1, True) - n * (g * n).mean(-1, True))

    return _add_rms_norm_backward(grad_y, grad_total, total, weight, eps, through=through)


@misconception(
    "add_rms_norm_backward",
    "The gradient of the skip path is missing. total leaves by two doors, and what comes back "
    "through both is added; without it a deep Pre-LN network would not learn.",
    see=BACKWARD,
)
def forgets_the_skip_path(grad_y, grad_total, total, weight, eps=1e-6):
    return _add_rms_norm_backward(grad_y, torch.zeros_like(total), total, weight, eps)


@misconception(
    "add_rms_norm_backward",
    "The skip path's gradient goes through the norm in your formula. Only y is behind the norm; "
    "total is in front of it.",
    see=BACKWARD,
)
def sends_the_skip_path_through_the_norm(grad_y, grad_total, total, weight, eps=1e-6):
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    n, g = total * rstd, grad_y * weight + grad_total
    grad = rstd * (g - n * (g * n).mean(-1, True))
    return grad, (grad_y * n).reshape(-1, weight.numel()).sum(0)


@misconception(
    "add_rms_norm_backward",
    "Your weight multiplies after the projection. It scales the output, so the gradient meets it "
    "first: g = grad_y * weight, then project g.",
    see=BACKWARD,
)
def multiplies_the_weight_last(grad_y, grad_total, total, weight, eps=1e-6):
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    n = total * rstd
    grad = weight * rstd * (grad_y - n * (grad_y * n).mean(-1, True))
    return grad_total + grad, (grad_y * n).reshape(-1, weight.numel()).sum(0)


@misconception(
    "add_rms_norm_backward",
    "Your weight gradient is averaged over the tokens. Each token adds its share: a sum (the mean, "
    "if wanted, comes from the loss).",
    see=BACKWARD,
)
def averages_the_weight_gradient(grad_y, grad_total, total, weight, eps=1e-6):
    return _add_rms_norm_backward(
        grad_y, grad_total, total, weight, eps, reduce=lambda tokens: tokens.mean(0)
    )


@misconception(
    "add_rms_norm_backward",
    "Your projection sums where it should average. The root MEAN square depends on each feature "
    "by x / D, so the term is the mean of g * n.",
    see=BACKWARD,
)
def sums_in_the_projection(grad_y, grad_total, total, weight, eps=1e-6):
    def through(r, n, g):
        return r * (g - n * (g * n).sum(-1, True))

    return _add_rms_norm_backward(grad_y, grad_total, total, weight, eps, through=through)


@misconception(
    "add_rms_norm_backward",
    "You send the skip path's gradient through the norm. grad_total arrives at total itself, "
    "beside the norm: add it at the end.",
    see=BACKWARD,
)
def sends_the_skip_gradient_through_the_norm(grad_y, grad_total, total, weight, eps=1e-6):
    grads = grad_y + grad_total
    return _add_rms_norm_backward(grads, torch.zeros_like(total), total, weight, eps)


@misconception(
    "add_rms_norm_backward",
    "Your gradient of total knows no weight. y = n * weight, so that what arrives at n is "
    "grad_y * weight.",
    see=BACKWARD,
)
def forgets_the_weight(grad_y, grad_total, total, weight, eps=1e-6):
    return _add_rms_norm_backward(grad_y, grad_total, total, torch.ones_like(weight), eps)


@misconception(
    "add_rms_norm_backward",
    "Your weight gradient takes total. What the weight multiplies is the normalised total, so that "
    "its gradient is the sum of grad_y * n.",
    see=BACKWARD,
)
def multiplies_by_the_unnormalised_total(grad_y, grad_total, total, weight, eps=1e-6):
    grad, _ = _add_rms_norm_backward(grad_y, grad_total, total, weight, eps)
    return grad, (grad_y * total).reshape(-1, weight.numel()).sum(0)


@alternative("add_rms_norm_backward")
def multiplies_by_the_jacobian(grad_y, grad_total, total, weight, eps=1e-6):
    dim = weight.numel()
    x, g = total.reshape(-1, dim), (grad_y * weight).reshape(-1, dim)
    ms = x.square().mean(-1) + eps
    outer = torch.einsum("ni,nj->nij", x, x) / (dim * ms[:, None, None])
    jacobian = (torch.eye(dim, dtype=x.dtype) - outer) / ms.sqrt()[:, None, None]
    grad_weight = torch.einsum("nd,nd,n->d", grad_y.reshape(-1, dim), x, ms.rsqrt())
    return grad_total + torch.einsum("nij,nj->ni", jacobian, g).view(total.shape), grad_weight


@alternative("add_rms_norm_backward")
def writes_the_cube_of_the_root(grad_y, grad_total, total, weight, eps=1e-6):
    rms = (total.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    g = grad_y * weight
    grad = g / rms - total * (g * total).sum(-1, keepdim=True) / (weight.numel() * rms**3)
    grad += grad_total
    every = list(range(total.ndim - 1))
    grad_weight = grad_y * total / rms
    return grad, grad_weight.sum(every) if every else grad_weight


@alternative("add_rms_norm_backward")
def asks_autograd(grad_y, grad_total, total, weight, eps=1e-6):
    total, weight = total.detach().requires_grad_(), weight.detach().requires_grad_()
    y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight
    grad, grad_weight = torch.autograd.grad(y, (total, weight), grad_y)
    return grad + grad_total, grad_weight


# deepnorm_residual


@misconception(
    "deepnorm_residual",
    "Your result is the program's as it came. Try it with alpha = 1 and with a large alpha: what "
    "is left of the sum?",
    see=DEEPNORM,
    is_starter=True,
)
def nothing_is_repaired_yet(x, update, weight, bias, alpha, eps=1e-5):
    return F.layer_norm(x + alpha * update, weight.shape, weight, bias, eps)


@misconception(
    "deepnorm_residual",
    "Your alpha multiplies the whole sum. The norm after it divides it out again, so that nothing "
    "but Post-LN is left.",
    see=DEEPNORM,
)
def alpha_scales_the_sum(x, update, weight, bias, alpha, eps=1e-5):
    return F.layer_norm(alpha * (x + update), weight.shape, weight, bias, eps)


@misconception(
    "deepnorm_residual",
    "Your skip path goes around the norm. DeepNorm is a Post-LN: the norm takes the sum.",
    see=PLACEMENT,
)
def normalises_the_update_only(x, update, weight, bias, alpha, eps=1e-5):
    return alpha * x + F.layer_norm(update, weight.shape, weight, bias, eps)


@misconception(
    "deepnorm_residual",
    "Your sublayer is divided by alpha and then the skip path multiplied by it as well. Once is "
    "enough: the norm sees only the ratio of the two.",
    see=DEEPNORM,
)
def applies_alpha_twice(x, update, weight, bias, alpha, eps=1e-5):
    return F.layer_norm(alpha * x + update / alpha, weight.shape, weight, bias, eps)


@misconception(
    "deepnorm_residual",
    "You divide the sublayer by alpha. The ratio of the branches is right, but the total is alpha "
    "times smaller, so that eps beside its variance counts for more: multiply the skip path.",
    see=DEEPNORM,
)
def divides_the_update_and_keeps_eps(x, update, weight, bias, alpha, eps=1e-5):
    return F.layer_norm(x + update / alpha, weight.shape, weight, bias, eps)


@misconception(
    "deepnorm_residual",
    "alpha is missing: this is Post-LN.",
    see=DEEPNORM,
)
def forgets_alpha(x, update, weight, bias, alpha, eps=1e-5):
    return F.layer_norm(x + update, weight.shape, weight, bias, eps)


@alternative("deepnorm_residual")
def divides_the_update_by_alpha(x, update, weight, bias, alpha, eps=1e-5):
    return F.layer_norm(x + update / alpha, weight.shape, weight, bias, eps / alpha**2)


@alternative("deepnorm_residual")
def adds_with_a_factor(x, update, weight, bias, alpha, eps=1e-5):
    return F.layer_norm(torch.add(update, x, alpha=alpha), weight.shape, weight, bias, eps)


# deepnorm_plan


def _plan(placement, num_layers, dim, *, alpha=None, beta=None, extra=0, post_update=None):
    is_deep = placement == "deepnorm"
    a = (alpha or (2 * num_layers) ** 0.25) if is_deep else 1.0
    b = (beta or (8 * num_layers) ** -0.25) if is_deep else 1.0
    update = 2 * num_layers * (b**2 + b**2) / a**2
    if not is_deep and post_update is not None:
        update = post_update
    trainable = 2 * num_layers * 2 * dim + (extra if is_deep else 0)
    return {"alpha": a, "beta": b, "trainable": trainable, "update": update}


@misconception(
    "deepnorm_plan",
    "You count alpha among the trainable numbers. It is a constant of the depth, computed once: "
    "neither it nor beta gets a gradient.",
    see=DEEPNORM,
)
def alpha_is_learnable(placement, num_layers, dim):
    return _plan(placement, num_layers, dim, extra=2 * num_layers)


@misconception(
    "deepnorm_plan",
    "Your Post-LN moves alike at every depth, as if it were stable by itself. Its bound grows with "
    "the number of sublayers: that is why it needs warm-up, and why DeepNorm exists.",
    see=PLACEMENT,
)
def post_ln_is_stable_by_itself(placement, num_layers, dim):
    return _plan(placement, num_layers, dim, post_update=1.0)


@misconception(
    "deepnorm_plan",
    "Your constants take N for the number of sublayers. In the paper's table N counts layers, each "
    "with two sublayers: (2N)^(1/4) has the 2 already.",
    see=DEEPNORM,
)
def counts_sublayers_as_layers(placement, num_layers, dim):
    n = 2 * num_layers
    return _plan(placement, num_layers, dim, alpha=(2 * n) ** 0.25, beta=(8 * n) ** -0.25)


@misconception(
    "deepnorm_plan",
    "Your beta multiplies by (8N)^(1/4). It shrinks the initial weights: the exponent is -1/4.",
    see=DEEPNORM,
)
def enlarges_the_initial_weights(placement, num_layers, dim):
    return _plan(placement, num_layers, dim, beta=(8 * num_layers) ** 0.25)


@misconception(
    "deepnorm_plan",
    "These are the constants of an encoder-decoder model's decoder, (3M)^(1/4) and (12M)^(-1/4): "
    "three sublayers a layer, one of them cross-attention. A decoder-only layer has two.",
    see=DEEPNORM,
)
def uses_the_constants_with_cross_attention(placement, num_layers, dim):
    alpha, beta = (3 * num_layers) ** 0.25, (12 * num_layers) ** -0.25
    return _plan(placement, num_layers, dim, alpha=alpha, beta=beta)


@misconception(
    "deepnorm_plan",
    "Your trainable is half of it. A layer has two norms, one after each sublayer, and each norm "
    "has a weight and a bias.",
    see=DEEPNORM,
)
def counts_half_of_the_norms(placement, num_layers, dim):
    return _plan(placement, num_layers, dim) | {"trainable": 2 * num_layers * dim}


@misconception(
    "deepnorm_plan",
    "Your update is half of it. There are 2N sublayers, and each adds v^2 and w^2.",
    see=DEEPNORM,
)
def counts_half_of_the_update(placement, num_layers, dim):
    plan = _plan(placement, num_layers, dim)
    return plan | {"update": plan["update"] / 2}


@alternative("deepnorm_plan")
def takes_roots_of_roots(placement, num_layers, dim):
    deep = placement == "deepnorm"
    alpha = math.sqrt(math.sqrt(2 * num_layers)) if deep else 1
    beta = 1 / math.sqrt(math.sqrt(8 * num_layers)) if deep else 1
    update = 1.0 if deep else 4.0 * num_layers
    return {"update": update, "trainable": num_layers * dim * 4, "beta": beta, "alpha": alpha}


@alternative("deepnorm_plan")
def sums_sublayer_by_sublayer(placement, num_layers, dim):
    plan = _plan(placement, num_layers, dim)
    sublayers = [(plan["beta"], plan["beta"]) for _ in range(2 * num_layers)]
    plan["update"] = sum(v * v + w * w for v, w in sublayers) / plan["alpha"] ** 2
    plan["trainable"] = sum(dim + dim for _ in sublayers)
    return plan


# masked_batch_norm


def _masked(x, is_real, weight, bias, eps, mean, variance):
    y = (x - mean) * torch.rsqrt(variance + eps) * weight + bias
    return torch.where(is_real[..., None], y, torch.zeros_like(y))


@misconception(
    "masked_batch_norm",
    "Your statistics count the padding. Then what a sequence gives depends on how long its "
    "neighbours are.",
    see=PADDING,
)
def counts_the_padding(x, is_real, weight, bias, eps=1e-5):
    rows = x.flatten(0, 1)
    return _masked(x, is_real, weight, bias, eps, rows.mean(0), rows.var(0, correction=0))


@misconception(
    "masked_batch_norm",
    "You sum the real positions but divide by all of them. Divide by the number that are real, "
    "both for the mean and for the variance.",
    see=PADDING,
)
def divides_by_all_positions(x, is_real, weight, bias, eps=1e-5):
    real, count = x[is_real], is_real.numel()
    mean = real.sum(0) / count
    variance = (real - mean).square().sum(0) / count
    return _masked(x, is_real, weight, bias, eps, mean, variance)


@misconception(
    "masked_batch_norm",
    "Padding set to zero still counts as zeros: the mean is drawn towards 0. Leave it out of the "
    "sums and of the number that divides.",
    see=PADDING,
)
def sets_padding_to_zero_and_counts_it(x, is_real, weight, bias, eps=1e-5):
    rows = torch.where(is_real[..., None], x, torch.zeros_like(x)).flatten(0, 1)
    return _masked(x, is_real, weight, bias, eps, rows.mean(0), rows.var(0, correction=0))


@misconception(
    "masked_batch_norm",
    "You hide padding by multiplying with the mask. NaN and infinity survive that (0 * NaN = NaN): "
    "choose with indexing or torch.where.",
    see=PADDING,
)
def hides_padding_by_multiplying(x, is_real, weight, bias, eps=1e-5):
    keep = is_real[..., None].to(x.dtype)
    count = keep.sum()
    mean = (x * keep).sum((0, 1)) / count
    variance = ((x - mean).square() * keep).sum((0, 1)) / count
    return ((x - mean) * torch.rsqrt(variance + eps) * weight + bias) * keep


@misconception(
    "masked_batch_norm",
    "Each sequence is normalised by itself. BatchNorm shares one mean and variance a channel among "
    "all real positions of the batch.",
    see=PADDING,
)
def normalises_each_sequence(x, is_real, weight, bias, eps=1e-5):
    out = torch.zeros_like(x)
    for i, real in enumerate(is_real):
        rows = x[i, real]
        y = (rows - rows.mean(0)) * torch.rsqrt(rows.var(0, correction=0) + eps)
        out[i, real] = y * weight + bias
    return out


@misconception(
    "masked_batch_norm",
    "Your padded positions hold the bias. It is added after the mask there; the mask comes last.",
    see=PADDING,
)
def leaves_the_bias_in_padded_positions(x, is_real, weight, bias, eps=1e-5):
    real = x[is_real]
    out = torch.zeros_like(x)
    out[is_real] = (real - real.mean(0)) * torch.rsqrt(real.var(0, correction=0) + eps)
    return out * weight + bias


@misconception(
    "masked_batch_norm",
    "Your variance divides by one less, tensor.var's default. The batch is normalised by the plain "
    "mean of the squares: correction=0.",
    see=BATCH_NORM,
)
def divides_by_one_less(x, is_real, weight, bias, eps=1e-5):
    real = x[is_real]
    return _masked(x, is_real, weight, bias, eps, real.mean(0), real.var(0))


@misconception(
    "masked_batch_norm",
    "Your mean is right, but padding counts in the variance: set to zero before the mean was "
    "subtracted, each padded position adds mean^2. Mask after centring.",
    see=PADDING,
)
def counts_padding_in_the_variance(x, is_real, weight, bias, eps=1e-5):
    filled, count = x.masked_fill(~is_real[..., None], 0), is_real.sum()
    mean = filled.sum((0, 1)) / count
    variance = (filled - mean).square().sum((0, 1)) / count
    return _masked(x, is_real, weight, bias, eps, mean, variance)


@misconception(
    "masked_batch_norm",
    "Your statistics are right, but you clear the padding of the result by a product, and 0 * NaN "
    "is NaN. Choose with indexing or torch.where there, too.",
    see=PADDING,
)
def multiplies_the_result_by_the_mask(x, is_real, weight, bias, eps=1e-5):
    real = x[is_real]
    y = (x - real.mean(0)) * torch.rsqrt(real.var(0, correction=0) + eps) * weight + bias
    return y * is_real[..., None]


@misconception(
    "masked_batch_norm",
    "You average the means of the sequences. Then a token of a short sequence counts for more: "
    "every real position counts alike.",
    see=PADDING,
)
def averages_over_the_sequences(x, is_real, weight, bias, eps=1e-5):
    keep, count = is_real[..., None], is_real.sum(1, keepdim=True).clamp(min=1)
    mean = (x.masked_fill(~keep, 0).sum(1) / count).mean(0)
    centred = (x - mean).masked_fill(~keep, 0)
    variance = (centred.square().sum(1) / count).mean(0)
    return _masked(x, is_real, weight, bias, eps, mean, variance)


@alternative("masked_batch_norm")
def sums_with_where(x, is_real, weight, bias, eps=1e-5):
    keep, zero = is_real[..., None], torch.zeros((), dtype=x.dtype)
    count = is_real.sum()
    mean = torch.where(keep, x, zero).sum((0, 1)) / count
    centred = torch.where(keep, x - mean, zero)
    variance = torch.einsum("btc,btc->c", centred, centred) / count
    return torch.where(keep, centred / (variance + eps).sqrt() * weight + bias, zero)


@alternative("masked_batch_norm")
def asks_torch_for_the_real_rows(x, is_real, weight, bias, eps=1e-5):
    out = torch.zeros_like(x)
    out[is_real] = F.batch_norm(x[is_real], None, None, weight, bias, True, eps=eps)
    return out


# streamed_statistics


def _parts(blocks):
    return [(len(b), b.mean(0), b.var(0, correction=0)) for b in blocks if len(b)]


@misconception(
    "streamed_statistics",
    "You average the blocks' means as if all blocks were equally long. A block counts by its rows.",
    see=ONE_PASS,
)
def averages_the_means_of_the_blocks(blocks):
    parts = _parts(blocks)
    mean = sum(m for _, m, _ in parts) / len(parts)
    return mean, sum(v + (m - mean).square() for _, m, v in parts) / len(parts)


@misconception(
    "streamed_statistics",
    "You average the variances within the blocks. How far their means lie apart counts as well: "
    "add gap^2 * count * n / (count + n) at each merge.",
    see=ONE_PASS,
)
def forgets_the_variance_between_blocks(blocks):
    parts = _parts(blocks)
    total = sum(n for n, _, _ in parts)
    mean = sum(n * m for n, m, _ in parts) / total
    return mean, sum(n * v for n, _, v in parts) / total


@misconception(
    "streamed_statistics",
    "Your variance is E[x^2] - E[x]^2. With a mean of 8192 both terms are 67 million, where "
    "float32 numbers lie 4 to 8 apart: the difference is noise. Keep deviations from the running "
    "mean.",
    see=ONE_PASS,
)
def subtracts_the_square_of_the_mean(blocks):
    total = sum(len(b) for b in blocks)
    mean = sum(b.sum(0) for b in blocks) / total
    return mean, sum(b.square().sum(0) for b in blocks) / total - mean.square()


@misconception(
    "streamed_statistics",
    "Your variance divides by n - 1. A norm divides by n.",
    see=LAYER_NORM,
)
def divides_the_sum_by_one_less(blocks):
    joined = torch.cat(blocks)
    centred = joined - joined.mean(0)
    return joined.mean(0), centred.square().sum(0) / (len(joined) - 1)


@misconception(
    "streamed_statistics",
    "You join the blocks first. The values are right, but the memory is what the exercise is "
    "about: data that do not fit cannot be joined.",
    see=ONE_PASS,
)
def joins_all_blocks(blocks):
    joined = torch.cat(blocks)
    return joined.mean(0), (joined - joined.mean(0)).square().mean(0)


@misconception(
    "streamed_statistics",
    "You go to float64, where E[x^2] - E[x]^2 keeps enough digits for this mean. The copy is twice "
    "as large as the block, and an accelerator may have no float64: merge deviations in float32.",
    see=ONE_PASS,
)
def goes_to_float64(blocks):
    total = sum(len(b) for b in blocks)
    sums = squares = 0
    for block in blocks:
        sums = sums + block.double().sum(0)
        squares = squares + block.double().square().sum(0)
    mean = sums / total
    return mean.float(), (squares / total - mean.square()).float()


@misconception(
    "streamed_statistics",
    "You read the blocks twice: for the mean, and for the deviations from it. The values are "
    "right, but a stream passes by once: merge each block's own mean and deviations.",
    see=ONE_PASS,
)
def reads_every_block_twice(blocks):
    total = sum(len(b) for b in blocks)
    mean = sum(b.mean(0) * (len(b) / total) for b in blocks if len(b))
    return mean, sum((b - mean).square().sum(0) for b in blocks) / total


@misconception(
    "streamed_statistics",
    "You move the running mean before you use it: the gap in gap^2 * count * n / (count + n) is "
    "between the block's mean and the mean of what came BEFORE.",
    see=ONE_PASS,
)
def takes_the_gap_to_the_new_mean(blocks):
    count, mean, deviations = 0, 0.0, 0.0
    for n, m, v in _parts(blocks):
        mean = mean + (m - mean) * (n / (count + n))
        deviations = deviations + n * v + (m - mean).square() * (count * n / (count + n))
        count += n
    return mean, deviations / count


@misconception(
    "streamed_statistics",
    "An empty block makes everything NaN: the mean of no rows is 0 / 0. Pass over blocks without "
    "rows.",
    see=ONE_PASS,
)
def empty_blocks_become_nan(blocks):
    count, mean, deviations = 0, 0.0, 0.0
    for block in blocks:
        n, m = len(block), block.mean(0)
        gap = m - mean
        deviations = deviations + (block - m).square().sum(0)
        deviations = deviations + gap.square() * (count * n / max(count + n, 1))
        mean = mean + gap * (n / max(count + n, 1))
        count += n
    return mean, deviations / count


@alternative("streamed_statistics")
def goes_row_by_row_as_welford(blocks):
    count, mean = 0, torch.zeros(blocks[0].shape[1])
    deviations = torch.zeros_like(mean)
    for block in blocks:
        for row in block:
            count += 1
            before = row - mean
            mean = mean + before / count
            deviations = deviations + before * (row - mean)
    return mean, deviations / count


@alternative("streamed_statistics")
def shifts_by_the_first_row(blocks):
    shift = next(b[0] for b in blocks if len(b))
    count, total, squares = 0, 0.0, 0.0
    for block in blocks:
        shifted = block - shift
        count += len(block)
        total, squares = total + shifted.sum(0), squares + shifted.square().sum(0)
    return shift + total / count, squares / count - (total / count).square()


@alternative("streamed_statistics")
def merges_in_a_tree(blocks):
    parts = [(n, m, n * v) for n, m, v in _parts(blocks)]
    while len(parts) > 1:
        (n, m, s), (k, o, t) = parts.pop(0), parts.pop(0)
        parts.append((n + k, m + (o - m) * (k / (n + k)), s + t + (o - m) ** 2 * (n * k / (n + k))))
    count, mean, deviations = parts[0]
    return mean, deviations / count
