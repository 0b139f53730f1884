"""FSDP: each rank keeps a shard of every parameter, and borrows the rest while a layer computes.

A model is cut into units, say its blocks. Each rank owns some rows of each of a unit's parameters;
those shards are all that the optimizer sees. Then

    forward    all-gather the unit; compute; forget what was gathered
    backward   all-gather it again; compute; reduce-scatter the gradient; forget

An autograd node stands between the shards and the layer's tensors: forward it gathers, backward it
reduces and scatters. What the layer saves for backward must not keep gathered tensors alive, so
saved views of them are replaced by notes ("rows 10 to 20 of parameter 3 of unit 2"), and the first
note that backward reads brings the unit back.

    prefetch                next unit's all-gather starts              at most in memory
    none                    when its backward begins                   1 unit
    "post"                  after this unit's gradient is computed     1 unit, and its gradient
    "pre"                   before this unit's gradient is computed    2 units, and a gradient

Papers: ZeRO stage 3, 1910.02054, sec. 5.3; FSDP, 2304.11277, sec. 3 and 4. Parameters kept apart:
torch's fully_shard (FSDP2); the first FSDP laid a unit's into one vector (flat.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from reference.parallel.data_parallel import Transparent
from reference.parallel.ranks import Comm
from reference.parallel.zero.gather import Gathering, Use
from reference.parallel.zero.notes import saved_as_notes
from reference.parallel.zero.ownership import take_over
from reference.parallel.zero.reduction import clip_shards, copies_on
from reference.parallel.zero.rows import rows_of
from reference.parallel.zero.unit import Unit

Prefetch = Literal["pre", "post"] | None


@dataclass(frozen=True)
class MixedPrecision:
    """The dtype in which parameters are gathered and computed with, and that of the reduction.

    Shards, their gradients and the optimizer keep the parameters' own dtype: float32 ones are the
    master weights. None leaves a dtype as it is.

    Source: FSDP, arXiv 2304.11277, sec. 4.4; MixedPrecisionPolicy of fully_shard.
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None


class FSDP(Transparent):
    """A model whose parameters, gradients and optimizer states are sharded over `comm`.

    `units`: the modules that are gathered one by one; parameters outside of them, and those that
    several units share, are one unit more, the root's, which stays gathered from forward to
    backward. The model is taken over: each parameter becomes this rank's rows of it, and keeps its
    name, dtype, number of dimensions and requires_grad; its `whole_shape` is that of the whole.
    Frozen parameters are gathered and never reduced. A parameter that no rank has used has no
    gradient. All ranks start from the parameters and buffers of rank 0. A model on the meta device
    gets shards of zeros, to be loaded. `replicas` makes it hybrid (HSDP): shards within `comm`,
    copies along `replicas`.

    Norms of gradients are this rank's alone: clip with `clip_grad_norm`. Forward on all ranks must
    run the same units in the same order.

    Raises: ValueError for units that are not modules of the model, twice or nested, or without
    parameters; for scalars; for a model that is sharded already; for another word for
    backward_prefetch. TypeError for recurrent layers.
    Source: FSDP, arXiv 2304.11277, sec. 3; torch.distributed.fsdp.fully_shard.
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
        self._order: list[Unit] = []
        self._previous_order: list[Unit] = []
        self.units = [
            Unit(name, module, held, comm, replicas, self.precision.param_dtype)
            for name, module, held in take_over(model, list(units))
        ]
        self._send_buffers()
        self._gathering = Gathering(self.units, comm, replicas, self.precision.reduce_dtype)
        if backward_prefetch == "post":
            self._gathering.on_gradient = self._prefetch_backward
        if backward_prefetch == "pre":
            self._gathering.on_begin = self._prefetch_backward
        for unit in self.units:
            self._wrap(unit)

    @property
    def shards(self) -> nn.ParameterList:
        """This rank's part of each parameter, in the model's order."""
        return nn.ParameterList(self.parameters())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not _is_in_backward():
            self._gathering.recover()
            self._previous_order, self._order = self._order or self._previous_order, []
        before = [unit.hide() for unit in self.units]
        try:
            return self.module(*args, **kwargs)
        finally:
            for unit, shown in zip(self.units, before, strict=True):
                unit.show(shown)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate whole gradients here, without communication, for the next backward outside."""
        before, self._gathering.is_synchronising = self._gathering.is_synchronising, False
        try:
            yield
        finally:
            self._gathering.is_synchronising = before

    def clip_grad_norm(self, max_norm: float, *, tensor: Comm | None = None) -> Tensor:
        """Clip by the norm of the whole gradient; returns it, the same on each rank.

        `tensor`: the tensor parallel ranks, where the model is divided among them as well.

        Raises: RuntimeError while gradients wait that no_sync has kept back; ValueError for a
        divided model without `tensor`, or a norm that is not positive.
        """
        self._gathering.check_reduced()
        copies = copies_on(self.module, tensor)
        learned = [p for p in self.parameters() if p.grad is not None]
        parts = [p.grad for p in learned if p.grad is not None]
        return clip_shards(parts, max_norm, self.comm, tensor, copies=[copies[p] for p in learned])

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every parameter whole, by its name in the model, and this rank's buffers; collective."""
        found = {name: t for unit in self.units for name, t in unit.whole().items()}
        shards = {id(h.parameter): h.name for unit in self.units for h in unit.held}
        state = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            state[name] = found[shards[id(tensor)]] if id(tensor) in shards else tensor.clone()
        return state

    @torch.no_grad()
    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Fill this rank's shards, and the buffers, from whole tensors: a plain model's state.

        Raises: ValueError where names or shapes are not the model's; nothing has changed then.
        """
        shards = {id(h.parameter) for unit in self.units for h in unit.held}
        ours = self.module.state_dict(keep_vars=True)
        wholes = {name: getattr(t, "whole_shape", t.shape) for name, t in ours.items()}
        given = {name: t.shape for name, t in state.items()}
        if wholes != given:
            names = sorted(n for n in {**wholes, **given} if wholes.get(n) != given.get(n))
            raise ValueError(f"state: expected the tensors of this model, differs in {names}")
        for name, tensor in ours.items():
            is_sharded = id(tensor) in shards
            rows = rows_of(len(state[name]), self.comm.size, self.comm.rank) if is_sharded else ...
            tensor.copy_(state[name][rows])

    @torch.no_grad()
    def _send_buffers(self) -> None:
        for buffer in self.module.buffers():
            if buffer.device.type != "meta":
                self.comm.broadcast(buffer, src=0)
                if self.replicas is not None:
                    self.replicas.broadcast(buffer, src=0)

    def _wrap(self, unit: Unit) -> None:
        compute = unit.module.forward
        keeps = unit.module is self.module or not self.reshard_after_forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            unit.unshard()
            self._order.append(unit)
            if self.forward_prefetch:
                _prefetch_after(unit, self._previous_order)
            if self.precision.param_dtype is not None:
                args, kwargs = tree_map(self._to_param_dtype, (args, kwargs))
            with saved_as_notes(unit):
                use, wholes = self._gathering.use(unit)
                before = unit.show(wholes)
                try:
                    out = compute(*args, **kwargs)
                finally:
                    unit.show(before)
            if not _is_in_backward() and (not torch.is_grad_enabled() or not keeps):
                unit.reshard()
            if torch.is_grad_enabled():
                self._await_backward(use, (args, kwargs), out)
            return out

        unit.module.forward = forward

    def _to_param_dtype(self, value: Any) -> Any:
        is_floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.precision.param_dtype) if is_floating else value

    def _await_backward(self, use: Use, inputs: Any, out: Any) -> None:
        """Bring the unit back when a gradient of its output is there, and forget it when that of
        its input is. Where all of it learns, its own gradient comes last."""
        unit, outputs, before = use.unit, _differentiable(out), _differentiable(inputs)
        if not outputs:
            return
        for tensor in outputs:
            tensor.register_hook(lambda _: self._gathering.begin_backward(use))
        unit.is_freed_by_gradient = not before or len(use.learning) == len(unit.held)
        if not unit.is_freed_by_gradient:
            before[0].register_hook(lambda _: self._gathering.end_backward(use))
        if self.module.training and not _is_in_backward():
            self._gathering.expect(use)

    def _prefetch_backward(self, unit: Unit) -> None:
        _prefetch_after(unit, self._order[::-1])


def _prefetch_after(unit: Unit, order: list[Unit]) -> None:
    if unit in order:
        for following in order[order.index(unit) + 1 :][:1]:
            following.start_gather()


def _differentiable(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.requires_grad]


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
