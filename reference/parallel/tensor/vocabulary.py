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
from reference.transformer.loss import IGNORED
from reference.transformer.token_ids import check_token_ids


class VocabParallelEmbedding(nn.Module):
    """This rank's rows of an embedding; its output is a summand: zeros for others' tokens.

    Raises: ValueError where the vocabulary does not divide by the number of ranks, or has not a
    token: all ranks would take it for another's.
    """

    def __init__(self, weight: Float[Tensor, "V D"], comm: Comm) -> None:
        super().__init__()
        self.weight = nn.Parameter(part_of(weight, comm, 0, "vocab_size"))
        self.first, self.vocab_size = comm.rank * len(self.weight), len(weight)

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        check_token_ids("tokens", tokens, self.vocab_size)
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
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        highest = comm.all_reduce(wide.amax(-1), "max")
        shifted = wide - highest[..., None]
        here, inside = local_ids(targets, comm.rank * count, count)
        at_target = torch.where(inside, shifted.gather(-1, here[..., None])[..., 0], 0)
        exponentials = shifted.exp_()
        sums = comm.all_reduce(torch.stack([exponentials.sum(-1), at_target]))
        is_counted = targets != IGNORED
        ctx.save_for_backward(exponentials.div_(sums[0][..., None]), here, inside, is_counted)
        ctx.dtype = logits.dtype
        return torch.where(is_counted, sums[0].log() - sums[1], 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        softmax, here, inside, is_counted = ctx.saved_tensors
        grad = softmax * torch.where(is_counted, grads[0], 0)[..., None]
        at_target = torch.where(inside, -grads[0], 0)
        grad.scatter_add_(-1, here[..., None], at_target[..., None])
        return grad.masked_fill_(~is_counted[..., None], 0).to(ctx.dtype), None, None


def vocab_parallel_cross_entropy(
    logits: Float[Tensor, "*shape v"], targets: Int[Tensor, "*shape"], comm: Comm
) -> Float[Tensor, "*shape"]:
    """The loss of each position, on all ranks, from logits of which each rank has V/N.

    logits    this rank's part, in rank order along the vocabulary; summed in float32 at least
    targets   (...,), of the whole vocabulary, the same on all ranks; -100 for positions that do
              not count: their loss and gradient are 0

    The losses are in that wide dtype. Their mean is token_mean's: `losses.mean()` divides by the
    positions that do not count as well.

    Raises: ValueError for shapes that do not fit and targets outside the vocabulary.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets: expected shape {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}"
        )
    check_token_ids("targets", targets, logits.shape[-1] * comm.size, ignored=IGNORED)
    return _CrossEntropy.apply(logits, targets, comm)
