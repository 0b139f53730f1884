"""From softmax to a weighted sum in one pass: the algebra under FlashAttention.

exp overflows, so the maximum is subtracted first; but the maximum is known only at the end. The
online softmax keeps a provisional maximum m and sum l, and corrects l whenever m grows:

    m' = max(m, x)        l' = l * exp(m - m') + exp(x - m')

The same correction carries a weighted sum along, so that scores need never be kept at all. Two
partial results over different keys merge exactly by their log-sum-exp, in any order.

Passes over N scores: naive 2 (wrong beyond exp's range), safe 3, online 2, weighted sum 1.

Shapes: N scores, S keys, T queries, dv width of the values.
Source: Milakov and Gimelshein, arXiv 1805.02867, alg. 1 to 3.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from reference.attention.weighted import weighted_sum


def naive_softmax(x: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    """exp(x) / sum(exp(x)), in the dtype of x: infinite beyond 88 in float32, 11 in float16."""
    terms = x.exp()
    return terms / terms.sum(dim, keepdim=True)


def safe_softmax(x: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    """The same with the maximum subtracted: three passes, to find it, to sum, to divide."""
    terms = (x - x.amax(dim, keepdim=True)).exp()
    return terms / terms.sum(dim, keepdim=True)


def online_normalizer(
    x: Float[Tensor, "..."], *, block_size: int = 1, dim: int = -1
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Maximum m and sum l of exp(x - m), both in one pass over blocks of x along `dim`.

    Raises: ValueError for a block size below 1.
    Source: arXiv 1805.02867, alg. 3.
    """
    check_block_size("block_size", block_size)
    x = x.movedim(dim, -1)
    m = x.new_full(x.shape[:-1], -torch.inf)
    total = x.new_zeros(x.shape[:-1])
    for block in x.split(block_size, -1):
        new_m = torch.maximum(m, block.amax(-1))
        total = total * rescale(m, new_m) + (block - shift(new_m)[..., None]).exp().sum(-1)
        m = new_m
    return m, total


def online_softmax(
    x: Float[Tensor, "..."], *, block_size: int = 1, dim: int = -1
) -> Float[Tensor, "..."]:
    """Softmax in two passes: one for maximum and sum together, one to divide.

    Raises: ValueError for a block size below 1.
    Source: arXiv 1805.02867, alg. 3.
    """
    m, total = online_normalizer(x, block_size=block_size, dim=dim)
    return (x - m.unsqueeze(dim)).exp() / total.unsqueeze(dim)


def online_weighted_sum(
    scores: Float[Tensor, "... T S"], values: Float[Tensor, "... S dv"], *, block_size: int
) -> tuple[Float[Tensor, "... T dv"], Float[Tensor, "... T"]]:
    """softmax(scores) @ values and the log-sum-exp of the scores, in one pass over the keys.

    The output stays unnormalised until the end: one division a row instead of one a block.

    Raises: ValueError for a block size below 1.
    Source: FlashAttention-2, arXiv 2307.08691, sec. 3.1.
    """
    check_block_size("block_size", block_size)
    m = scores.new_full(scores.shape[:-1], -torch.inf)
    total = scores.new_zeros(scores.shape[:-1])
    out = scores.new_zeros((*scores.shape[:-1], values.shape[-1]))
    blocks = zip(scores.split(block_size, -1), values.split(block_size, -2), strict=True)
    for block, value in blocks:
        new_m = torch.maximum(m, block.amax(-1))
        factor = rescale(m, new_m)
        terms = (block - shift(new_m)[..., None]).exp()
        total = total * factor + terms.sum(-1)
        out = out * factor[..., None] + weighted_sum(terms, value)
        m = new_m
    return normalize(out, m, total)


def merge(
    out: Float[Tensor, "P ... dv"], lse: Float[Tensor, "P ..."]
) -> tuple[Float[Tensor, "... dv"], Float[Tensor, "..."]]:
    """Join P results over different keys: their average, weighted by exp(lse).

    An empty part has lse = -inf and counts nothing; where all are empty the output is zero.

    Source: FlashAttention-2, arXiv 2307.08691, sec. 2.3; used between devices by Ring Attention.
    """
    m = lse.amax(0)
    weights = (lse - shift(m)).exp()
    total = weights.sum(0)
    joined = (out * weights[..., None]).sum(0)
    return normalize(joined, m, total)


def rescale(old_m: Tensor, new_m: Tensor) -> Tensor:
    """exp(old_m - new_m): what earlier sums are worth under the new maximum; at most 1."""
    return (old_m - shift(new_m)).exp()


def shift(m: Tensor) -> Tensor:
    """The maximum to subtract: 0 where no key was seen yet, so that -inf - -inf is not NaN."""
    return m.masked_fill(m == -torch.inf, 0.0)


def normalize(out: Tensor, m: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Divide by the sum; lse = m + log(sum). Rows without a key: zeros and -inf."""
    is_empty = total == 0
    return out / total.masked_fill(is_empty, 1.0)[..., None], m + total.log()


def check_block_size(name: str, size: int) -> None:
    """Raises: ValueError for a block of less than one row or column."""
    if size < 1:
        raise ValueError(f"{name}: expected at least 1, got {size}")
