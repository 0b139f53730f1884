"""Gradients travel in buckets: too large for latency to count, small enough to start early.

Backward makes gradients from the last layer to the first, so buckets are filled in that order. The
first one is small, so that the network begins to work as soon as it can.

Paper: PyTorch Distributed, Li et al., arXiv 2006.15704, sec. 3.2.3.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20
FIRST_BUCKET_BYTES = 2**20

Named = tuple[str, nn.Parameter]


def divide(
    named: Iterable[Named],
    bucket_bytes: int = BUCKET_BYTES,
    first_bucket_bytes: int | None = None,
) -> list[list[Named]]:
    """Parameters that learn, from the last to the first, in buckets of one dtype and device each.

    A bucket is full, and the next begins, when it has reached `bucket_bytes` (`first_bucket_bytes`
    for the first of its dtype), as in torch's `_compute_bucket_assignment_by_size`. Buckets stand
    in the order in which backward begins to fill them.

    Raises: ValueError for a size below 1, or where nothing learns.
    """
    first = bucket_bytes if first_bucket_bytes is None else first_bucket_bytes
    for name, size in (("bucket_bytes", bucket_bytes), ("first_bucket_bytes", first)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    buckets: list[list[Named]] = []
    open_bucket: dict[object, list[Named]] = {}
    limit: dict[object, int] = {}
    for name, parameter in reversed(list(named)):
        if not parameter.requires_grad:
            continue
        kind = (parameter.dtype, parameter.device)
        if kind not in open_bucket:
            open_bucket[kind] = []
            buckets.append(open_bucket[kind])
        bucket = open_bucket[kind]
        bucket.append((name, parameter))
        if num_bytes(p for _, p in bucket) >= limit.setdefault(kind, first):
            limit[kind] = bucket_bytes
            del open_bucket[kind]
    if not buckets:
        raise ValueError("module: expected parameters that require a gradient, got none")
    return buckets


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors)
