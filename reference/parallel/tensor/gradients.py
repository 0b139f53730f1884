"""The norm of a gradient of which each rank has a part of some tensors, and all of others.

    norm^2 = sum over ranks |divided parts|^2 + |what all ranks hold|^2

Summing everything over ranks counts norms, whole factors of adapters and copied key heads several
times, and clips too hard; summing nothing gives each rank another norm, and copies drift apart.

Source: Megatron-LM's clip_grads, which leaves out parameters that are not divided on all ranks but
the first.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reference.parallel.ranks import Comm
from reference.parallel.tensor.cut import parameters_with_cuts


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float, comm: Comm) -> Float[Tensor, ""]:
    """Shrink a divided model's gradients so that the whole gradient's norm is at most max_norm.

    Returns the norm before, the same bits on all ranks, in float32 at least. Every rank of `comm`
    calls it; one number each travels. The factor is max_norm / (norm + 1e-6), as torch has it.

    Raises: ValueError for a max_norm that is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected more than 0, got {max_norm}")
    gradients, counted = [], []
    for _, parameter, cut in parameters_with_cuts(model):
        if parameter.grad is None:
            continue
        gradients.append(parameter.grad)
        copies = comm.size if cut.dim is None else cut.copies
        if comm.rank % copies == 0:
            counted.append(parameter.grad)
    wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    norms = [torch.linalg.vector_norm(g, dtype=wide) for g in counted]
    own = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=wide)
    norm = torch.linalg.vector_norm(comm.all_gather(own.to(comm.device)[None]))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return norm
