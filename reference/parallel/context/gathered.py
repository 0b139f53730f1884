"""Attention with gathered keys: all keys and values on each rank, queries in parts.

The simplest context parallelism, that of Llama 3: all-gather k and v, attend with this rank's
queries, and backward reduce-scatter their gradients. A rank holds the keys of the whole text while
it attends, and nothing is hidden behind computing; with few key/value heads both are small beside
attention, which grows with T^2 / N, and any mask is easy.

Source: Llama 3, 2407.21783, sec. 3.3.2, "Context parallelism for long sequences".
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reference.parallel.context.layout import Tile, stretches, tiles
from reference.parallel.context.partial import Gradients, Kernel, Partial, check_parts
from reference.parallel.ranks import Comm


def gathered_attention(
    q: Float[Tensor, "B H t d"],
    k: Float[Tensor, "B K t d"],
    v: Float[Tensor, "B K t dv"],
    comm: Comm,
    kernel: Kernel = Kernel(),  # noqa: B008
) -> Float[Tensor, "B H t dv"]:
    """As `ring_attention`, with another way for keys and values: the same bytes forward.

    Keys are gathered again in backward, so that none but this rank's own are kept.

    Raises: ValueError for shapes that do not fit, TypeError for unequal dtypes.
    Source: arXiv 2407.21783, sec. 3.3.2.
    """
    check_parts(q, k, v)
    return _Gathered.apply(q, k, v, comm, kernel)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, comm: Comm, kernel: Kernel
    ) -> Tensor:  # fmt: skip
        partial = Partial(q, v)
        partial.add(q, *_all(k, v, comm), _meeting(q, comm, kernel), kernel)
        out = partial.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, partial.lse)
        ctx.comm, ctx.kernel = comm, kernel
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        comm, kernel = ctx.comm, ctx.kernel
        gradients = Gradients(grad, q, out, lse)
        whole = gradients.of(*_all(k, v, comm), _meeting(q, comm, kernel), kernel)
        packed = torch.cat(whole, -1).permute(2, 0, 1, 3).contiguous()  # (T, B, K, d + dv)
        part = comm.reduce_scatter(packed).permute(1, 2, 0, 3)
        dk, dv = part[..., : k.shape[3]], part[..., k.shape[3] :]
        return gradients.dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _all(k: Tensor, v: Tensor, comm: Comm) -> tuple[Tensor, Tensor]:
    """The keys and values of all ranks, in rank order."""
    packed = torch.cat([k, v], -1).permute(2, 0, 1, 3).contiguous()
    whole = comm.all_gather(packed).permute(1, 2, 0, 3)
    return whole[..., : k.shape[3]], whole[..., k.shape[3] :]


def _meeting(q: Tensor, comm: Comm, kernel: Kernel) -> list[Tile]:
    seq_len = q.shape[2] * comm.size
    held = [stretches(kernel.layout, seq_len, rank, comm.size) for rank in range(comm.size)]
    keys = [stretch for stretches_ in held for stretch in stretches_]
    return list(tiles(held[comm.rank], keys, is_causal=kernel.is_causal))
