"""FSDP: each rank keeps a part of every layer, and borrows the rest while the layer computes.

A model is cut into units, say its blocks. A unit's parameters are one flat vector, of which each
rank owns one part, a float32 nn.Parameter: all that the optimizer sees. Then

    forward    all-gather the unit; compute; forget what was gathered
    backward   all-gather it again; compute; reduce-scatter the gradient; forget

An autograd node stands between the part and the layer's tensors: forward it gathers, backward it
reduces and scatters. What the layer saves for backward must not keep the gathered vector alive, so
saved views of it are replaced by notes ("elements 10 to 20 of unit 3"), and the first note that
backward reads brings the unit back.

    prefetch                next unit's all-gather starts              at most in memory
    none                    when its first note is read                1 unit
    "post"                  after this unit's gradient is computed     1 unit, and its gradient
    "pre"                   before this unit's gradient is computed    2 units, and a gradient

Papers: ZeRO stage 3, 1910.02054, sec. 5.3; FSDP, 2304.11277, sec. 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_map

from reference.parallel.ranks import Comm
from reference.parallel.zero.reduction import GradientReducer, clip_shards
from reference.parallel.zero.unit import Unit

Prefetch = Literal["pre", "post"] | None


@dataclass(frozen=True)
class MixedPrecision:
    """The dtype in which parameters are gathered and computed with, and that of the reduction.

    Shards, their gradients and the optimizer stay float32: they are the master weights.

    Source: FSDP, arXiv 2304.11277, sec. 4.4.
    """

    param_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype | None = None


class FSDP(nn.Module):
    """A model whose parameters, gradients and optimizer states are sharded over `comm`.

    `units`: the modules that are gathered one by one; parameters outside of them are one unit more,
    the root's, which stays gathered from forward to backward. The model is taken over: its
    parameters become views that exist while their unit computes. All ranks start from the values of
    rank 0. A model on the meta device gets shards of zeros, to be loaded. `replicas` makes it
    hybrid (HSDP): shards within `comm`, copies along `replicas`.

    Raises: ValueError for units that are not modules of the model, twice or nested, without
    parameters, or another word for backward_prefetch.
    Source: FSDP, arXiv 2304.11277, sec. 3.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Comm,
        units: Iterable[nn.Module] = (),
        *,
        replicas: Comm | None = None,
        reshard_after_forward: bool = True,
        backward_prefetch: Prefetch = "pre",
        forward_prefetch: bool = False,
        precision: MixedPrecision | None = None,
    ) -> None:
        super().__init__()
        if backward_prefetch not in ("pre", "post", None):
            raise ValueError(
                f"backward_prefetch: expected 'pre', 'post' or None, got {backward_prefetch!r}"
            )
        self.comm, self.replicas, self.module = comm, replicas, model
        self.reshard_after_forward = reshard_after_forward
        self.backward_prefetch, self.forward_prefetch = backward_prefetch, forward_prefetch
        self.precision = precision or MixedPrecision()
        self.is_synchronising = True
        self._reducer = GradientReducer(comm, replicas)
        self._order: list[Unit] = []
        self._previous_order: list[Unit] = []
        self._has_callback = False
        self.units = [
            Unit(name, module, skip, comm, replicas, self.precision.param_dtype)
            for name, module, skip in _divide(model, list(units))
        ]
        self.shards = nn.ParameterList(unit.shard for unit in self.units)
        for unit in self.units:
            self._wrap(unit)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._previous_order, self._order = self._order or self._previous_order, []
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate full gradients here, without communication: they stay unsharded meanwhile."""
        self.is_synchronising = False
        try:
            yield
        finally:
            self.is_synchronising = True

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Clip by the norm of the whole gradient; returns it, the same on each rank."""
        parts = [unit.shard.grad for unit in self.units if unit.shard.grad is not None]
        return clip_shards(parts, max_norm, self.comm)

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every parameter whole and in float32, by its name in the model; collective."""
        return {name: t for unit in self.units for name, t in unit.whole().items()}

    def _wrap(self, unit: Unit) -> None:
        compute = unit.module.forward
        is_root = unit.module is self.module

        def forward(*args: Any, **kwargs: Any) -> Any:
            unit.unshard()
            self._order.append(unit)
            if self.forward_prefetch:
                self._prefetch_after(unit, self._previous_order)
            if self.precision.param_dtype != torch.float32:
                args, kwargs = tree_map(self._to_param_dtype, (args, kwargs))
            with torch.autograd.graph.saved_tensors_hooks(self._note_down(unit), self._read):
                unit.show(_Gather.apply(unit.shard, unit, self))
                try:
                    out = compute(*args, **kwargs)
                finally:
                    unit.hide()
            if not torch.is_grad_enabled() or (self.reshard_after_forward and not is_root):
                unit.reshard()
            return out

        unit.module.forward = forward

    def _to_param_dtype(self, value: Any) -> Any:
        is_floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.precision.param_dtype) if is_floating else value

    def _note_down(self, unit: Unit) -> Any:
        def pack(tensor: Tensor) -> Tensor | _Note:
            if not unit.owns(tensor):
                return tensor
            return _Note(unit, tensor.shape, tensor.stride(), tensor.storage_offset())

        return pack

    def _read(self, saved: Tensor | _Note) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        unit = saved.unit
        if unit.full is None:
            unit.unshard()
        if self.backward_prefetch == "pre" and self._has_not_prefetched(unit):
            self._prefetch_after(unit, self._order[::-1])
        return unit.unshard().as_strided(saved.shape, saved.stride, saved.offset)

    def _has_not_prefetched(self, unit: Unit) -> bool:
        is_first, unit.has_prefetched = not unit.has_prefetched, True
        return is_first

    def _prefetch_after(self, unit: Unit, order: list[Unit]) -> None:
        if unit in order:
            for following in order[order.index(unit) + 1 :][:1]:
                following.start_gather()

    def take_gradient(self, unit: Unit, gradient: Tensor) -> None:
        """The unit's full gradient is there: free the unit, then reduce."""
        unit.reshard()
        unit.has_prefetched = False
        if not self._has_callback:
            self._has_callback = True
            Variable._execution_engine.queue_callback(self._end_backward)
        if self.backward_prefetch == "post":
            self._prefetch_after(unit, self._order[::-1])
        unit.comm.memory.label(gradient, "gradients")
        if unit.unreduced is not None:
            gradient, unit.unreduced = unit.unreduced.add_(gradient), None
        if not self.is_synchronising:
            unit.unreduced = gradient
            return
        gradient = gradient.to(self.precision.reduce_dtype or gradient.dtype)
        self._reducer.start(gradient, unit.accumulate)

    def _end_backward(self) -> None:
        self._has_callback = False
        self._reducer.finish()
        for unit in self.units:
            unit.reshard()
            unit.has_prefetched = False


class _Note(NamedTuple):
    """In place of a saved view of a gathered vector: how to make it again."""

    unit: Unit
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class _Gather(torch.autograd.Function):
    """Forward from this rank's part to the whole; backward from the whole gradient to its part."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, unit: Unit, fsdp: FSDP) -> Tensor:
        ctx.unit, ctx.fsdp = unit, fsdp
        full = unit.unshard()
        return full.view_as(full)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        # The part's gradient comes by `accumulate`, when the reduction that starts here has ended.
        ctx.fsdp.take_gradient(ctx.unit, gradients[0])
        return None, None, None


def _divide(
    model: nn.Module, units: list[nn.Module]
) -> list[tuple[str, nn.Module, set[nn.Module]]]:
    """(name, module, modules inside of it that are not its own) for each unit, the root first."""
    names = {module: name for name, module in model.named_modules()}
    inside: set[nn.Module] = set()
    for module in units:
        if module not in names or module is model:
            raise ValueError(f"units: expected modules inside of the model, got {type(module)}")
        if module in inside:
            raise ValueError(f"units: {names[module]!r} is there twice, or inside of another unit")
        inside |= set(module.modules())
    found = [(names[module], module, set[nn.Module]()) for module in units]
    rest = [p for m in model.modules() if m not in inside for p in m.parameters(recurse=False)]
    return [("", model, inside), *found] if rest else found
