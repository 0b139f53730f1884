"""Between shards and whole parameters, under autograd: what FSDP does in the middle of backward.

Each forward of a unit is a `Use`. Its gradient arrives in one piece, and leaves as one message. On
all ranks messages must leave in the same order, or layers would be added to other layers: so a use
waits until all later ones have left, and one whose gradient has not come by the end of backward (a
branch that another rank took) leaves with zeros. In the message travels who has used what: a
parameter that nobody used gets no gradient, and so no weight decay either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Variable

from reference.parallel.ranks import Comm
from reference.parallel.zero.reduction import GradientReducer
from reference.parallel.zero.rows import RowLayout
from reference.parallel.zero.unit import Unit


@dataclass(eq=False)
class Use:
    """One forward of a unit: the parameters that were to learn, and then their gradients.

    `opened` and `closed` number the beginnings and ends of forwards: a root's lies around others.
    """

    unit: Unit
    learning: list[int]
    opened: int
    closed: int = 0
    gradients: dict[int, Tensor] | None = None
    has_begun: bool = False


class Gathering:
    """Gathers units and reduces their gradients.

    `on_begin` is called when a unit's backward begins, `on_gradient` when its gradient is there.
    """

    def __init__(
        self, units: list[Unit], comm: Comm, replicas: Comm | None, dtype: torch.dtype | None
    ) -> None:
        self.units, self.is_synchronising = units, True
        self.on_begin: Callable[[Unit], None] = lambda unit: None
        self.on_gradient: Callable[[Unit], None] = lambda unit: None
        self._comm, self._dtype = comm, dtype
        self._reducer = GradientReducer(comm, replicas)
        self._uses: list[Use] = []  # in the order in which they were opened
        self._now = 0
        self._has_callback = False

    def use(self, unit: Unit) -> tuple[Use, list[Tensor]]:
        """A forward of the unit, and what it is to compute with: those that learn lead backward to
        their shards."""
        found, learning = list(unit.unshard()), unit.learning
        self._now += 1
        use = Use(unit, learning, self._now)
        if learning and torch.is_grad_enabled():
            shards = [unit.held[i].parameter for i in learning]
            for i, whole in zip(learning, _Gather.apply(use, self, *shards), strict=True):
                found[i] = whole
        return use, found

    def expect(self, use: Use) -> None:
        """The use has ended, and a backward of it is to come."""
        self._now += 1
        use.closed = self._now
        self._uses.append(use)
        self._uses.sort(key=lambda use: use.opened)

    def begin_backward(self, use: Use) -> None:
        """Bring the unit back, and let its module see it: a checkpoint inside computes again."""
        self._expect_end()
        if use in self._uses:
            self._skip_after(use.closed)
        if not use.has_begun:
            self._begin(use)

    def end_backward(self, use: Use) -> None:
        """Nothing reads the unit any more."""
        self._expect_end()
        _forget(use.unit)
        if not use.learning:
            self.arrive(use, {})

    def arrive(self, use: Use, gradients: dict[int, Tensor]) -> None:
        """A use's gradients are there: they leave, or wait for the turn of their use."""
        unit = use.unit
        self._expect_end()
        _add_what_leaves_have(gradients, unit)
        use.has_begun = False
        if unit.is_freed_by_gradient:
            _forget(unit)
        self.on_gradient(unit)
        self._comm.memory.label(gradients, "gradients")
        use.gradients = gradients
        if not self.is_synchronising or use not in self._uses:
            self._leave(use)
        while self._uses and self._uses[-1].gradients is not None:
            self._leave(self._uses[-1])

    def recover(self) -> None:
        """Before a forward: forget a backward that has failed."""
        if self._has_callback:
            self._has_callback = False
            self._uses = []
            self._reducer.finish()
            for unit in self.units:
                unit.unreduced, unit.owed = {}, set()
                _forget(unit)

    def check_reduced(self) -> None:
        """Raises: RuntimeError while gradients wait that no_sync has kept back."""
        waiting = [unit.label for unit in self.units if unit.owed]
        if waiting:
            raise RuntimeError(
                f"gradients of {', '.join(waiting)} wait unreduced since no_sync; the last "
                "backward of a step must be outside of it"
            )

    def _begin(self, use: Use) -> None:
        unit, use.has_begun = use.unit, True
        wholes = list(unit.unshard())
        for i in unit.learning:
            if i not in unit.leaves:
                unit.leaves[i] = wholes[i].detach().requires_grad_()
            wholes[i] = unit.leaves[i]
        unit.show(wholes)
        self.on_begin(unit)

    def _skip_after(self, closed: int) -> None:
        """Autograd goes back in the order of forward: later uses without a gradient get none. The
        other ranks may have one, so gather and reduce as they do."""
        while self._uses and self._uses[-1].opened > closed:
            late = self._uses[-1]
            if not late.has_begun:
                self._begin(late)
            self.arrive(late, {})

    def _leave(self, use: Use) -> None:
        if use in self._uses:
            self._uses.remove(use)
        self._owe(use)
        if self.is_synchronising and use.learning:
            self._reduce(use.unit)

    def _owe(self, use: Use) -> None:
        use.unit.owed |= set(use.learning)
        waiting = use.unit.unreduced
        for i, gradient in (use.gradients or {}).items():
            # Not in place: autograd gives a sum's gradient to both summands, as one tensor.
            waiting[i] = waiting[i] + gradient if i in waiting else gradient
        use.gradients = None

    def _reduce(self, unit: Unit) -> None:
        """Start the message of a unit: what is there, and what no_sync has kept back before."""
        chosen, gradients = sorted(unit.owed), unit.unreduced
        unit.owed, unit.unreduced = set(), {}
        dtype = self._dtype or _common_dtype(unit, chosen)
        n, device = self._comm.size, self._comm.device
        used = torch.tensor([[float(i in gradients) for i in chosen]], dtype=dtype, device=device)
        shapes = (*(unit.held[i].shape for i in chosen), (n, len(chosen)))
        layout = RowLayout(shapes, (dtype,) * len(shapes), n)
        wholes = [
            gradients.pop(i).to(dtype) if i in gradients
            else torch.zeros(unit.held[i].shape, dtype=dtype, device=device)
            for i in chosen
        ]  # fmt: skip
        with self._comm.memory.category("gradients"):
            message = layout.spread([*wholes, used.expand(n, -1)])
        del wholes

        def deliver(row: Tensor) -> None:
            *parts, counts = layout.shards(row, self._comm.rank)
            is_used = _values(counts.flatten())
            unit.accumulate({i: p for i, p, u in zip(chosen, parts, is_used, strict=True) if u})

        self._reducer.start(message, deliver, f"gradients of {unit.label}")

    def _expect_end(self) -> None:
        if not self._has_callback:
            self._has_callback = True
            Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._skip_after(0)
        for unit in self.units:
            if unit.owed and self.is_synchronising:
                self._reduce(unit)
        self._reducer.finish()
        for unit in self.units:
            _forget(unit)
        self._has_callback = False


class _Gather(torch.autograd.Function):
    """Forward from shards to whole parameters; backward from their gradients to the shards'."""

    @staticmethod
    def forward(ctx: Any, use: Use, gathering: Gathering, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.use, ctx.gathering = use, gathering
        ctx.set_materialize_grads(False)
        wholes = use.unit.unshard()
        return tuple(wholes[i].view_as(wholes[i]) for i in use.learning)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        # The shards' gradients come by `accumulate`, when the reduction that starts here has ended.
        there = zip(ctx.use.learning, gradients, strict=True)
        ctx.gathering.arrive(ctx.use, {i: g for i, g in there if g is not None})
        return (None,) * (2 + len(gradients))


def _add_what_leaves_have(gradients: dict[int, Tensor], unit: Unit) -> None:
    """Of a checkpoint inside of the unit whose backward was nested in this one."""
    for i, leaf in unit.leaves.items():
        if leaf.grad is not None:
            gradients[i] = leaf.grad + gradients[i] if i in gradients else leaf.grad
    unit.leaves = {}


def _forget(unit: Unit) -> None:
    unit.reshard()
    unit.show(None)


def _values(counts: Tensor) -> list[float]:
    """Of a tensor that has only its shape: as if all were used."""
    return [1.0] * counts.numel() if isinstance(counts, FakeTensor) else counts.tolist()


def _common_dtype(unit: Unit, chosen: list[int]) -> torch.dtype:
    """That of the unit's gradients; float32 where parameters have several."""
    dtypes = {unit.gathered_dtype(i) for i in chosen}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
