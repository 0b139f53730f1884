"""Spies for invariants beside values: what a computation allocates."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class largest_new_tensor(TorchDispatchMode):
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
        known = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in known:
                size = tensor.untyped_storage().nbytes()
                self.total_bytes += size
                if size > self.bytes:
                    self.bytes, self.shape = size, tuple(tensor.shape)
        return out


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
