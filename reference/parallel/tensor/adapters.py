"""LoRA on a divided matrix: one factor is divided with it, the other is on every rank.

    by outputs   y_r = W_r x + s B_r (A x)          A whole, B cut by outputs
    by inputs    y_r = W_r x_r + s B (A_r x_r)      A cut by inputs, B whole; y is the sum over r

Either way a rank's share of the base's result and its adapter's go on together, and nothing more
travels forward. Backward, what a rank says about the whole factor is a summand: A x goes into all
parts of y, and B sees a summand of A x. So the whole factor's gradient is summed, r D or F r
numbers. Where that is forgotten the copies drift apart, and rank 0's is saved.

Dropout zeroes inputs of A. Ranks that hold the same input have to zero the same of it, and parts of
an input have a part each of one mask; so all draw the whole mask from one stream.

Papers: LoRA, 2106.09685, sec. 4.1; Megatron-LM, 1909.08053, sec. 3.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reference.lora.layer import Adapter, LoRALinear
from reference.parallel.ranks import Comm
from reference.parallel.tensor.cut import Cut, adopt, copied
from reference.parallel.tensor.layers import ColumnPart, RowPart, SharedLinear
from reference.parallel.tensor.operators import copy_to_ranks
from reference.transformer.token_ids import has_values


class ParallelAdapter(Adapter):
    """A rank's part of an adapter of a layer that is cut by outputs (dim 0) or inputs (dim 1).

    `sharing`: the ranks that have the same outputs. `generator`: the same on all ranks of `comm`,
    for dropout; `agree_on_adapters` gives one to every adapter of a model.
    """

    def __init__(self, adapter: Adapter, comm: Comm, dim: int, sharing: Comm | None = None) -> None:
        nn.Module.__init__(self)
        self.config, self.comm, self.sharing = adapter.config, comm, sharing
        copies = 1 if sharing is None else sharing.size
        self.is_by_outputs = dim == 0
        self.cuts = {"b": Cut(0, copies)} if self.is_by_outputs else {"a": Cut(1)}
        self.generator: torch.Generator | None = None
        adopt(self, adapter, comm, ("out_features", "in_features"))

    def factors(self) -> tuple[Float[Tensor, "r d"], Float[Tensor, "f r"]]:
        if not self.is_by_outputs:
            return self.a, copy_to_ranks(self.b, self.comm)
        b = self.b if self.sharing is None else copy_to_ranks(self.b, self.sharing)
        return copy_to_ranks(self.a, self.comm), b

    def drop(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        rate = self.config.dropout
        if not (self.training and rate):
            return x
        if self.generator is None:
            raise ValueError(
                "dropout: expected random numbers that all ranks share: call agree_on_adapters"
            )
        width = x.shape[-1] * (1 if self.is_by_outputs else self.comm.size)
        drawn = torch.rand(*x.shape[:-1], width, generator=self.generator, device=x.device)
        if not self.is_by_outputs:
            drawn = drawn.chunk(self.comm.size, -1)[self.comm.rank]
        return x * (drawn >= rate) / (1 - rate)


def divide(layer: nn.Module, comm: Comm, dim: int, sharing: Comm | None = None) -> nn.Module:
    """This rank's part of an nn.Linear or a LoRALinear, cut by outputs (dim 0) or inputs (dim 1).

    Merged adapters stay merged: a part of B A is what the part of W has to grow by.

    Raises: ValueError where the dimension does not divide.
    """
    if isinstance(layer, LoRALinear):
        return _divide_adapted(layer, comm, dim, sharing)
    assert isinstance(layer, nn.Linear)
    if dim == 1:
        return RowPart(layer, comm)
    return ColumnPart(layer, comm) if sharing is None else SharedLinear(layer, comm, sharing)


def bias_of_sum(layer: nn.Module) -> Tensor | None:
    """The bias that a layer cut by inputs leaves to the sum of its outputs."""
    base = layer.base if isinstance(layer, LoRALinear) else layer
    assert isinstance(base, nn.Linear)
    return base.bias


@torch.no_grad()
def agree_on_adapters(model: nn.Module, comm: Comm) -> None:
    """Give all ranks rank 0's whole factors, and one stream of random numbers for dropout.

    A is drawn where the adapter was put on: on each rank another one, unless all had one seed. The
    stream's seed is rank 0's own. Sends nothing where there are no adapters.
    """
    adapters = [m for m in model.modules() if isinstance(m, ParallelAdapter)]
    for adapter in adapters:
        comm.broadcast(adapter.a if adapter.is_by_outputs else adapter.b, src=0)
    if dropping := [adapter for adapter in adapters if adapter.config.dropout]:
        seed = torch.tensor(torch.initial_seed() % 2**62, device=comm.device)
        comm.broadcast(seed, src=0)
        generator = torch.Generator(comm.device)
        generator.manual_seed(int(seed) if has_values(seed) else 0)
        for adapter in dropping:
            adapter.generator = generator


def _divide_adapted(layer: LoRALinear, comm: Comm, dim: int, sharing: Comm | None) -> LoRALinear:
    twin = copied(layer)
    base = divide(layer.base, comm, dim, sharing)
    assert isinstance(base, ColumnPart | RowPart)
    twin.base = base
    twin.adapters = nn.ModuleDict(
        {name: ParallelAdapter(layer.adapter(name), comm, dim, sharing) for name in layer.adapters}
    ).train(layer.adapters.training)
    twin.active = list(layer.active)
    if layer._unmerged is not None:
        twin._unmerged = base.cuts["weight"].part(layer._unmerged, comm, "weight")
    return twin
