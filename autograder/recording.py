"""What a student's function was called with and what it gave back, safe from later changes."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _len_torch_dispatch_stack

from autograder.expect import TOLERANCE, _allclose, _equal


@dataclass(frozen=True)
class Returned:
    value: Any


@dataclass(frozen=True)
class Raised:
    error: str  # type and message

    @property
    def error_type(self) -> str:
        return self.error.partition(":")[0]


@dataclass(frozen=True)
class Call:
    """One call of a student's function: copies of its arguments and of its outcome."""

    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outcome: Returned | Raised


def snapshot(value: Any) -> Any:
    """A copy that later changes cannot reach: tensors detached, generators with their state."""
    with _without_spies():
        return _copied(value)


def _without_spies() -> contextlib.AbstractContextManager[Any]:
    """A spy around the call counts what the answer allocates, not the copies made here."""
    return _disable_current_modes() if _len_torch_dispatch_stack() else contextlib.nullcontext()


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        copy = torch.empty_like(value, requires_grad=False).copy_(value.detach())
        return copy.requires_grad_(value.requires_grad) if value.dtype.is_floating_point else copy
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return value


def fingerprint(value: Any) -> bytes:
    """Bytes that are equal where two values are: contents, shapes, strides and dtypes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(value):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}{value.stride()}{value.requires_grad}".encode()
        yield value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, torch.Generator):
        yield from _parts(value.get_state())
    elif type(value) in (list, tuple):
        yield f"{type(value).__name__}{len(value)}".encode()
        for item in value:
            yield from _parts(item)
    elif type(value) is dict:
        yield from _parts(list(value.items()))
    else:
        yield repr(value).encode()


def unchanged(value: Any, before: Any) -> bool:
    """Whether `value` still holds what `before` (its snapshot) holds, tensors bit for bit."""
    with _without_spies():
        return _same(value, before)


def _same(value: Any, before: Any) -> bool:
    if isinstance(value, Tensor):
        return value.shape == before.shape and _identical(value.detach(), before.detach())
    if type(value) in (list, tuple):
        return len(value) == len(before) and all(map(_same, value, before))
    if type(value) is dict:
        return value.keys() == before.keys() and all(_same(value[k], before[k]) for k in value)
    if type(before) in (int, float, str, bool, type(None)):
        return type(value) is type(before) and (value == before or before != before)
    return True


def _identical(a: Tensor, b: Tensor) -> bool:
    return _equal(a, b) or _allclose(a, b, rtol=0, atol=0, equal_nan=True)


def distance(a: Any, b: Any) -> float | None:
    """How far apart two outcomes are relative to the tolerance, at most 1; None where they differ.

    Outcomes are equal in structure, type, dtype and shape, and their values within the tolerance.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _tensor_distance(a.detach(), b.detach())
    if type(a) is not type(b):
        return None
    if isinstance(a, dict):
        return _together([distance(a[k], b[k]) for k in a]) if a.keys() == b.keys() else None
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return None
        return _together([distance(x, y) for x, y in zip(a, b, strict=True)])
    if isinstance(a, float):
        if a == b or (a != a and b != b):
            return 0.0
        gap = abs(a - b) / max(abs(a), abs(b), 1e-300)
        return gap / 1e-6 if gap <= 1e-6 else None
    return 0.0 if a == b else None


def _together(distances: list[float | None]) -> float | None:
    if any(d is None for d in distances):
        return None
    return max((d for d in distances if d is not None), default=0.0)


def _tensor_distance(a: Tensor, b: Tensor) -> float | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        return None
    if _equal(a, b):
        return 0.0
    if not a.dtype.is_floating_point:
        return None
    tolerance = TOLERANCE.get(a.dtype, 0.0)
    finite = a.isfinite()
    if not finite.all():
        rest = ~finite
        if not _allclose(a[rest], b[rest], rtol=0, atol=0, equal_nan=True):
            return None
        a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0
    gap = float((a.double() - b.double()).abs().max())
    allowed = tolerance * (float(a.abs().max()) or 1.0)
    return gap / allowed if gap <= allowed else None
