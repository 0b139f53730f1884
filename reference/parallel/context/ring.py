"""Ring Attention: queries stay, keys and values go round.

Each rank has t = T / N positions. In N steps the keys and values of every rank visit it; while it
attends to one part, the next is on its way:

    step        0       1       2       3
    network     r-1     r-2     r-3               arriving at rank r
    compute     r       r-1     r-2     r-3       keys of rank ...

Nobody ever holds the keys of the whole text: two parts at a time, one in use, one arriving. What
a step contributes joins the rest by its log-sum-exp. Backward keys and values go round again, with
their gradients one step behind them, which are home after N steps.

Papers: Ring Attention, Liu et al., 2310.01889, sec. 3 and alg. 1; the joining of parts, also Li et
al., LightSeq, 2310.03294.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reference.parallel.context.layout import Tile, stretches, tiles
from reference.parallel.context.partial import Gradients, Kernel, Partial, check_parts
from reference.parallel.ranks import Comm, Handle

KEYS, GRADIENTS = 0, 1  # tags: the two kinds of messages must not be taken for each other


def ring_attention(
    q: Float[Tensor, "B H t d"],
    k: Float[Tensor, "B K t d"],
    v: Float[Tensor, "B K t dv"],
    comm: Comm,
    kernel: Kernel = Kernel(),  # noqa: B008
) -> Float[Tensor, "B H t dv"]:
    """This rank's part of softmax(q k^T) v over the whole text, differentiable in q, k and v.

    All ranks hold equally many positions, in the order of `kernel.layout`. A rank sends N - 1 times
    its keys and values forward; as much again, and N times their gradients, backward. Result in
    the dtype of q; sums, and gradients on their way, in float32 at least.

    Raises: ValueError for shapes that do not fit, TypeError for unequal dtypes.
    Source: arXiv 2310.01889, alg. 1.
    """
    check_parts(q, k, v)
    return _Ring.apply(q, k, v, comm, kernel)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, comm: Comm, kernel: Kernel
    ) -> Tensor:  # fmt: skip
        partial, here = Partial(q, v), _pack(k, v)
        for step in range(comm.size):
            arriving, handles = _pass_on(here, comm, KEYS, step + 1 < comm.size)
            partial.add(q, *_unpack(here, k), _meeting(q, comm, step, kernel), kernel)
            here = _arrived(arriving, handles)
        out = partial.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, partial.lse)
        ctx.comm, ctx.kernel = comm, kernel
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        comm, kernel = ctx.comm, ctx.kernel
        gradients, here = Gradients(grad, q, out, lse), _pack(k, v)
        behind: tuple[Tensor, list[Handle]] | None = None
        for step in range(comm.size):
            arriving, handles = _pass_on(here, comm, KEYS, step + 1 < comm.size)
            meeting = _meeting(q, comm, step, kernel)
            own = _pack(*gradients.of(*_unpack(here, k), meeting, kernel))
            total = own if behind is None else own + _arrived(*behind)
            behind = _pass_on(total, comm, GRADIENTS, comm.size > 1)
            here = _arrived(arriving, handles)
        assert behind is not None
        dk, dv = _unpack(_arrived(*behind) if comm.size > 1 else total, k)
        return gradients.dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _pass_on(
    here: Tensor, comm: Comm, tag: int, is_needed: bool
) -> tuple[Tensor, list[Handle]]:  # fmt: skip
    """Send to the next rank, receive from the previous one, without waiting."""
    if not is_needed:
        return here, []
    arriving = torch.empty_like(here)
    comm.memory.label(arriving, "communication_buffers")
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    return arriving, [comm.isend(here, after, tag=tag), comm.irecv(arriving, before, tag=tag)]


def _arrived(arriving: Tensor, handles: list[Handle]) -> Tensor:
    for handle in handles:
        handle.wait()
    handles.clear()  # they hold what was sent: a third part in memory
    return arriving


def _meeting(q: Tensor, comm: Comm, step: int, kernel: Kernel) -> list[Tile]:
    """What this rank's queries see of the keys that visit in a step."""
    seq_len, owner = q.shape[2] * comm.size, (comm.rank - step) % comm.size
    queries, keys = (
        stretches(kernel.layout, seq_len, rank, comm.size) for rank in (comm.rank, owner)
    )
    return list(tiles(queries, keys, is_causal=kernel.is_causal))


def _pack(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values as one message."""
    return torch.cat([k, v], -1)


def _unpack(packed: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return packed[..., : k.shape[-1]], packed[..., k.shape[-1] :]
