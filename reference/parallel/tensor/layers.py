"""A parallel layer is a smaller layer: which rows or columns of a matrix a rank keeps.

    column-parallel   y = x W^T, W cut by outputs      each rank: a part of y, from all of x
    row-parallel      y = x W^T, W cut by inputs       each rank: a summand of y, from a part of x

A column-parallel layer makes what a row-parallel one takes, so a pair of them needs one sum. In
between, anything that is done to each number, or each head, by itself.

A part has the names of the layer that it is cut from, and `cut.adopt` sees to the rest: what was
frozen stays frozen, and each module says in `cuts` which of its parameters are divided.

Paper: Megatron-LM, 1909.08053, sec. 3.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reference.parallel.ranks import Comm
from reference.parallel.tensor.cut import Cut, adopt
from reference.parallel.tensor.cut import part_of as part_of
from reference.parallel.tensor.operators import copy_to_ranks, sum_over_ranks


class ColumnPart(nn.Linear):
    """The rows of a layer's weight, and of its bias, that make this rank's outputs.

    `copies` neighbouring ranks have the same rows.

    Raises: ValueError where the outputs do not divide.
    """

    def __init__(self, layer: nn.Linear, comm: Comm, *, copies: int = 1) -> None:
        nn.Module.__init__(self)
        self.cuts = {"weight": Cut(0, copies), "bias": Cut(0, copies)}
        adopt(self, layer, comm, ("out_features", "in_features"))
        self.out_features, self.in_features = self.weight.shape


class RowPart(nn.Linear):
    """The columns of a layer's weight that take this rank's inputs; its output is a summand.

    The bias is kept, whole, but not added: it belongs to the sum, once.

    Raises: ValueError where the inputs do not divide.
    """

    def __init__(self, layer: nn.Linear, comm: Comm) -> None:
        nn.Module.__init__(self)
        self.cuts = {"weight": Cut(1)}
        adopt(self, layer, comm, ("out_features", "in_features"))
        self.out_features, self.in_features = self.weight.shape

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... F"]:
        return F.linear(x, self.weight)


class ColumnParallelLinear(ColumnPart):
    """An nn.Linear cut by outputs: x (..., D) on all ranks -> this rank's (..., F/N)."""

    def __init__(self, layer: nn.Linear, comm: Comm) -> None:
        super().__init__(layer, comm)
        self.comm = comm

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... f"]:
        return super().forward(copy_to_ranks(x, self.comm))


class RowParallelLinear(RowPart):
    """An nn.Linear cut by inputs: this rank's (..., D/N) -> y (..., F) on all ranks."""

    def __init__(self, layer: nn.Linear, comm: Comm) -> None:
        super().__init__(layer, comm)
        self.comm = comm

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... F"]:
        y = sum_over_ranks(super().forward(x), self.comm)
        return y if self.bias is None else y + self.bias


class SharedLinear(ColumnPart):
    """Rows of which the ranks of `sharing` hold the same copy, and use it for different outputs.

    The copies' gradients are summed, or they would drift apart: key and value heads where there
    are fewer of them than ranks.
    """

    def __init__(self, layer: nn.Linear, comm: Comm, sharing: Comm) -> None:
        super().__init__(layer, comm, copies=sharing.size)
        self.sharing = sharing

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... f"]:
        bias = None if self.bias is None else copy_to_ranks(self.bias, self.sharing)
        return F.linear(x, copy_to_ranks(self.weight, self.sharing), bias)


def column_part(layer: nn.Linear, comm: Comm) -> nn.Linear:
    """The rows of the weight, and of the bias, that make this rank's outputs."""
    return ColumnPart(layer, comm)


def row_part(layer: nn.Linear, comm: Comm) -> nn.Linear:
    """The columns of the weight that take this rank's inputs; its output is a summand of the sum.

    The bias is not added: it belongs to the sum, once.
    """
    return RowPart(layer, comm)
