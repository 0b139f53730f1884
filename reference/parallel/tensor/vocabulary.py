"""A vocabulary cut by tokens: embedding, and cross-entropy that never gathers the logits.

The embedding of a token lies on one rank; the others answer with zeros, and the sum is right. The
loss needs of each position three numbers from all ranks: the largest logit, the sum of
exponentials, and the target's logit:

    loss = log sum_v exp(z_v - m) - (z_target - m)        gradient = softmax - one-hot, part by part

So 2 + 1 numbers a position travel in place of V.

Paper: Megatron-LM, 1909.08053, sec. 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from reference.parallel.ranks import Comm
from reference.parallel.tensor.layers import part_of


class VocabParallelEmbedding(nn.Module):
    """This rank's rows of an embedding; its output is a summand: zeros for others' tokens.

    Raises: ValueError where the vocabulary does not divide by the number of ranks.
    """

    def __init__(self, weight: Float[Tensor, "V D"], comm: Comm) -> None:
        super().__init__()
        self.weight = nn.Parameter(part_of(weight, comm, 0, "vocab_size"))
        self.first = comm.rank * len(self.weight)

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        here, inside = local_ids(tokens, self.first, len(self.weight))
        return F.embedding(here, self.weight) * inside[..., None].to(self.weight.dtype)


def local_ids(
    tokens: Int[Tensor, "*shape"], first: int, count: int
) -> tuple[Int[Tensor, "*shape"], Tensor]:
    """Ids counted from this rank's first, 0 where they are another's; and which are its own."""
    inside = (tokens >= first) & (tokens < first + count)
    return torch.where(inside, tokens - first, 0), inside


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, comm: Comm) -> Tensor:
        count = logits.shape[-1]
        highest = comm.all_reduce(logits.amax(-1), "max")
        shifted = logits - highest[..., None]
        here, inside = local_ids(targets, comm.rank * count, count)
        at_target = shifted.gather(-1, here[..., None])[..., 0] * inside
        exponentials = shifted.exp_()
        sums = comm.all_reduce(torch.stack([exponentials.sum(-1), at_target]))
        ctx.save_for_backward(exponentials.div_(sums[0][..., None]), here, inside)
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        softmax, here, inside = ctx.saved_tensors
        grad = softmax * grads[0][..., None]
        grad.scatter_add_(-1, here[..., None], -(grads[0] * inside)[..., None])
        return grad, None, None


def vocab_parallel_cross_entropy(
    logits: Float[Tensor, "*shape v"], targets: Int[Tensor, "*shape"], comm: Comm
) -> Float[Tensor, "*shape"]:
    """The loss of each position, on all ranks, from logits of which each rank has V/N.

    logits    this rank's part, in rank order along the vocabulary; summed in their own dtype
    targets   (...,), of the whole vocabulary, the same on all ranks

    Raises: ValueError for shapes that do not fit.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets: expected shape {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}"
        )
    return _CrossEntropy.apply(logits, targets, comm)
