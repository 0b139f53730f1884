"""Chapter 00: wrong answers that people give, and right ones in another form."""

import torch
import torch.nn.functional as F

from autograder import alternative, misconception

PADDING = "3. A problem: sentences of different lengths"
FIRST = "5. A first answer, and what the grader makes of it"
EDGES = "6. A second answer, and the edges"


def _kept(hidden, is_real):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(wide).masked_fill(~is_real[..., None], 0)


def _mean(hidden, is_real):
    return _kept(hidden, is_real).sum(1) / is_real.sum(1, keepdim=True).clamp(min=1)


@misconception(
    "mean_pool",
    "Your result equals the mean over all positions, padding included. A sentence then depends on "
    "how long its neighbours in the batch are: average over the real positions only.",
    see=PADDING,
)
def averages_the_padding_too(hidden, is_real):
    return hidden.mean(1)


@misconception(
    "mean_pool",
    "You leave the padding out of the sum but count it in the division. Divide by the number of "
    "real tokens of each sentence, not by T.",
    see=FIRST,
)
def divides_by_the_padded_length(hidden, is_real):
    return (_kept(hidden, is_real).sum(1) / hidden.shape[1]).to(hidden.dtype)


@misconception(
    "mean_pool",
    "Your result equals the sum over the real tokens. A mean divides it by their number, so that a "
    "long sentence is not a large vector.",
    see=FIRST,
)
def adds_without_dividing(hidden, is_real):
    return _kept(hidden, is_real).sum(1).to(hidden.dtype)


@misconception(
    "mean_pool",
    "Your result is right for ordinary sentences and wrong at all three edges: nan at padding "
    "(0 * nan is nan), no tokens (0 / 0 is nan), float16 sums above 65504. Mend them one by one.",
    see=EDGES,
)
def leaves_out_the_edges(hidden, is_real):
    return (hidden * is_real[..., None]).sum(1) / is_real.sum(1, keepdim=True)


@misconception(
    "mean_pool",
    "You multiply the padding by zero. Whatever it held goes, unless it held nan or inf: 0 * nan "
    "is nan. Replace the values (masked_fill, where) instead of scaling them.",
    see=EDGES,
)
def multiplies_the_padding_by_zero(hidden, is_real):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    kept = hidden.to(wide) * is_real[..., None]
    return (kept.sum(1) / is_real.sum(1, keepdim=True).clamp(min=1)).to(hidden.dtype)


@misconception(
    "mean_pool",
    "A sentence without real tokens gives you 0 / 0 = nan, which spreads to every loss that it "
    "touches. Divide by at least one.",
    see=EDGES,
)
def divides_zero_by_zero(hidden, is_real):
    return (_kept(hidden, is_real).sum(1) / is_real.sum(1, keepdim=True)).to(hidden.dtype)


@misconception(
    "mean_pool",
    "You add up in the dtype of the input. float16 ends at 65504, so that the sum of a long "
    "sentence is inf although its mean is small. Widen to float32 before you add.",
    see=EDGES,
)
def adds_up_in_float16(hidden, is_real):
    kept = hidden.masked_fill(~is_real[..., None], 0)
    return kept.sum(1) / is_real.sum(1, keepdim=True).clamp(min=1)


@misconception(
    "mean_pool",
    "Your values are right, in float32. Widening is for the sum: give the result back in the "
    "dtype that came in.",
    see=EDGES,
)
def returns_float32(hidden, is_real):
    return _mean(hidden, is_real)


@misconception(
    "mean_pool",
    "Your result equals the mean over all sentences of the batch at once. Reduce the token "
    "dimension (1) and keep the batch dimension (0).",
    see=FIRST,
)
def averages_over_the_batch(hidden, is_real):
    return hidden[is_real].mean(0)


@misconception(
    "mean_pool",
    "Your values are those of the usual code for Sentence-BERT, which trusts its input: nan at "
    "padding survives the product with the mask (0 * nan is nan), and half precision comes back "
    "as float32. Here both matter.",
    see=EDGES,
)
def pools_as_sentence_transformers_does(hidden, is_real):
    weights = is_real.unsqueeze(-1).expand(hidden.size()).float()
    return torch.sum(hidden * weights, 1) / torch.clamp(weights.sum(1), min=1e-9)


@misconception(
    "mean_pool",
    "You count the real tokens and take so many from the left. Padding may stand on the left, or "
    "in between: is_real says which positions count, not only how many.",
    see=PADDING,
)
def assumes_padding_on_the_right(hidden, is_real):
    num_real = is_real.sum(1)
    on_the_right = torch.arange(hidden.shape[1]) < num_real[:, None]
    return _mean(hidden, on_the_right).to(hidden.dtype)


@misconception(
    "mean_pool",
    "You add up in float32 whatever comes. 'In float32 at least' keeps float64: widen float16 and "
    "bfloat16 only, or the digits that a caller paid for are gone.",
    see=EDGES,
)
def narrows_float64_to_float32(hidden, is_real):
    return _mean(hidden.float(), is_real).to(hidden.dtype)


@misconception(
    "mean_pool",
    "Your result has one number per token: the mean over the width. The mean runs over tokens, and "
    "keeps all D features.",
    see=FIRST,
)
def averages_over_the_width(hidden, is_real):
    return hidden.mean(-1)


@misconception(
    "mean_pool",
    "Your result is the vector of the last position. That is another way to pool (it suits models "
    "trained for it), and where sentences are padded on the right it reads padding.",
    see=PADDING,
)
def takes_the_last_position(hidden, is_real):
    return hidden[:, -1].clone()


@misconception(
    "mean_pool",
    "Your result is the mean scaled to length one. Cosine similarity does that anyway; a caller "
    "who wants the mean cannot get it back.",
    see=FIRST,
)
def scales_to_unit_length(hidden, is_real):
    return F.normalize(_mean(hidden, is_real), dim=-1).to(hidden.dtype)


@alternative("mean_pool")
def with_a_loop(hidden, is_real):
    out = torch.zeros_like(hidden[:, 0])
    for row, (vectors, real) in enumerate(zip(hidden, is_real, strict=True)):
        if real.any():
            out[row] = vectors[real].mean(0)
    return out


@alternative("mean_pool")
def with_weights_and_a_product(hidden, is_real):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weights = is_real.to(wide) / is_real.sum(1, keepdim=True).clamp(min=1)
    safe = torch.where(is_real[..., None], hidden, 0).to(wide)
    return torch.einsum("bt,btd->bd", weights, safe).to(hidden.dtype)


@alternative("mean_pool")
def with_nanmean_in_float64(hidden, is_real):
    known = hidden.double().masked_fill(~is_real[..., None], float("nan"))
    return known.nanmean(1).nan_to_num().to(hidden.dtype)
