"""Batch normalization over the rows of all ranks.

A BatchNorm on each rank normalizes with the statistics of its own rows: another function than one
rank with all rows computes, and a noisy one where rows are few. SyncBatchNorm joins them:

    forward     all-gather [mean, sum (x - mean)^2, n] of each rank, and merge
    backward    all-reduce [sum dy, sum dy xhat]       since each rank's rows moved everyone's mean

    n = sum n_r     mean = sum n_r mean_r / n     n var = sum (M_r + n_r (mean_r - mean)^2)

Nothing is subtracted from a sum of squares: at a mean of 1000 and a deviation of 0.1, float32 has
no digit left of E[x^2] - E[x]^2, which may even be negative.

Paper: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances, 1979.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from reference.parallel.ranks import Comm


class Moments(NamedTuple):
    """Of each channel: the mean, the sum of squares around it, and the number of values."""

    mean: Float[Tensor, " C"]
    squares: Float[Tensor, " C"]
    num_values: Float[Tensor, ""]


def moments(x: Float[Tensor, "B C L"], comm: Comm) -> Moments:
    """Of all ranks' values together; each may have another number of them, or none.

    In float32 at least. One all-gather.

    Source: Chan et al., 1979.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    channels, count = x.shape[1], x.shape[0] * x.shape[2]
    mean = wide.mean((0, 2)) if count else wide.new_zeros(channels)
    squares = (wide - mean[:, None]).square().sum((0, 2))
    mine = torch.cat([mean, squares, wide.new_tensor([count])])
    means, squares, counts = comm.all_gather(mine[None]).split([channels, channels, 1], 1)
    total = counts.sum()
    about = means[counts.argmax()]  # whose distances to the others are small, and exact
    mean = about + (counts / total.clamp(min=1) * (means - about)).sum(0)
    squares = (squares + counts * (means - mean).square()).sum(0)
    return Moments(mean, squares, total)


class _Normalize(torch.autograd.Function):
    """x (B, C, L), weight and bias (C,) or None -> y of x's dtype, and the moments."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, comm: Comm
    ) -> tuple[Tensor, ...]:
        mean, squares, count = moments(x, comm)
        if not count.is_meta and count <= 1:
            raise ValueError(
                f"x: expected more than 1 value a channel over all ranks, got {int(count)}; a "
                "variance needs two: larger batches, or evaluation"
            )
        inverse = (squares / count + eps).rsqrt()
        y = (x - mean[:, None]) * inverse[:, None]
        if weight is not None:
            y = y * weight[:, None]
        if bias is not None:
            y = y + bias[:, None]
        ctx.save_for_backward(x, weight, mean, inverse, count)
        ctx.comm, ctx.bias_dtype = comm, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, squares, count)
        return y.to(x.dtype), mean, squares, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, mean, inverse, count = ctx.saved_tensors
        grad = grads[0].to(mean.dtype)
        xhat = (x - mean[:, None]) * inverse[:, None]
        grad_bias, grad_weight = grad.sum((0, 2)), (grad * xhat).sum((0, 2))
        means = ctx.comm.all_reduce(torch.stack([grad_bias, grad_weight])) / count
        grad_x = (grad - means[0][:, None] - xhat * means[1][:, None]) * inverse[:, None]
        if weight is None:
            return grad_x.to(x.dtype), None, None, None, None
        grad_x = (grad_x * weight[:, None]).to(x.dtype)
        grad_weight = grad_weight.to(weight.dtype)
        return grad_x, grad_weight, grad_bias.to(ctx.bias_dtype), None, None


class SyncBatchNorm(_BatchNorm):
    """BatchNorm1d, 2d or 3d over the rows of all ranks of `comm`.

    Made from a BatchNorm, with which it shares weights and running statistics under their names. In
    evaluation it is that BatchNorm. Ranks may have different numbers of rows, or none. Statistics
    in float32 at least; the result in the dtype of x.

    Raises: TypeError for another module; in training, ValueError for less than two values a channel
    over all ranks, another number of channels, or an eps that is not above 0.
    """

    inner: _BatchNorm
    comm: Comm

    def __init__(self, batch_norm: nn.Module, comm: Comm) -> None:
        if not isinstance(batch_norm, _BatchNorm):
            raise TypeError(f"batch_norm: expected a BatchNorm, got {type(batch_norm).__name__}")
        if isinstance(batch_norm, nn.modules.lazy.LazyModuleMixin):
            raise TypeError("batch_norm: expected its number of channels, got a lazy one; run it")
        nn.Module.__init__(self)
        self.__dict__.update(batch_norm.__dict__)
        self.__dict__.update(inner=batch_norm, comm=comm)  # no submodule: names stay as they were

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        """Collective in training."""
        self._check_input_dim(x)
        if not self.training and self.running_mean is not None:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        if x.shape[1] != self.num_features:
            raise ValueError(f"x: expected {self.num_features} channels, got {x.shape[1]}")
        if self.eps <= 0:
            raise ValueError(f"eps: expected above 0, got {self.eps}")
        flat = x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))
        y, *found = _Normalize.apply(flat, self.weight, self.bias, self.eps, self.comm)
        if self.training:
            self._update(Moments(*found))
        return y.reshape(x.shape)

    @torch.no_grad()
    def _update(self, found: Moments) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        weight = 1 / float(self.num_batches_tracked) if momentum is None else momentum
        unbiased = found.squares / (found.num_values - 1)
        for running, new in ((self.running_mean, found.mean), (self.running_var, unbiased)):
            running.copy_(running.to(new.dtype).lerp(new, weight))

    def _check_input_dim(self, x: Tensor) -> None:
        self.inner._check_input_dim(x)


def convert(module: nn.Module, comm: Comm) -> nn.Module:
    """Replace each BatchNorm within `module`, in place; returns the module, or its replacement."""
    if isinstance(module, SyncBatchNorm):
        return module
    if isinstance(module, _BatchNorm):
        return SyncBatchNorm(module, comm)
    for name, child in module.named_children():
        setattr(module, name, convert(child, comm))
    return module
