"""Gradients leave as soon as they are there, one buffer at a time.

A reduce-scatter runs beside the backward pass, so its buffer of full gradients lives until it ends.
Started without a limit, the buffers of all layers would live together, which is what sharding is to
avoid: so before the next starts, the previous one is awaited. FSDP2 does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

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

    def start(self, flat: Float[Tensor, " P"], deliver: Deliver, what: str = "") -> None:
        """Begin to reduce a vector of full gradients; `deliver` gets this rank's part of the mean.

        The caller drops its reference, so that the buffer dies with the operation.
        """
        self._end_scattering()
        handle = self._comm.reduce_scatter(flat, "mean", what=what, async_op=True)
        self._scattering = handle, deliver

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


def clip_shards(
    parts: Sequence[Tensor],
    max_norm: float,
    *comms: Comm | None,
    copies: Sequence[int] | None = None,
) -> Float[Tensor, ""]:
    """Scale a vector of which each rank holds parts, so that its norm is at most max_norm.

    Squares are summed over each of `comms` before the root: the group that shards, and the tensor
    ranks or the pipeline where they hold other parts. `copies` says on how many ranks a part lies
    as a whole, so that it counts once. Returns the norm before, on each rank the same. Without
    groups (None) the parts here are all there is.

    Raises: ValueError for a norm that is not positive.
    Source: torch.nn.utils.clip_grad_norm_, whose 1e-6 in the divisor is kept.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected more than 0, got {max_norm}")
    groups = [comm for comm in comms if comm is not None]
    squares = torch.zeros((), device=groups[0].device if groups else None)
    for part, num in zip(parts, copies or [1] * len(parts), strict=True):
        squares += part.float().square().sum() / num
    for group in groups:
        squares = group.all_reduce(squares)
    norm = squares.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for part in parts:
        part.mul_(factor)
    return norm


def copies_on(model: nn.Module, tensor: Comm | None) -> dict[nn.Parameter, int]:
    """On how many tensor parallel ranks each parameter lies as a whole: read from `cuts`, where a
    divided module says how its parameters are divided.

    Raises: ValueError for a divided model without its tensor ranks, or the other way round.
    """
    is_divided = any(getattr(module, "cuts", None) for module in model.modules())
    if is_divided != (tensor is not None):
        raise ValueError(
            f"tensor: expected {'the group' if is_divided else 'no group'} of tensor parallel "
            f"ranks for a model that is {'' if is_divided else 'not '}divided among them, got "
            f"{tensor}; parts of one gradient have one norm"
        )
    found: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            cut = getattr(module, "cuts", {}).get(name)
            whole = tensor.size if tensor is not None else 1
            if parameter is not None:
                found[parameter] = whole if cut is None or cut.dim is None else cut.copies
    return found
