"""Spies for invariants beside values: what a computation allocates."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Spy(TorchDispatchMode):
    """Sees every operation in eager mode. Without torch.compile's guard each costs half."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class largest_new_tensor(_Spy):
    """Watch every torch operation in the block; `bytes` is the largest storage that one created.

    Views cost nothing: only storages that did not exist when the operation began count. Operations
    of autograd's backward are seen as well. `total_bytes` adds all fresh storages up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.total_bytes = 0
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        known = {_storage(t) for t in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            if _storage(tensor) not in known:
                size = tensor.untyped_storage().nbytes()
                self.total_bytes += size
                if size > self.bytes:
                    self.bytes, self.shape = size, tuple(tensor.shape)
        return out


class order_of_reads(_Spy):
    """Watch in which order a block of code reads some tensors; `order` holds their indices.

    An index is noted whenever another tensor than the last is read: (0, 1, 2) is one pass over
    three, (0, 1, 0) comes back to the first. Only whole tensors count: a row that was kept may be
    read again.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.order: list[int] = []
        self._index = {(_storage(t), t.numel()): i for i, t in enumerate(tensors)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            index = self._index.get((_storage(tensor), tensor.numel()))
            if index is not None and self.order[-1:] != [index]:
                self.order.append(index)
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
