"""The meter: sees each tensor operation of a rank, for its memory ledger and its clock.

Dispatch modes belong to a thread, so each rank thread has its own; on the CPU backward runs in the
thread that calls it, below the same mode. FLOPs are those of torch's FlopCounterMode: matrix
products, convolutions and attention, two for a multiply and add.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from reference.parallel.ranks.memory import MemoryLedger

aten = torch.ops.aten
_of_this_thread = threading.local()


class Meter(TorchDispatchMode):
    """Tells `memory` of new storages and `on_flops` of work, while it is entered and not paused."""

    def __init__(self, memory: MemoryLedger, on_flops: Callable[[float], None]) -> None:
        super().__init__()
        self.memory, self._on_flops = memory, on_flops
        self.is_paused, self.is_counting = False, False
        self._hooks: dict[int, Any] = {}

    def __enter__(self) -> Any:
        _of_this_thread.meter, self.is_counting = self, True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _of_this_thread.meter, self.is_counting = None, False
        for hook in list(self._hooks.values()):
            hook.remove()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """The compiler is not in play; wrapping each call for it would import it, for seconds."""
        return False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The simulation's own operations are nobody's memory or work."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.is_paused:
            return out
        for value in args:
            if isinstance(value, list | tuple):
                for tensor in _flat(value):
                    self._see_input(tensor)
            elif type(value) is not Tensor and isinstance(value, Tensor):
                self._see_input(value)
        plan = _plans.get(id(func)) or _plan(func)
        if plan.flops is not None:
            self._on_flops(plan.flops(args, kwargs, out))
        if plan.makes_storages:
            for tensor in (out,) if isinstance(out, Tensor) else _flat((out,)):
                self._see_output(func, args, tensor)
        return out

    def _see_input(self, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter):
            self._see_parameter(tensor)

    def _see_output(self, func: Any, args: tuple[Any, ...], tensor: Tensor) -> None:
        key = _key(tensor)
        if key is None:
            return
        if not self.memory.knows(key) and func is not aten.lift_fresh.default:
            # A view of a tensor from outside of the run stays outside.
            if any(_key(given) == key for given in _flat(args)):
                return
        self.memory.watch(tensor)

    def _see_parameter(self, parameter: nn.Parameter) -> None:
        key = _key(parameter)
        if key is None:
            return
        self.memory.watch(parameter, "parameters")
        if parameter.requires_grad and id(parameter) not in self._hooks:
            hook = parameter.register_post_accumulate_grad_hook(self._see_gradient)
            forget = weakref.finalize(parameter, self._hooks.pop, id(parameter), None)
            forget.atexit = False
            self._hooks[id(parameter)] = hook

    def _see_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None and not self.is_paused:
            self.memory.watch(parameter.grad, "gradients", is_elastic=True)


@contextmanager
def optimizer_states_labelled() -> Iterator[None]:
    """While this is entered, what torch.optim's steps create counts as optimizer states."""

    def begin(*_: Any) -> None:
        meter = getattr(_of_this_thread, "meter", None)
        if meter is not None:
            meter.step = meter.memory.category("optimizer_states", is_weak=True)
            meter.step.__enter__()

    def end(*_: Any) -> None:
        meter = getattr(_of_this_thread, "meter", None)
        if meter is not None:
            meter.step.__exit__(None, None, None)

    hooks = register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Plan(NamedTuple):
    """What is to be done after an operation."""

    makes_storages: bool
    flops: Callable[[tuple[Any, ...], dict[str, Any], Any], float] | None


def _plan(func: Any) -> _Plan:
    # torch.tensor(...) ends in lift_fresh, by its schema a view of what nobody has seen.
    is_view = func.is_view and func is not aten.lift_fresh.default
    plan = _plans[id(func)] = _Plan(not is_view, _flops_of(func))
    return plan


_plans: dict[int, _Plan] = {}  # by id: operations live for ever, and hash slowly


def _flops_of(func: Any) -> Callable[[tuple[Any, ...], dict[str, Any], Any], float] | None:
    packet = func._overloadpacket
    if packet in flop_registry:
        return lambda args, kwargs, out: flop_registry[packet](*args, **kwargs, out_val=out)
    # FlopCounterMode leaves these two out.
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return lambda args, kwargs, out: sdpa_flop_count(*(t.shape for t in args[:3]))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return lambda args, kwargs, out: sdpa_backward_flop_count(*(t.shape for t in args[:4]))
    return None


def _flat(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _flat(value)


def _key(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # a sparse tensor has none
        return None
