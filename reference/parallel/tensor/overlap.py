"""A product that begins before its input has arrived.

With sequence parallelism a rank has t of T positions, and its columns of Q, K and V need all. The
all-gather stands before the product, and nothing else can run. But the product of a position needs
that position alone: so parts travel round a ring, and each is multiplied while the next one is on
its way:

    network   | part r-1 | part r-2 | part r-3 |
    compute   | part r   | part r-1 | part r-2 | part r-3 |

Megatron-LM's `--tp-comm-overlap` and FastSeq do this on GPUs; the ring is chapter 11's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reference.parallel.ranks import Comm
from reference.parallel.tensor.operators import check_no_gradient


def gathered_linear(
    x: Float[Tensor, "B t D"], weight: Float[Tensor, "f D"], comm: Comm
) -> Float[Tensor, "B T f"]:
    """All-gather, then multiply: the two after each other. Forward only.

    Raises: ValueError where x asks for a gradient.
    """
    check_no_gradient(x=x)
    whole = comm.all_gather(x.transpose(0, 1).contiguous()).transpose(0, 1)
    return F.linear(whole, weight)


def overlapped_linear(
    x: Float[Tensor, "B t D"], weight: Float[Tensor, "f D"], comm: Comm
) -> Float[Tensor, "B T f"]:
    """The same, each part of the positions multiplied while the next one travels. Forward only.

    Raises: ValueError where x asks for a gradient.
    """
    check_no_gradient(x=x)
    parts: dict[int, Tensor] = {}
    here = x.contiguous()
    for step in range(comm.size):
        arriving, handles = torch.empty_like(here), []
        if step + 1 < comm.size:
            handles = [
                comm.isend(here, (comm.rank + 1) % comm.size),
                comm.irecv(arriving, (comm.rank - 1) % comm.size),
            ]
        parts[(comm.rank - step) % comm.size] = F.linear(here, weight)
        for handle in handles:
            handle.wait()
        here = arriving
    return torch.cat([parts[rank] for rank in range(comm.size)], 1)
