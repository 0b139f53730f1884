"""Gradients leave as soon as they are there, one buffer at a time.

A reduce-scatter runs beside the backward pass, so its buffer of full gradients lives until it ends.
Started without a limit, the buffers of all layers would live together, which is what sharding is to
avoid: so before the next starts, the previous one is awaited. FSDP2 does the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from reference.parallel.ranks import Comm, Handle

Deliver = Callable[[Tensor], None]


class GradientReducer:
    """Means over `comm`, each rank keeping its part; then over `replicas`, where there are any.

    With `replicas` (hybrid sharding) the parts of one group are averaged with those of the others:
    a small all-reduce between nodes after a large reduce-scatter within one.
    """

    def __init__(self, comm: Comm, replicas: Comm | None = None) -> None:
        self._comm, self._replicas = comm, replicas
        self._scattering: tuple[Handle, Deliver] | None = None
        self._averaging: tuple[Handle, Deliver] | None = None

    def start(self, flat: Float[Tensor, " P"], deliver: Deliver) -> None:
        """Begin to reduce a vector of full gradients; `deliver` gets this rank's part of the mean.

        The caller drops its reference, so that the buffer dies with the operation.
        """
        self._end_scattering()
        self._scattering = self._comm.reduce_scatter(flat, "mean", async_op=True), deliver

    def finish(self) -> None:
        """Wait for all that was started."""
        self._end_scattering()
        self._end_averaging()

    def _end_scattering(self) -> None:
        if self._scattering is None:
            return
        (handle, deliver), self._scattering = self._scattering, None
        part = handle.wait()
        if self._replicas is None or self._replicas.size == 1:
            deliver(part)
            return
        self._end_averaging()
        self._averaging = self._replicas.all_reduce(part, "mean", async_op=True), deliver

    def _end_averaging(self) -> None:
        if self._averaging is not None:
            (handle, deliver), self._averaging = self._averaging, None
            deliver(handle.wait())


def clip_shards(parts: list[Tensor], max_norm: float, comm: Comm | None) -> Float[Tensor, ""]:
    """Scale a vector of which each rank holds parts, so that its norm is at most max_norm.

    Squares are summed over the ranks before the root. Returns the norm before, on each rank the
    same. With comm=None the parts here are all there is.

    Raises: ValueError for a norm that is not positive.
    Source: torch.nn.utils.clip_grad_norm_, whose 1e-6 in the divisor is kept.
    """
    if max_norm <= 0:
        raise ValueError(f"max_norm: expected more than 0, got {max_norm}")
    squares = torch.zeros((), device=comm.device if comm else None)
    for part in parts:
        squares += part.float().square().sum()
    norm = (comm.all_reduce(squares) if comm else squares).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for part in parts:
        part.mul_(factor)
    return norm
