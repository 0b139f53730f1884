"""Batch normalization over the rows of all ranks.

A BatchNorm on each rank normalizes with the statistics of its own rows: another function than one
rank with all rows computes, and a noisy one where rows are few. SyncBatchNorm sums first:

    forward     all-reduce [sum x, sum x^2, count]     mean and variance of all rows
    backward    all-reduce [sum dy, sum dy xhat]       since each rank's rows moved everyone's mean
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reference.parallel.ranks import Comm


class _Normalize(torch.autograd.Function):
    """x (B, C, L) -> (x - mean) / sqrt(var + eps), with mean and var (C,) over all ranks' rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, comm: Comm) -> tuple[Tensor, ...]:
        channels = x.shape[1]
        count = x.new_full((1,), x.numel() // channels)
        sums = torch.cat([x.sum((0, 2)), x.square().sum((0, 2)), count])
        comm.all_reduce(sums)
        total, squares, count = sums.split([channels, channels, 1])
        mean = total / count
        var = squares / count - mean.square()
        inverse = (var + eps).rsqrt()
        xhat = (x - mean[:, None]) * inverse[:, None]
        ctx.save_for_backward(xhat, inverse, count)
        ctx.comm = comm
        ctx.mark_non_differentiable(mean, var, count)
        return xhat, mean, var, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0]
        xhat, inverse, count = ctx.saved_tensors
        sums = torch.cat([grad.sum((0, 2)), (grad * xhat).sum((0, 2))])
        ctx.comm.all_reduce(sums)
        mean_grad, mean_grad_xhat = (sums / count).chunk(2)
        grad_x = grad - mean_grad[:, None] - xhat * mean_grad_xhat[:, None]
        return grad_x * inverse[:, None], None, None


class SyncBatchNorm(nn.Module):
    """BatchNorm1d, 2d or 3d over the rows of all ranks of `comm`.

    Made from a BatchNorm, whose weights and running statistics it takes over. In evaluation it is
    that BatchNorm. Ranks may have different numbers of rows, but each at least one.

    Raises: TypeError for another module.
    """

    def __init__(self, batch_norm: nn.Module, comm: Comm) -> None:
        super().__init__()
        if not isinstance(batch_norm, nn.modules.batchnorm._BatchNorm):
            raise TypeError(f"batch_norm: expected a BatchNorm, got {type(batch_norm).__name__}")
        self.inner, self.comm = batch_norm, comm

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        bn = self.inner
        if not (self.training or bn.running_mean is None):
            return bn(x)
        flat = x.reshape(x.shape[0], x.shape[1], -1)
        xhat, mean, var, count = _Normalize.apply(flat, bn.eps, self.comm)
        self._update(mean, var * count / (count - 1))
        if bn.weight is not None:
            xhat = xhat * bn.weight[:, None] + bn.bias[:, None]
        return xhat.view(x.shape)

    @torch.no_grad()
    def _update(self, mean: Tensor, unbiased_var: Tensor) -> None:
        bn = self.inner
        if bn.running_mean is None or bn.running_var is None or not self.training:
            return
        assert bn.num_batches_tracked is not None
        bn.num_batches_tracked += 1
        momentum = bn.momentum
        weight = 1 / float(bn.num_batches_tracked) if momentum is None else momentum
        bn.running_mean.lerp_(mean, weight)
        bn.running_var.lerp_(unbiased_var, weight)


def convert(module: nn.Module, comm: Comm) -> nn.Module:
    """Replace each BatchNorm within `module`, in place; returns the module, or its replacement."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return SyncBatchNorm(module, comm)
    for name, child in module.named_children():
        setattr(module, name, convert(child, comm))
    return module
