"""Buffers of operations under way: whoever writes to one before `wait` is told so.

Between `isend` (or a collective with `async_op=True`) and `wait` the network reads the tensor
whenever it likes: what is written meanwhile may or may not be sent, and what is written to a buffer
that receives may or may not be lost. A tensor counts the writes to it, but in common with all that
shares its storage; so a part of a larger one is compared with a copy where the count has risen.

A write through `.data` is not counted and not seen here, nor is a read that comes too early.
"""

import torch
from torch import Tensor

from reference.parallel.ranks.calls import Call


class Buffer:
    """One tensor of a call, from its start to its `wait`."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._num_writes = tensor, _num_writes(tensor)
        is_part = tensor.nbytes < tensor.untyped_storage().nbytes() or self._num_writes is None
        copy = tensor.clone(memory_format=torch.contiguous_format) if is_part else None
        # Tensors that have shapes alone cannot be compared.
        self._has_values = copy is None or (type(copy) is Tensor and copy.device.type != "meta")
        self._copy = copy

    def is_written_to(self) -> bool:
        """Whether it differs from what it was, or, having a storage to itself, has been written."""
        if self._num_writes is not None and self._num_writes == _num_writes(self._tensor):
            return False
        if self._copy is None:
            return True
        if not self._has_values or self._tensor.untyped_storage().nbytes() < self._copy.nbytes:
            return False
        return not torch.equal(_bytes(self._copy), _bytes(self._tensor))


class InFlight:
    """The buffers of one call."""

    def __init__(self, call: Call) -> None:
        tensors = {_place(t): t for t in (call.tensor, call.out) if t is not None}
        self._buffers = [Buffer(tensor) for tensor in tensors.values()]

    def are_written_to(self) -> bool:
        """Whether one has been since the start."""
        return any(buffer.is_written_to() for buffer in self._buffers)


def refusal(call: Call) -> RuntimeError:
    """What the program is told that has written to the call's tensors."""
    return RuntimeError(
        "a tensor was written to while an operation on it was under way; on real hardware either "
        f"value may be sent or kept: wait() first, or give a copy to\n  {call.describe()}"
    )


def _num_writes(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
