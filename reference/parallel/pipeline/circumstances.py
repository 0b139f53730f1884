"""What a second run of a function must find as the first one found it.

    random numbers    the state of torch's own generators at the call, and of every torch.Generator
                      that the function draws from, before its first draw
    autocast          torch's, and each mode that stands between torch functions and their callers
    buffers           those of the modules that are called: the second run writes to copies

Afterwards all is as it was before the second run, so that nobody else notices it. Python's and
numpy's random numbers are the caller's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack


class Circumstances:
    """Those of this moment."""

    def __init__(self) -> None:
        self._states = {generator: generator.get_state() for generator in _default_generators()}
        self._autocast = [_autocast_of(device_type) for device_type in _device_types()]
        modes = _get_current_function_mode_stack()
        self._modes = [mode for mode in modes if not isinstance(mode, _Draws)]

    def noting_draws(self) -> TorchFunctionMode:
        """Within this context each generator's state is noted before its first draw."""
        return _Draws(self._states)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within this context all is as it was; then all is put back."""
        now = {generator: generator.get_state() for generator in self._states}
        active = _get_current_function_mode_stack()
        with ExitStack() as stack:
            stack.callback(_set_states, now)
            _set_states(self._states)
            for mode in self._modes:
                if not any(mode is other for other in active):
                    stack.enter_context(mode)
            for options in self._autocast:
                stack.enter_context(torch.autocast(**options))
            stack.enter_context(_copied_buffers())
            yield


class _Draws(TorchFunctionMode):
    def __init__(self, states: dict[Generator, Tensor]) -> None:
        super().__init__()
        self._states = states

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            if isinstance(value, Generator) and value not in self._states:
                self._states[value] = value.get_state()
        return func(*args, **kwargs)


@contextmanager
def _copied_buffers() -> Iterator[None]:
    """Modules that this thread calls have copies of their buffers, and get the old ones back.

    A batch norm's running statistics have seen the batch already.
    """
    thread = threading.get_ident()
    originals: dict[nn.Module, dict[str, Tensor | None]] = {}

    def copy(called: nn.Module, _: Any) -> None:
        if threading.get_ident() != thread:
            return
        for module in called.modules():
            if module._buffers and module not in originals:
                originals[module] = dict(module._buffers)
                for name, buffer in originals[module].items():
                    module._buffers[name] = None if buffer is None else buffer.detach().clone()

    hook = register_module_forward_pre_hook(copy)
    try:
        yield
    finally:
        hook.remove()
        for module, buffers in originals.items():
            module._buffers.update(buffers)


def _default_generators() -> list[Generator]:
    on_gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *on_gpus]


def _set_states(states: dict[Generator, Tensor]) -> None:
    for generator, state in states.items():
        generator.set_state(state)


def _device_types() -> list[str]:
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _autocast_of(device_type: str) -> dict[str, Any]:
    return {
        "device_type": device_type,
        "dtype": torch.get_autocast_dtype(device_type),
        "enabled": torch.is_autocast_enabled(device_type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
