"""What a reduction makes of each dtype: the same in simulation, on gloo and on NCCL, or refused.

Backends differ where nobody looks. gloo's max keeps or loses a NaN by the rank that holds it, its
sum of booleans leaves the byte 2, and it has no 16-bit integers; NCCL has no booleans. So:

    max, min of floats    a NaN on any rank is in the result, as in torch.maximum. Between processes
                          they travel as integers of the same order, of which a NaN is the extreme
    sum of booleans       or: travels as max; the product, and: as min
    complex               sum and mean alone; max and min have no order to go by
    int16, uint16, ...    refused, with what to convert to
    float8, complex32

A mean is a sum, divided at the end. Sums of three and more ranks are taken in another order by each
backend; here in rank order.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "sum": torch.add,
    "mean": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COMPLEX = (torch.complex128, torch.complex64)
INTEGERS = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


def check_reducible(tensor: Tensor, op: str) -> None:
    """Raises: ValueError for another reduction, TypeError for a dtype that it is not made for."""
    if op not in REDUCTIONS:
        raise ValueError(f"op: expected one of {', '.join(REDUCTIONS)}; got {op!r}")
    dtype = tensor.dtype
    if dtype in FLOATS or (dtype in INTEGERS and op != "mean"):
        return
    if dtype in INTEGERS:
        raise TypeError(f"tensor: expected a floating dtype for a mean, got {dtype}")
    if dtype not in COMPLEX:
        wider = "int32 or int64"
        if dtype.is_floating_point or dtype.is_complex:
            wider = "complex64" if dtype.is_complex else "float32"
        raise TypeError(
            f"tensor: expected a dtype that gloo and NCCL reduce, got {dtype}; convert to {wider}"
        )
    if op not in ("sum", "mean"):
        raise TypeError(f"tensor: expected real numbers for a {op}, as gloo does; got {dtype}")


def reduce_in_rank_order(tensors: Sequence[Tensor], reduction: str) -> Tensor:
    """A new tensor: the reduction of all, from the first to the last. A mean divides at the end."""
    total = tensors[0].clone(memory_format=torch.contiguous_format)
    for tensor in tensors[1:]:
        REDUCTIONS[reduction](total, tensor, out=total)
    return total.div_(len(tensors)) if reduction == "mean" else total


def to_wire(tensor: Tensor, reduction: str) -> Tensor:
    """A contiguous copy for another process's library, on which it will do as is said above."""
    copy = tensor.clone(memory_format=torch.contiguous_format)
    if reduction not in ("min", "max") or not tensor.is_floating_point():
        return copy
    wide = copy if copy.dtype == torch.float64 else copy.float()
    integer = torch.int64 if wide.dtype == torch.float64 else torch.int32
    limits, bits = torch.iinfo(integer), wide.view(integer)
    # Negative floats count downwards: turning all bits but the sign puts them in order.
    ordered = torch.where(bits < 0, bits ^ limits.max, bits)
    return ordered.masked_fill_(wide.isnan(), limits.max if reduction == "max" else limits.min)


def from_wire(result: Tensor, dtype: torch.dtype) -> Tensor:
    """The values again, of what `to_wire` has made and others have reduced."""
    if result.dtype == dtype or dtype not in FLOATS:
        return result
    limits = torch.iinfo(result.dtype)
    bits = torch.where(result < 0, result ^ limits.max, result)
    floats = bits.view(torch.float64 if result.dtype == torch.int64 else torch.float32)
    is_nan = (result == limits.max) | (result == limits.min)
    return floats.masked_fill(is_nan, torch.nan).to(dtype)
