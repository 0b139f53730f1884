"""A parallel layer is a smaller layer: which rows or columns of a matrix a rank keeps.

    column-parallel   y = x W^T, W cut by outputs      each rank: a part of y, from all of x
    row-parallel      y = x W^T, W cut by inputs       each rank: a summand of y, from a part of x

A column-parallel layer makes what a row-parallel one takes, so a pair of them needs one sum. In
between, anything that is done to each number, or each head, by itself.

Paper: Megatron-LM, 1909.08053, sec. 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reference.parallel.ranks import Comm
from reference.parallel.tensor.operators import copy_to_ranks, sum_over_ranks


def part_of(x: Tensor, comm: Comm, dim: int, what: str) -> Tensor:
    """This rank's part of a tensor that all hold, a copy.

    Raises: ValueError where it cannot be cut into equal parts.
    """
    if x.shape[dim] % comm.size:
        raise ValueError(
            f"{what}: expected a multiple of {comm.size}, the number of ranks, got {x.shape[dim]}"
        )
    return x.detach().chunk(comm.size, dim)[comm.rank].clone(memory_format=torch.contiguous_format)


def linear_like(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """An nn.Linear with these as its parameters."""
    num_outputs, num_inputs = weight.shape
    layer = nn.Linear(num_inputs, num_outputs, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def column_part(layer: nn.Linear, comm: Comm) -> nn.Linear:
    """The rows of the weight, and of the bias, that make this rank's outputs."""
    weight = part_of(layer.weight, comm, 0, "out_features")
    bias = None if layer.bias is None else part_of(layer.bias, comm, 0, "out_features")
    return linear_like(weight, bias)


def row_part(layer: nn.Linear, comm: Comm) -> nn.Linear:
    """The columns of the weight that take this rank's inputs; its output is a summand of the sum.

    The bias is left out: it belongs to the sum, once.
    """
    return linear_like(part_of(layer.weight, comm, 1, "in_features"))


class ColumnParallelLinear(nn.Module):
    """An nn.Linear cut by outputs: x (..., D) on all ranks -> this rank's (..., F/N)."""

    def __init__(self, layer: nn.Linear, comm: Comm) -> None:
        super().__init__()
        self.part, self.comm = column_part(layer, comm), comm

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... f"]:
        return self.part(copy_to_ranks(x, self.comm))


class RowParallelLinear(nn.Module):
    """An nn.Linear cut by inputs: this rank's (..., D/N) -> y (..., F) on all ranks."""

    def __init__(self, layer: nn.Linear, comm: Comm) -> None:
        super().__init__()
        self.part, self.comm = row_part(layer, comm), comm
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... F"]:
        y = sum_over_ranks(self.part(x), self.comm)
        return y if self.bias is None else y + self.bias


class SharedLinear(nn.Module):
    """A weight of which several ranks hold the same copy and compute with different inputs to it.

    Its gradient is summed over them, or the copies would drift apart: key and value heads where
    there are fewer of them than ranks.
    """

    def __init__(self, weight: Tensor, comm: Comm) -> None:
        super().__init__()
        self.weight, self.comm = nn.Parameter(weight), comm

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... f"]:
        return F.linear(x, copy_to_ranks(self.weight, self.comm))
