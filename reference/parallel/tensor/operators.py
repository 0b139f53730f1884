"""The operators at the borders of a parallel region, each the other's backward.

Outside of the region all ranks hold the same activations, or each its own part of the positions;
inside each has the whole input and a part of the weights. Entering and leaving:

                              forward           backward
    copy_to_ranks     f       nothing           all-reduce
    sum_over_ranks    g       all-reduce        nothing
    gather_positions  g       all-gather        reduce-scatter      (sequence parallel)
    scatter_sum       g-bar   reduce-scatter    all-gather          (sequence parallel)
    gather_outputs            all-gather        nothing             (logits, once, at the end)

Papers: f and g, Megatron-LM, 1909.08053, sec. 3; with positions, Korthikanti et al., 2205.05198,
sec. 4.2.2.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reference.parallel.ranks import Comm


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.comm.all_reduce(grads[0].clone(memory_format=torch.contiguous_format)), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        return comm.all_reduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm, dim: int) -> Tensor:
        ctx.comm, ctx.dim = comm, dim
        return _all_gather(x, comm, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grads[0], ctx.comm, ctx.dim), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm, dim: int) -> Tensor:
        ctx.comm, ctx.dim = comm, dim
        return _reduce_scatter(x, comm, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grads[0], ctx.comm, ctx.dim), None, None


class _GatherOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return _all_gather(x, comm, x.ndim - 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].chunk(ctx.comm.size, -1)[ctx.comm.rank].contiguous(), None


def copy_to_ranks(x: Float[Tensor, "*shape"], comm: Comm) -> Float[Tensor, "*shape"]:
    """f: x as it is, which all ranks hold; backward sums what each rank's part says about it."""
    return _Copy.apply(x, comm)


def sum_over_ranks(x: Float[Tensor, "*shape"], comm: Comm) -> Float[Tensor, "*shape"]:
    """g: the sum of all ranks' parts; the gradient, which all ranks hold, goes on as it is."""
    return _Sum.apply(x, comm)


def gather_positions(x: Float[Tensor, "B t D"], comm: Comm, dim: int = 1) -> Float[Tensor, "B T D"]:
    """All positions, of which each rank holds t = T/N; backward sums, and gives each its own."""
    return _Gather.apply(x, comm, dim)


def gather_outputs(x: Float[Tensor, "*shape v"], comm: Comm) -> Float[Tensor, "*shape V"]:
    """All outputs, of which each rank has a part; the gradient, which all hold, is cut again."""
    return _GatherOutputs.apply(x, comm)


def scatter_sum(x: Float[Tensor, "B T D"], comm: Comm, dim: int = 1) -> Float[Tensor, "B t D"]:
    """This rank's positions of the sum of all ranks' parts; backward gathers the gradient.

    Raises: ValueError where the positions do not divide by the number of ranks.
    """
    if x.shape[dim] % comm.size:
        raise ValueError(
            f"x: expected dimension {dim} to be a multiple of {comm.size}, the number of ranks; "
            f"got shape {tuple(x.shape)}; pad the text"
        )
    return _ScatterSum.apply(x, comm, dim)


def check_no_gradient(**tensors: Tensor) -> None:
    """Raises: ValueError for a tensor that asks for a gradient, which would not come back."""
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor without requires_grad, or torch.no_grad(): no gradient "
                "comes back through these messages; layers.py has layers that learn"
            )


def _all_gather(x: Tensor, comm: Comm, dim: int) -> Tensor:
    return comm.all_gather(x.transpose(0, dim).contiguous()).transpose(0, dim).contiguous()


def _reduce_scatter(x: Tensor, comm: Comm, dim: int) -> Tensor:
    return comm.reduce_scatter(x.transpose(0, dim).contiguous()).transpose(0, dim).contiguous()
