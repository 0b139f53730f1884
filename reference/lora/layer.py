"""LoRA: a frozen matrix, and beside it the product of two thin ones that learn.

    h = W x + (alpha / r) B A x         A (r, D) random, B (F, r) zero

At the start B A = 0: the model is exactly what it was. Afterwards the product may be added into W,
and the model costs exactly what it did.

Letters: D input and F output width of a linear layer, r rank.
Papers: LoRA, 2106.09685, sec. 4.1; rsLoRA (alpha / sqrt(r)), 2312.03732.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """An adapter's shape: rank r, alpha, dropout of its input, and which linear layers it adapts.

    `targets`: the last names of modules ("q_proj"), or "all-linear". `is_rank_stabilised` divides
    alpha by sqrt(r) in place of r, so that large ranks do not learn ever more slowly.

    Raises: ValueError for a rank below 1, a dropout outside of [0, 1), or no targets.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    is_rank_stabilised: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: expected at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected from 0 to below 1, got {self.dropout}")
        if not self.targets or (isinstance(self.targets, str) and self.targets != "all-linear"):
            raise ValueError(
                f"targets: expected names of modules, or 'all-linear'; got {self.targets!r}"
            )

    @property
    def scaling(self) -> float:
        """The factor of B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.is_rank_stabilised else self.rank)


def lora_delta(
    a: Float[Tensor, "r D"], b: Float[Tensor, "F r"], scaling: float
) -> Float[Tensor, "F D"]:
    """What merging adds to the weight: scaling * B A. Source: arXiv 2106.09685, sec. 4.1."""
    return b @ a * scaling


def check_is_whole(path: str, layer: nn.Module) -> None:
    """Raises: ValueError for a rank's part of a layer, which says in `cuts` how it was divided.

    An adapter of its shape would be this rank's own, and no one would sum its gradient.
    """
    if getattr(layer, "cuts", None):
        raise ValueError(
            f"{path}: expected a whole layer, got a rank's part of one; do this to the whole "
            "model, and divide it, with its adapters, afterwards"
        )


class Adapter(nn.Module):
    """One adapter's A and B for one layer: A Kaiming-uniform as in nn.Linear, B zero."""

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        check_is_whole("base", base)
        fan_out, fan_in = base.weight.shape
        if config.rank > min(fan_in, fan_out):
            raise ValueError(
                f"rank: expected at most {min(fan_in, fan_out)} for a weight "
                f"({fan_out}, {fan_in}), got {config.rank}: more is not low"
            )
        self.config = config
        self.a = nn.Parameter(base.weight.new_empty(config.rank, fan_in))
        self.b = nn.Parameter(base.weight.new_zeros(fan_out, config.rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
        a, b = self.factors()
        return F.linear(F.linear(self.drop(x), a), b) * self.config.scaling

    def factors(self) -> tuple[Float[Tensor, "r D"], Float[Tensor, "F r"]]:
        """A and B as the product takes them; where ranks hold parts, their gradients are summed."""
        return self.a, self.b

    def drop(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Dropout of the input, while training."""
        return F.dropout(x, self.config.dropout, self.training)

    def delta(self) -> Float[Tensor, "F D"]:
        """The change of the weight that this adapter stands for, in float32 at least."""
        wide = torch.promote_types(self.a.dtype, torch.float32)
        return lora_delta(self.a.to(wide), self.b.to(wide), self.config.scaling)


class LoRALinear(nn.Module):
    """A linear layer, frozen, with adapters by name; those in `active` are added.

    `rows`, where it is set, gives each row of the batch an adapter of its own: the index of one in
    the order of `adapters`, or -1 for the base alone. `use_rows` in adapt.py sets it.

    Source: arXiv 2106.09685, sec. 4.1; batches of many adapters: Punica, 2310.18547.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.active: list[str] = []
        self.rows: Int[Tensor, " B"] | None = None
        self._unmerged: Tensor | None = None
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """The base's weight, with what is merged into it."""
        return self.base.weight

    def adapter(self, name: str) -> Adapter:
        """The adapter of that name. Raises: KeyError."""
        return cast(Adapter, self.adapters[name])

    def add(self, name: str, config: LoRAConfig) -> None:
        """Make a new adapter and activate it alone.

        Raises: ValueError for a name that is taken or a rank above the matrix's.
        """
        if name in self.adapters:
            raise ValueError(f"name: {name!r} is there already; remove it, or take another name")
        self.adapters[name] = Adapter(self.base, config).train(self.base.training)
        self.active = [name]

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
        y = self.base(x)
        if self._unmerged is not None:
            return y
        if self.rows is not None:
            return y + self._by_row(x, self.rows)
        for name in self.active:
            y = y + self.adapter(name)(x)
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Add the active adapters into the weight. The weight before is kept, for `unmerge`.

        Summed up in float32 and rounded once to the weight's dtype, however many there are.

        Raises: ValueError where something is merged already, or the sum is not finite; then
        nothing has changed.
        """
        if self._unmerged is not None:
            raise ValueError("merge: the adapters are merged already; unmerge first")
        weight = self.base.weight
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in self.active:
            merged = merged + self.adapter(name).delta()
        merged = merged.to(weight.dtype)
        if not merged.is_meta and not torch.isfinite(merged).all():
            raise ValueError(
                f"merge: expected finite weights, got inf or NaN in {weight.dtype}; the adapter is "
                "broken, or too large for this dtype"
            )
        self._unmerged = weight.detach().clone()
        weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weight back as it was, bit for bit: subtracting would leave roundings.

        Raises: ValueError where nothing is merged.
        """
        if self._unmerged is None:
            raise ValueError("unmerge: nothing is merged")
        self.base.weight.copy_(self._unmerged)
        self._unmerged = None

    def _by_row(self, x: Float[Tensor, "B ... D"], rows: Int[Tensor, " B"]) -> Tensor:
        """Each row's adapter in two batched products; ranks are padded to the largest."""
        adapters = [self.adapter(name) for name in self.adapters]
        factors = [adapter.factors() for adapter in adapters]
        most = max(m.config.rank for m in adapters)
        a = torch.stack([F.pad(a, (0, 0, 0, most - len(a))) for a, _ in factors])
        scaled = [b * m.config.scaling for (_, b), m in zip(factors, adapters, strict=True)]
        b = torch.stack([F.pad(m, (0, most - m.shape[1])) for m in scaled])
        zero = (rows < 0).view(-1, *[1] * (x.ndim - 1))
        chosen = rows.clamp(min=0)
        low = torch.einsum("b...d,brd->b...r", x, a[chosen])
        return torch.einsum("b...r,bfr->b...f", low, b[chosen]).masked_fill(zero, 0.0)
