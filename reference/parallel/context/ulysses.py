"""DeepSpeed-Ulysses: from parts of the positions to parts of the heads, and back.

Attention mixes positions and leaves heads apart; all else mixes widths and leaves positions apart.
So each has the layout that it likes, and an all-to-all, a transpose of a matrix of which each rank
has a row, stands between them:

    (B, H, T/N, d)  <->  (B, H/N, T, d)

Any attention runs in between, unchanged. Four transposes of a layer forward: q, k, v and the
output. N cannot exceed the number of query heads.

Paper: Jacobs et al., 2309.14509, sec. 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reference.attention.dot_product import repeat_kv
from reference.flash_attention import flash_attention
from reference.parallel.context.layout import positions
from reference.parallel.context.partial import Kernel, check_parts
from reference.parallel.context.ring import ring_attention
from reference.parallel.ranks import Comm

AttendParts = Callable[[Tensor, Tensor, Tensor, Comm, Kernel], Tensor]


def heads_from_positions(
    x: Float[Tensor, "B H t d"], comm: Comm
) -> Float[Tensor, "B h T d"]:  # fmt: skip
    """This rank's heads at all positions, from all heads at this rank's positions.

    Backward is `positions_from_heads`. Raises: ValueError where heads do not divide by ranks.
    """
    if x.shape[1] % comm.size:
        raise ValueError(
            f"x: expected a multiple of {comm.size} heads, the number of ranks, got {x.shape[1]}; "
            "use fewer ranks for Ulysses and a ring for the rest"
        )
    return _HeadsFromPositions.apply(x, comm)


def positions_from_heads(
    x: Float[Tensor, "B h T d"], comm: Comm
) -> Float[Tensor, "B H t d"]:  # fmt: skip
    """The inverse of `heads_from_positions`, and its backward.

    Raises: ValueError where positions do not divide by ranks.
    """
    if x.shape[2] % comm.size:
        raise ValueError(
            f"x: expected a multiple of {comm.size} positions, the number of ranks, got "
            f"{x.shape[2]}; pad the text"
        )
    return _PositionsFromHeads.apply(x, comm)


def ulysses_attention(
    q: Float[Tensor, "B H t d"],
    k: Float[Tensor, "B K t d"],
    v: Float[Tensor, "B K t dv"],
    comm: Comm,
    kernel: Kernel = Kernel(),  # noqa: B008
    *,
    ring: Comm | None = None,
    attend: AttendParts = ring_attention,
) -> Float[Tensor, "B H t dv"]:
    """Attention over the positions of all ranks, each with its heads; differentiable.

    Alone `comm` holds the whole text, divided as `kernel.layout` says. With `ring` it holds what
    one rank of a ring of that layout would, its ranks neighbouring positions, and `attend` reaches
    the rest along `ring`: Ulysses x Ring, a 2D mesh of which the sides multiply. Where there are
    fewer key/value heads than ranks each rank sends the one that the receiver needs, so several get
    the same.

    Raises: ValueError where heads do not divide by ranks, or positions by the layout; for `attend`
    without `ring`.
    Source: arXiv 2309.14509, sec. 3; both together, Fang and Zhao, arXiv 2405.07719.
    """
    check_parts(q, k, v)
    if ring is None and attend is not ring_attention:
        raise ValueError("attend: expected a ring that it goes along, got ring=None")
    num_kv_heads = k.shape[1]
    if comm.size > num_kv_heads and comm.size % num_kv_heads == 0:
        k, v = (repeat_kv(x, comm.size // num_kv_heads) for x in (k, v))
    q, k, v = (heads_from_positions(x, comm) for x in (q, k, v))
    out = _in_order(q, k, v, comm, kernel) if ring is None else attend(q, k, v, ring, kernel)
    return positions_from_heads(out, comm)


def _in_order(q: Tensor, k: Tensor, v: Tensor, comm: Comm, kernel: Kernel) -> Tensor:
    """Attention of some heads at all positions, which stand as the ranks had them."""
    held = [positions(kernel.layout, q.shape[2], rank, comm.size) for rank in range(comm.size)]
    place = torch.cat(held).to(q.device)
    if is_moved := kernel.is_causal and kernel.layout != "contiguous":
        q, k, v = (x.index_select(2, place.argsort()) for x in (q, k, v))
    out = flash_attention(q, k, v, is_causal=kernel.is_causal, **kernel.options(q))
    return out.index_select(2, place) if is_moved else out


class _HeadsFromPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return _to_heads(x, comm)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _to_positions(grads[0], ctx.comm), None


class _PositionsFromHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return _to_positions(x, comm)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _to_heads(grads[0], ctx.comm), None


def _to_heads(x: Tensor, comm: Comm) -> Tensor:
    mine = comm.all_to_all(x.transpose(0, 1).contiguous())  # (N h, B, t, d), by sender
    by_sender = mine.unflatten(0, (comm.size, -1))
    return by_sender.permute(2, 1, 0, 3, 4).flatten(2, 3)


def _to_positions(x: Tensor, comm: Comm) -> Tensor:
    by_receiver = x.unflatten(2, (comm.size, -1)).permute(2, 1, 0, 3, 4)  # (N, h, B, t, d)
    mine = comm.all_to_all(by_receiver.flatten(0, 1).contiguous())
    return mine.transpose(0, 1)
