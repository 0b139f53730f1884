"""The older way: one process owns the model, the others serve it.

nn.DataParallel sends the model to all devices again in each forward, gathers the outputs on one,
computes the loss there, and brings the gradients back: the same values as DDP, with rank 0 in the
middle of everything, and with all devices driven by threads of one interpreter.

Here rank 0 is that process and the others are its devices.

Source: torch.nn.parallel.DataParallel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from reference.parallel.ranks import Comm

Loss = Callable[[Tensor], Tensor]


def data_parallel_step(
    comm: Comm, module: nn.Module, batch: Shaped[Tensor, "B ..."], loss_of_outputs: Loss
) -> Tensor | None:
    """One forward and backward; afterwards rank 0's parameters have the gradient of the batch.

    module    the same shape on all ranks; only rank 0's values count, the others' are overwritten
    batch     (B, ...); only rank 0's values count; B divides by the number of ranks
    returns   the loss on rank 0, None elsewhere

    Raises: ValueError where B does not divide.
    """
    if batch.shape[0] % comm.size:
        raise ValueError(f"batch: expected a multiple of {comm.size} rows, got {batch.shape[0]}")
    is_owner = comm.rank == 0
    with torch.no_grad():
        for parameter in module.parameters():
            comm.broadcast(parameter.detach(), src=0)
    rows = batch.new_empty(batch.shape[0] // comm.size, *batch.shape[1:])
    comm.scatter(rows, batch if is_owner else None, src=0)
    output = module(rows)
    gathered = comm.gather(output.detach(), dst=0)
    loss, grads = None, None
    if is_owner:
        gathered.requires_grad_()
        loss = loss_of_outputs(gathered)
        (grads,) = torch.autograd.grad(loss, gathered)
        loss = loss.detach()
    grad = torch.empty_like(output)
    comm.scatter(grad, grads, src=0)
    own = torch.autograd.grad(output, list(module.parameters()), grad)
    for parameter, gradient in zip(module.parameters(), own, strict=True):
        comm.reduce(gradient, dst=0)
        if is_owner:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return loss
