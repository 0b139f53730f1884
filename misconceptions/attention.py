"""Chapter 04: wrong answers that people give, and right ones in another form."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from autograder import alternative, misconception

SCORES = "2. Scores, softmax, weighted sum"
SCALE = "3. Why divide by the root of the head width"
MASKS = "4. Masks"
DROPOUT = "5. Dropout on probabilities"
HEADS = "6. Many heads, one layer"
GROUPS = "7. Fewer key and value heads"
ELSEWHERE = "8. Queries from elsewhere: cross-attention and caches"
BACKWARD = "9. The backward pass"
COST = "12. What it costs"
PRACTICE = "15. What breaks in practice"


# scaled_dot_product_attention


def _attention(q, k, v, is_kept, dropout_rate, *, scale=None, dim=-1, drop_scores=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ k.mT * scale
    if is_kept is not None and drop_scores is not None:
        scores = drop_scores(scores, is_kept, dropout_rate)
    weights = scores.softmax(dim)
    if is_kept is not None and drop_scores is None:
        weights = weights * is_kept / (1 - dropout_rate)
    return weights @ v


@misconception(
    "scaled_dot_product_attention",
    "Your result equals attention without the scale. Products of d unit-variance pairs have "
    "variance d, and the softmax saturates: divide the scores by sqrt(d).",
    see=SCALE,
)
def does_not_scale_the_scores(q, k, v, is_kept=None, dropout_rate=0.0):
    return _attention(q, k, v, is_kept, dropout_rate, scale=1.0)


@misconception(
    "scaled_dot_product_attention",
    "Your scores are divided by d. The variance of q k^T is d, its standard deviation sqrt(d): "
    "dividing by d makes all keys nearly equal.",
    see=SCALE,
)
def divides_by_the_width_itself(q, k, v, is_kept=None, dropout_rate=0.0):
    return _attention(q, k, v, is_kept, dropout_rate, scale=1 / q.shape[-1])


@misconception(
    "scaled_dot_product_attention",
    "Your softmax runs along the queries. Each query distributes its own attention: normalise "
    "along the last dimension of the scores, the keys.",
    see=SCORES,
)
def normalises_over_the_queries(q, k, v, is_kept=None, dropout_rate=0.0):
    return _attention(q, k, v, is_kept, dropout_rate, dim=-2)


@misconception(
    "scaled_dot_product_attention",
    "Your dropout acts on the scores. A score of zero is no absence: exp(0) = 1 still gets its "
    "share. Drop probabilities, after the softmax.",
    see=DROPOUT,
)
def drops_scores_instead_of_probabilities(q, k, v, is_kept=None, dropout_rate=0.0):
    return _attention(
        q, k, v, is_kept, dropout_rate, drop_scores=lambda z, kept, rate: z * kept / (1 - rate)
    )


@misconception(
    "scaled_dot_product_attention",
    "Your dropout zeroes what is negative. That is ReLU. Dropout looks at no value: it drops at "
    "random, positions where is_kept is False, whatever their sign.",
    see=DROPOUT,
)
def dropout_zeroes_negative_values(q, k, v, is_kept=None, dropout_rate=0.0):
    return _attention(q, k, v, is_kept, dropout_rate, drop_scores=lambda z, kept, rate: z.relu())


@misconception(
    "scaled_dot_product_attention",
    "Your dropout does not scale up what it keeps. Without 1 / (1 - rate) the outputs of training "
    "are smaller on average than those of evaluation.",
    see=DROPOUT,
)
def dropout_without_rescaling(q, k, v, is_kept=None, dropout_rate=0.0):
    return _attention(q, k, v, is_kept, 0.0)


@misconception(
    "scaled_dot_product_attention",
    "Your dropout normalises the surviving probabilities to one again (as -inf in the scores "
    "does). They are divided by 1 - rate, so that their sum is one on average only.",
    see=DROPOUT,
)
def normalises_again_after_dropout(q, k, v, is_kept=None, dropout_rate=0.0):
    return _attention(
        q,
        k,
        v,
        is_kept,
        dropout_rate,
        drop_scores=lambda z, kept, rate: z.masked_fill(~kept, torch.finfo(z.dtype).min),
    )


@misconception(
    "scaled_dot_product_attention",
    "Your scale is the root of the number of keys. What grows the scores is the number of products "
    "in each, the width d: divide by sqrt(d).",
    see=SCALE,
)
def scales_by_the_number_of_keys(q, k, v, is_kept=None, dropout_rate=0.0):
    return _attention(q, k, v, is_kept, dropout_rate, scale=1 / math.sqrt(k.shape[-2]))


@misconception(
    "scaled_dot_product_attention",
    "You drop what is_kept marks. True means kept: zero the others.",
    see=DROPOUT,
)
def drops_what_should_be_kept(q, k, v, is_kept=None, dropout_rate=0.0):
    is_kept = None if is_kept is None else ~is_kept
    return _attention(q, k, v, is_kept, dropout_rate)


@misconception(
    "scaled_dot_product_attention",
    "You divide by 1 - rate even where is_kept is None. Then nothing was dropped (a model that is "
    "evaluated keeps its rate), and nothing must be scaled up.",
    see=DROPOUT,
)
def scales_up_where_nothing_was_dropped(q, k, v, is_kept=None, dropout_rate=0.0):
    return _attention(q, k, v, is_kept, 0.0) / (1 - dropout_rate)


@alternative("scaled_dot_product_attention")
def with_einsum(q, k, v, is_kept=None, dropout_rate=0.0):
    scores = torch.einsum("...td,...sd->...ts", q / q.shape[-1] ** 0.5, k)
    weights = torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True))
    if is_kept is not None:
        weights = torch.where(is_kept, weights / (1 - dropout_rate), 0)
    return torch.einsum("...ts,...sv->...tv", weights, v)


@alternative("scaled_dot_product_attention")
def one_query_at_a_time(q, k, v, is_kept=None, dropout_rate=0.0):
    rows = []
    for t in range(q.shape[-2]):
        scores = (k.float() * q[..., t : t + 1, :].float()).sum(-1) / math.sqrt(q.shape[-1])
        weights = scores.softmax(-1)
        if is_kept is not None:
            weights = weights * is_kept[..., t, :] / (1 - dropout_rate)
        rows.append((weights[..., None] * v.float()).sum(-2))
    if q.dtype == torch.float64:
        return with_einsum(q, k, v, is_kept, dropout_rate)
    return torch.stack(rows, -2).to(q.dtype)


# decoder_mask


def _additive(is_seen, dtype, hidden=-math.inf):
    zeros = torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device)
    return zeros.masked_fill(~is_seen, hidden)


def _is_past(num_queries, num_keys, diagonal=None):
    offset = num_keys - num_queries if diagonal is None else diagonal
    return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(offset)


@misconception(
    "decoder_mask",
    "Your causal mask is aligned at the top left: query t sees keys 0 ... t of the cache. The "
    "queries are the last T positions, so query t sees keys 0 ... S - T + t.",
    see=ELSEWHERE,
)
def aligns_at_the_top_left(is_real, num_queries, dtype):
    is_past = _is_past(num_queries, is_real.shape[1], 0)
    return _additive(is_real[:, None, None, :] & is_past, dtype)


@misconception(
    "decoder_mask",
    "Your mask hides a position from itself. A query sees its own key: the diagonal stays.",
    see=MASKS,
)
def hides_the_own_position(is_real, num_queries, dtype):
    num_keys = is_real.shape[1]
    is_past = _is_past(num_queries, num_keys, num_keys - num_queries - 1)
    return _additive(is_real[:, None, None, :] & is_past, dtype)


@misconception(
    "decoder_mask",
    "Your mask hides with -1e20, a number that float16 does not hold: it ends at 65504. -inf "
    "exists in every floating dtype.",
    see=PRACTICE,
)
def minus_1e20_in_float16(is_real, num_queries, dtype):
    is_seen = is_real[:, None, None, :] & _is_past(num_queries, is_real.shape[1])
    return _additive(is_seen, dtype, -1e20)


@misconception(
    "decoder_mask",
    "Your mask hides with -1e9. That hides nothing from scores of its size, float16 does not hold "
    "it, and two such masks added up are another number: -inf is none of this.",
    see=PRACTICE,
)
def minus_1e9_instead_of_infinity(is_real, num_queries, dtype):
    is_seen = is_real[:, None, None, :] & _is_past(num_queries, is_real.shape[1])
    return _additive(is_seen, dtype, -1e9)


@misconception(
    "decoder_mask",
    "Your mask hides with the lowest finite number, as transformers does. A row that sees nothing "
    "then attends to all keys alike, and a negative score added to it overflows: use -inf.",
    see=PRACTICE,
)
def lowest_number_instead_of_infinity(is_real, num_queries, dtype):
    is_seen = is_real[:, None, None, :] & _is_past(num_queries, is_real.shape[1])
    return _additive(is_seen, dtype, torch.finfo(dtype).min)


@misconception(
    "decoder_mask",
    "You multiply zeros and ones by -inf, and 0 * -inf is NaN. Choose instead of multiplying: "
    "masked_fill or torch.where.",
    see=MASKS,
)
def multiplies_by_infinity(is_real, num_queries, dtype):
    is_seen = is_real[:, None, None, :] & _is_past(num_queries, is_real.shape[1])
    return (~is_seen).to(dtype) * -math.inf


@misconception(
    "decoder_mask",
    "Your mask hides padded queries (rows) as well as padded keys (columns). What a padded query "
    "computes is thrown away anyhow; a row is -inf throughout only where there is nothing to see.",
    see=MASKS,
)
def hides_padded_queries_as_well(is_real, num_queries, dtype):
    num_keys = is_real.shape[1]
    of_queries = is_real[:, None, num_keys - num_queries :, None]
    is_seen = is_real[:, None, None, :] & of_queries & _is_past(num_queries, num_keys)
    return _additive(is_seen, dtype)


@misconception(
    "decoder_mask",
    "Your mask holds 1 for seen and 0 for hidden. It is added to the scores, and adding 0 hides "
    "nothing: 0 for seen, -inf for hidden.",
    see=MASKS,
)
def mask_value_zero(is_real, num_queries, dtype):
    is_seen = is_real[:, None, None, :] & _is_past(num_queries, is_real.shape[1])
    return is_seen.to(dtype)


@misconception(
    "decoder_mask",
    "Your mask hides padded queries (rows) instead of padded keys (columns). What a padded query "
    "computes is thrown away; what must not happen is that a real query reads a padded key.",
    see=MASKS,
)
def hides_padded_queries(is_real, num_queries, dtype):
    num_keys = is_real.shape[1]
    of_queries = is_real[:, None, num_keys - num_queries :, None]
    return _additive(of_queries & _is_past(num_queries, num_keys), dtype)


@misconception(
    "decoder_mask",
    "Your mask forgets the padding: every query reads padded keys before it.",
    see=MASKS,
)
def forgets_the_padding(is_real, num_queries, dtype):
    is_seen = _is_past(num_queries, is_real.shape[1])
    return _additive(is_seen.expand(len(is_real), 1, -1, -1), dtype)


@misconception(
    "decoder_mask",
    "Your mask is upside down: it hides what should be seen. In this chapter True means seen; "
    "nn.MultiheadAttention's boolean masks mean the opposite.",
    see=MASKS,
)
def mask_upside_down(is_real, num_queries, dtype):
    is_seen = is_real[:, None, None, :] & _is_past(num_queries, is_real.shape[1])
    return _additive(~is_seen, dtype)


@alternative("decoder_mask")
def adds_two_masks(is_real, num_queries, dtype):
    num_keys = is_real.shape[1]
    causal = torch.full((num_queries, num_keys), -math.inf, dtype=dtype)
    causal = causal.triu(num_keys - num_queries + 1)
    padding = torch.zeros(is_real.shape, dtype=dtype)
    padding[~is_real] = -math.inf
    return causal + padding[:, None, None, :]


@alternative("decoder_mask")
def pair_by_pair(is_real, num_queries, dtype):
    batch, num_keys = is_real.shape
    first = num_keys - num_queries
    rows = [
        [
            [
                0.0 if s <= first + t and bool(is_real[b, s]) else float("-inf")
                for s in range(num_keys)
            ]
            for t in range(num_queries)
        ]
        for b in range(batch)
    ]
    return torch.tensor(rows, dtype=dtype)[:, None]


# masked_softmax


@misconception(
    "masked_softmax",
    "You mask after the softmax. The hidden keys have already taken their share of the sum, so "
    "the rows sum to less than one, by an amount that depends on what should be invisible.",
    see=MASKS,
)
def masks_after_the_softmax(scores, mask):
    return scores.softmax(-1) * mask


@misconception(
    "masked_softmax",
    "You set hidden scores to 0. A score of zero is an ordinary score, exp(0) = 1: hidden keys "
    "need -inf, whose exponential is zero.",
    see=MASKS,
)
def hidden_scores_become_zero(scores, mask):
    return scores.masked_fill(~mask, 0).softmax(-1)


@misconception(
    "masked_softmax",
    "Your constant (-1e20, -1e9) is a number that float16 does not hold: it ends at 65504. -inf "
    "exists in every floating dtype.",
    see=PRACTICE,
)
def fills_minus_1e20_in_float16(scores, mask):
    is_empty = ~mask.any(-1, keepdim=True)
    return scores.masked_fill(~mask, -1e20).softmax(-1).masked_fill(is_empty, 0)


@misconception(
    "masked_softmax",
    "Your constant is too small to hide a key: scores near it get a share. The -1e4 of early "
    "float16 code relies on scores staying near zero; -inf relies on nothing.",
    see=PRACTICE,
)
def minus_ten_thousand_is_not_low_enough(scores, mask):
    is_empty = ~mask.any(-1, keepdim=True)
    return scores.masked_fill(~mask, -1e4).softmax(-1).masked_fill(is_empty, 0)


@misconception(
    "masked_softmax",
    "A row that sees nothing becomes NaN: -inf minus its own maximum, -inf, has no value. Give "
    "such rows something to see before the softmax and zeros after it.",
    see=MASKS,
)
def empty_rows_become_nan(scores, mask):
    return scores.masked_fill(~mask, -math.inf).softmax(-1)


@misconception(
    "masked_softmax",
    "A row that sees nothing becomes an even average of all keys, hidden ones included, because "
    "a finite constant is equally low everywhere. Such a row should be zeros.",
    see=MASKS,
)
def empty_rows_become_uniform(scores, mask):
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)


@misconception(
    "masked_softmax",
    "You add -inf and replace the NaN of empty rows after the softmax. The output is right, but in "
    "backward softmax multiplies by its own NaN output, and nothing stops it: the gradient is NaN. "
    "Avoid the NaN in the first place.",
    see=MASKS,
)
def replaces_nan_too_late(scores, mask):
    hidden = torch.zeros(mask.shape, dtype=scores.dtype).masked_fill(~mask, -math.inf)
    return (scores + hidden).softmax(-1).nan_to_num(nan=0.0)


@misconception(
    "masked_softmax",
    "You mask after the softmax and divide by what is left. A large hidden score has by then taken "
    "all digits: the seen keys are rounded to zero before they are scaled up. Mask first.",
    see=MASKS,
)
def scales_up_what_the_hidden_keys_left(scores, mask):
    seen = scores.softmax(-1) * mask
    return seen / seen.sum(-1, keepdim=True).clamp(min=1e-9)


@misconception(
    "masked_softmax",
    "You add the lowest finite number. Where a score is large and negative the sum overflows to "
    "-inf, and a row of -inf is NaN: fill it in (masked_fill) instead of adding it.",
    see=PRACTICE,
)
def adds_the_lowest_number(scores, mask):
    hidden = (~mask).to(scores.dtype) * torch.finfo(scores.dtype).min
    return (scores + hidden).softmax(-1) * mask


@alternative("masked_softmax")
def fills_and_replaces_nan(scores, mask):
    return scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num(0.0)


@alternative("masked_softmax")
def by_exponentials(scores, mask):
    wide = scores.double().masked_fill(~mask, -math.inf)
    top = wide.amax(-1, keepdim=True).detach()
    weights = torch.exp(wide - top.masked_fill(top == -math.inf, 0))
    total = weights.sum(-1, keepdim=True)
    return (weights / total.clamp_min(1e-30)).to(scores.dtype)


@alternative("masked_softmax")
def by_an_additive_mask(scores, mask):
    is_seen_by_any = mask.any(-1, keepdim=True)
    hidden = torch.zeros(mask.shape, dtype=scores.dtype)
    hidden = torch.where(mask | ~is_seen_by_any, hidden, -math.inf)
    return torch.softmax(scores + hidden, -1) * is_seen_by_any


# MultiHeadAttention


class _MultiHead(nn.Module):
    """Right, but for what a subclass changes."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(dim, dim, bias=False))

    def split(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def merge(self, heads):
        return heads.transpose(1, 2).flatten(2)

    def width(self, q, x):
        return q.shape[-1]

    def attend(self, scores, is_causal):
        if is_causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        return scores.softmax(-1)

    def output(self, merged):
        return self.o_proj(merged)

    def forward(self, x, is_causal=False):
        q, k, v = (self.split(f(x)) for f in (self.q_proj, self.k_proj, self.v_proj))
        weights = self.attend(q @ k.mT / math.sqrt(self.width(q, x)), is_causal)
        return self.output(self.merge(weights @ v))


@misconception(
    "MultiHeadAttention",
    "You divide by sqrt(dim), the width of the model. A score is a product over the width of one "
    "head: divide by sqrt(dim / num_heads).",
    see=SCALE,
)
class scales_by_the_model_width(_MultiHead):
    def width(self, q, x):
        return x.shape[-1]


@misconception(
    "MultiHeadAttention",
    "You merge heads by a view or reshape without the transpose. (B, heads, T, width) read in "
    "order gives head 0 at all positions first: transpose(1, 2) back, then reshape.",
    see=HEADS,
)
class merges_heads_by_view(_MultiHead):
    def merge(self, heads):
        batch, num_heads, seq_len, width = heads.shape
        return heads.reshape(batch, seq_len, num_heads * width)


@misconception(
    "MultiHeadAttention",
    "You split heads by a view straight to (B, heads, T, width), which cuts the positions into "
    "pieces and not the columns. View as (B, T, heads, width), then transpose(1, 2).",
    see=HEADS,
)
class splits_heads_by_view(_MultiHead):
    def split(self, x):
        batch, seq_len, dim = x.shape
        return x.reshape(batch, self.num_heads, seq_len, dim // self.num_heads)


@misconception(
    "MultiHeadAttention",
    "Your columns are dealt out to the heads in turn. Head h owns a contiguous block of columns: "
    "view as (B, T, heads, width), not (B, T, width, heads).",
    see=HEADS,
)
class deals_columns_out_in_turn(_MultiHead):
    def split(self, x):
        return x.unflatten(-1, (-1, self.num_heads)).permute(0, 3, 1, 2)


@misconception(
    "MultiHeadAttention",
    "Your result lacks W_O. Without it no head's result can reach another head's columns: "
    "o_proj mixes the merged heads.",
    see=HEADS,
)
class forgets_the_output_projection(_MultiHead):
    def output(self, merged):
        return merged


@misconception(
    "MultiHeadAttention",
    "You ignore is_causal: positions see the future.",
    see=MASKS,
)
class sees_the_future(_MultiHead):
    def attend(self, scores, is_causal):
        return scores.softmax(-1)


@misconception(
    "MultiHeadAttention",
    "You mask after the softmax: the future is hidden but has taken its share of each row's sum. "
    "Mask the scores before it.",
    see=MASKS,
)
class masks_the_future_after_the_softmax(_MultiHead):
    def attend(self, scores, is_causal):
        weights = scores.softmax(-1)
        return weights.tril() if is_causal else weights


@misconception(
    "MultiHeadAttention",
    "Your causal mask puts zeros into the scores of the future (tril() or a product with ones and "
    "zeros). exp(0) = 1 is an ordinary share: fill -inf.",
    see=MASKS,
)
class future_scores_become_zero(_MultiHead):
    def attend(self, scores, is_causal):
        return (scores.tril() if is_causal else scores).softmax(-1)


@misconception(
    "MultiHeadAttention",
    "Your causal mask is upside down: a position sees its future and not its past. What is hidden "
    "is above the diagonal, triu(1).",
    see=MASKS,
)
class hides_the_past(_MultiHead):
    def attend(self, scores, is_causal):
        past = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(-1)
        return (scores.masked_fill(past, -math.inf) if is_causal else scores).softmax(-1)


@misconception(
    "MultiHeadAttention",
    "You mask always. Without is_causal every position sees every other.",
    see=MASKS,
)
class is_always_causal(_MultiHead):
    def attend(self, scores, is_causal):
        return super().attend(scores, True)


@alternative("MultiHeadAttention")
class one_head_at_a_time(_MultiHead):
    def forward(self, x, is_causal=False):
        width = x.shape[-1] // self.num_heads
        q, k, v = (f(x).split(width, -1) for f in (self.q_proj, self.k_proj, self.v_proj))
        heads = []
        for h in range(self.num_heads):
            weights = self.attend(q[h] @ k[h].mT / math.sqrt(width), is_causal)
            heads.append(weights @ v[h])
        return self.o_proj(torch.cat(heads, -1))


@alternative("MultiHeadAttention")
class output_projection_head_by_head(_MultiHead):
    """Concatenation followed by W_O is a sum of one product for each head."""

    def forward(self, x, is_causal=False):
        q, k, v = (self.split(f(x)) for f in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        weights = self.o_proj.weight.unflatten(1, (self.num_heads, -1))
        return torch.einsum("bhtw,ohw->bto", out, weights)


# grouped_query_attention


def _plain(q, k, v):
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


@misconception(
    "grouped_query_attention",
    "Your values are right, but keys and values are copied once for every query head: the cache "
    "grows back to the size that sharing heads was meant to save. Group the queries instead.",
    see=GROUPS,
)
def copies_the_shared_heads(q, k, v):
    return _plain(q, *(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)))


@misconception(
    "grouped_query_attention",
    "You pair query head h with key/value head h mod K, as repeat (tile) does: 0 1 0 1. "
    "Neighbours share a head, 0 0 1 1: h // G, as repeat_interleave does.",
    see=GROUPS,
)
def repeats_instead_of_interleaving(q, k, v):
    return _plain(q, *(x.repeat(1, q.shape[1] // k.shape[1], 1, 1) for x in (k, v)))


@misconception(
    "grouped_query_attention",
    "All your query heads read key/value head 0. That is multi-query attention with the other "
    "heads thrown away.",
    see=GROUPS,
)
def uses_the_first_head_only(q, k, v):
    return _plain(q, k[:, :1], v[:, :1])


@misconception(
    "grouped_query_attention",
    "You average the key/value heads into one. The paper averages heads once, to convert a "
    "checkpoint; the result still has K heads, each read by its own group.",
    see=GROUPS,
)
def averages_the_shared_heads(q, k, v):
    return _plain(q, k.mean(1, keepdim=True), v.mean(1, keepdim=True))


@misconception(
    "grouped_query_attention",
    "You average the queries of a group. Only keys and values are shared: every query head asks "
    "its own question.",
    see=GROUPS,
)
def averages_the_queries_of_a_group(q, k, v):
    group_size = q.shape[1] // k.shape[1]
    shared = _plain(q.unflatten(1, (-1, group_size)).mean(2), k, v)
    return shared.repeat_interleave(group_size, 1)


@misconception(
    "grouped_query_attention",
    "Your scores are not scaled. Sharing heads changes nothing about that: divide by sqrt(d).",
    see=SCALE,
)
def forgets_the_scale(q, k, v):
    group_size = q.shape[1] // k.shape[1]
    return _plain(q * math.sqrt(q.shape[-1]), *(x.repeat_interleave(group_size, 1) for x in (k, v)))


@alternative("grouped_query_attention")
def grouped_with_einsum(q, k, v):
    q = q.unflatten(1, (k.shape[1], -1))
    weights = (torch.einsum("bkgtd,bksd->bkgts", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bkgts,bksd->bkgtd", weights, v).flatten(1, 2)


@alternative("grouped_query_attention")
def head_by_head(q, k, v):
    group_size = q.shape[1] // k.shape[1]
    heads = [
        _plain(q[:, h], k[:, h // group_size], v[:, h // group_size]) for h in range(q.shape[1])
    ]
    return torch.stack(heads, 1)


# attention_backward


def _backward(grad_out, q, k, v, bias, *, softmax=None, scale=None, grad_v=None):
    true_scale = 1 / math.sqrt(q.shape[-1])
    scale = true_scale if scale is None else scale
    weights = (q @ k.mT * true_scale + bias).softmax(-1)
    grad_weights = grad_out @ v.mT
    if softmax is None:
        grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
    else:
        grad_scores = softmax(weights, grad_weights)
    grad_v = weights.mT @ grad_out if grad_v is None else grad_v(weights, grad_out)
    return grad_scores @ k * scale, grad_scores.mT @ q * scale, grad_v, grad_scores.sum(0)


@misconception(
    "attention_backward",
    "You take the softmax's derivative element by element, P (1 - P). Raising one score lowers "
    "all other probabilities of its row: dZ = P * (dP - rowsum(P * dP)).",
    see=BACKWARD,
)
def softmax_derivative_element_by_element(grad_out, q, k, v, bias):
    return _backward(grad_out, q, k, v, bias, softmax=lambda p, g: g * p * (1 - p))


@misconception(
    "attention_backward",
    "You leave out the row sum: dZ = P * dP is the derivative of exp, not of softmax. The sum in "
    "the denominator answers too: subtract rowsum(P * dP).",
    see=BACKWARD,
)
def forgets_the_row_sum(grad_out, q, k, v, bias):
    return _backward(grad_out, q, k, v, bias, softmax=lambda p, g: p * g)


@misconception(
    "attention_backward",
    "You subtract the plain mean of dP. The mean that softmax removes is weighted by the row's "
    "own probabilities.",
    see=BACKWARD,
)
def subtracts_an_unweighted_mean(grad_out, q, k, v, bias):
    return _backward(
        grad_out, q, k, v, bias, softmax=lambda p, g: p * (g - g.mean(-1, keepdim=True))
    )


@misconception(
    "attention_backward",
    "grad_q and grad_k lack the scale. Z = q k^T / sqrt(d): the same factor comes back.",
    see=BACKWARD,
)
def forgets_the_scale_in_backward(grad_out, q, k, v, bias):
    return _backward(grad_out, q, k, v, bias, scale=1.0)


@misconception(
    "attention_backward",
    "grad_bias still has a batch. One bias was used in every sequence: its gradients add up.",
    see=BACKWARD,
)
def does_not_sum_the_bias_over_the_batch(grad_out, q, k, v, bias):
    scale = 1 / math.sqrt(q.shape[-1])
    weights = (q @ k.mT * scale + bias).softmax(-1)
    grad_weights = grad_out @ v.mT
    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
    return (
        grad_scores @ k * scale,
        grad_scores.mT @ q * scale,
        weights.mT @ grad_out,
        grad_scores,
    )


@misconception(
    "attention_backward",
    "You average grad_bias over the batch. A gradient adds up over uses; averaging belongs to "
    "the loss.",
    see=BACKWARD,
)
def averages_the_bias_over_the_batch(grad_out, q, k, v, bias):
    grad_q, grad_k, grad_v, grad_bias = _backward(grad_out, q, k, v, bias)
    return grad_q, grad_k, grad_v, grad_bias / len(q)


@misconception(
    "attention_backward",
    "Your grad_bias carries the scale. The bias is added after the scores were scaled: its "
    "gradient is dZ itself, summed over the batch.",
    see=BACKWARD,
)
def scales_the_gradient_of_the_bias(grad_out, q, k, v, bias):
    grad_q, grad_k, grad_v, grad_bias = _backward(grad_out, q, k, v, bias)
    return grad_q, grad_k, grad_v, grad_bias / math.sqrt(q.shape[-1])


@misconception(
    "attention_backward",
    "grad_v lacks the transpose: value s collects from every query what it gave, P^T dO.",
    see=BACKWARD,
)
def grad_v_without_the_transpose(grad_out, q, k, v, bias):
    return _backward(grad_out, q, k, v, bias, grad_v=lambda p, g: p @ g)


@alternative("attention_backward")
def by_rows_of_output_times_its_gradient(grad_out, q, k, v, bias):
    """FlashAttention's identity: rowsum(P * dP) = rowsum(dO * O)."""
    scale = q.shape[-1] ** -0.5
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * scale + bias
    weights = torch.exp(scores - scores.logsumexp(-1, keepdim=True))
    delta = (grad_out * (weights @ v)).sum(-1, keepdim=True)
    grad_scores = weights * (torch.einsum("bhtd,bhsd->bhts", grad_out, v) - delta)
    return (
        scale * torch.einsum("bhts,bhsd->bhtd", grad_scores, k),
        scale * torch.einsum("bhts,bhtd->bhsd", grad_scores, q),
        torch.einsum("bhts,bhtd->bhsd", weights, grad_out),
        torch.einsum("bhts->hts", grad_scores),
    )


@alternative("attention_backward")
def by_the_full_jacobian(grad_out, q, k, v, bias):
    scale = 1 / math.sqrt(q.shape[-1])
    weights = (q @ k.mT * scale + bias).softmax(-1)
    jacobian = torch.diag_embed(weights) - weights[..., :, None] * weights[..., None, :]
    grad_scores = (jacobian @ (grad_out @ v.mT)[..., None])[..., 0]
    return (
        (grad_scores * scale) @ k,
        (grad_scores * scale).mT @ q,
        weights.mT @ grad_out,
        grad_scores.sum(0),
    )


# attend_with_cache


def _with_cache(q, k, v, k_cache, v_cache, *, interleave=True, diagonal=None, is_masked=True):
    k_all, v_all = torch.cat([k_cache, k], 2), torch.cat([v_cache, v], 2)
    group_size = q.shape[1] // k.shape[1]
    if interleave:
        keys, values = (x.repeat_interleave(group_size, 1) for x in (k_all, v_all))
    else:
        keys, values = (x.repeat(1, group_size, 1, 1) for x in (k_all, v_all))
    scores = q @ keys.mT / math.sqrt(q.shape[-1])
    if is_masked:
        is_past = _is_past(q.shape[2], keys.shape[2], diagonal)
        scores = scores.masked_fill(~is_past, -math.inf)
    return scores.softmax(-1) @ values, k_all, v_all


@misconception(
    "attend_with_cache",
    "Your result is the program's as it came. Print what it does for T = 1 and C = 3, and for "
    "K = 2 and H = 4: which keys, and which heads, are read?",
    see=ELSEWHERE,
    is_starter=True,
)
def neither_fault_is_repaired_yet(q, k, v, k_cache, v_cache):
    return _with_cache(q, k, v, k_cache, v_cache, interleave=False, diagonal=0)


@misconception(
    "attend_with_cache",
    "One fault is left: the causal mask is aligned at the top left, so that a new token sees the "
    "oldest keys and not itself. Align it at the bottom right: tril(S - T).",
    see=ELSEWHERE,
)
def aligns_a_cached_mask_at_the_top_left(q, k, v, k_cache, v_cache):
    return _with_cache(q, k, v, k_cache, v_cache, diagonal=0)


@misconception(
    "attend_with_cache",
    "One fault is left: repeat lays the key/value heads out as 0 1 0 1. Query head h reads head "
    "h // G: 0 0 1 1, repeat_interleave.",
    see=GROUPS,
)
def repeats_heads_of_the_cache(q, k, v, k_cache, v_cache):
    return _with_cache(q, k, v, k_cache, v_cache, interleave=False)


@misconception(
    "attend_with_cache",
    "Your mask is gone. One new token needs none, but several new tokens must not see each "
    "other's future.",
    see=ELSEWHERE,
)
def drops_the_mask_altogether(q, k, v, k_cache, v_cache):
    return _with_cache(q, k, v, k_cache, v_cache, is_masked=False)


@misconception(
    "attend_with_cache",
    "Your new tokens see one key too few: their own. A query sees every key up to and including "
    "its own position.",
    see=MASKS,
)
def new_tokens_do_not_see_themselves(q, k, v, k_cache, v_cache):
    past = k_cache.shape[2]
    return _with_cache(q, k, v, k_cache, v_cache, diagonal=past - 1)


@misconception(
    "attend_with_cache",
    "You return the keys and values repeated for every query head. The next step appends to them: "
    "the cache keeps K heads, and grows back to H times its size otherwise.",
    see=GROUPS,
)
def returns_the_repeated_heads(q, k, v, k_cache, v_cache):
    out, *both = _with_cache(q, k, v, k_cache, v_cache)
    return out, *(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in both)


@misconception(
    "attend_with_cache",
    "Your mask is one too wide: each new token sees the one after it.",
    see=ELSEWHERE,
)
def sees_one_token_ahead(q, k, v, k_cache, v_cache):
    return _with_cache(q, k, v, k_cache, v_cache, diagonal=k_cache.shape[2] + 1)


@alternative("attend_with_cache")
def by_torch(q, k, v, k_cache, v_cache):
    k_all, v_all = torch.cat([k_cache, k], 2), torch.cat([v_cache, v], 2)
    mask = _is_past(q.shape[2], k_all.shape[2])
    out = F.scaled_dot_product_attention(q, k_all, v_all, attn_mask=mask, enable_gqa=True)
    return out, k_all, v_all


@alternative("attend_with_cache")
def token_by_token(q, k, v, k_cache, v_cache):
    group_size = q.shape[1] // k.shape[1]
    outs = []
    for t in range(q.shape[2]):
        k_cache = torch.cat([k_cache, k[:, :, t : t + 1]], 2)
        v_cache = torch.cat([v_cache, v[:, :, t : t + 1]], 2)
        grouped = q[:, :, t].unflatten(1, (-1, group_size))  # (B, K, G, d)
        outs.append(_plain(grouped, k_cache, v_cache).flatten(1, 2))
    return torch.stack(outs, 2), k_cache, v_cache


# attention_cost


def _cost(config, seq_len, bits=16, *, heads=None, kv_heads=None, head_dim=None, **factors):
    num_heads = config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads", num_heads) if kv_heads is None else kv_heads
    if head_dim is None:
        head_dim = config.get("head_dim", config["hidden_size"] // num_heads)
    score_heads = num_heads if heads is None else heads
    tokens = config["num_hidden_layers"] * seq_len
    weights = 2 * config["hidden_size"] * head_dim * (num_heads + num_kv_heads)
    kv_bytes = factors.get("kv", 2) * num_kv_heads * head_dim * tokens * bits
    kv_bytes = kv_bytes if factors.get("as_bits") else kv_bytes // 8
    return {
        "kv_bytes": kv_bytes,
        "projection_flops": factors.get("per_weight", 2) * weights * tokens,
        "score_flops": factors.get("per_pair", 4) * score_heads * head_dim * tokens * seq_len,
    }


@misconception(
    "attention_cost",
    "Your cache holds a key and a value for every query head. Only num_key_value_heads are kept; "
    "that is what grouped-query attention is for.",
    see=COST,
)
def caches_every_query_head(config, seq_len, bits=16):
    right = _cost(config, seq_len, bits)
    every = _cost(config, seq_len, bits, kv_heads=config["num_attention_heads"])
    return {**right, "kv_bytes": every["kv_bytes"]}


@misconception(
    "attention_cost",
    "Your cache holds keys and no values, or values and no keys: both are read at every step.",
    see=COST,
)
def counts_keys_and_forgets_values(config, seq_len, bits=16):
    return _cost(config, seq_len, bits, kv=1)


@misconception(
    "attention_cost",
    "Your kv_bytes is in bits: eight of them make a byte.",
    see=COST,
)
def bits_for_bytes(config, seq_len, bits=16):
    return _cost(config, seq_len, bits, as_bits=True)


@misconception(
    "attention_cost",
    "You assume head_dim = hidden_size / num_attention_heads. Where the config names head_dim, as "
    "Mistral NeMo's does, that is the width.",
    see=COST,
)
def ignores_head_dim(config, seq_len, bits=16):
    width = config["hidden_size"] // config["num_attention_heads"]
    return _cost(config, seq_len, bits, head_dim=width)


@misconception(
    "attention_cost",
    "A multiplication with its addition counts as 2 FLOPs here, as in every published figure.",
    see=COST,
)
def one_flop_for_multiply_and_add(config, seq_len, bits=16):
    return _cost(config, seq_len, bits, per_weight=1, per_pair=2)


@misconception(
    "attention_cost",
    "Your score_flops fall with the number of key/value heads. Sharing heads saves bytes and "
    "projections; every query head still multiplies with every key.",
    see=COST,
)
def sharing_heads_saves_score_flops(config, seq_len, bits=16):
    kv_heads = config.get("num_key_value_heads", config["num_attention_heads"])
    return _cost(config, seq_len, bits, heads=kv_heads)


@misconception(
    "attention_cost",
    "Your score_flops are half. Either P v is missing, which is as large as q k^T, or the pairs "
    "that a causal mask would hide; here all pairs count.",
    see=COST,
)
def forgets_the_weighted_sum(config, seq_len, bits=16):
    return _cost(config, seq_len, bits, per_pair=2)


@misconception(
    "attention_cost",
    "Your projections are four square matrices of hidden_size. With shared heads W_K and W_V have "
    "K * head_dim columns, not hidden_size.",
    see=COST,
)
def projections_are_square(config, seq_len, bits=16):
    weights = 4 * config["hidden_size"] ** 2
    flops = 2 * weights * config["num_hidden_layers"] * seq_len
    return _cost(config, seq_len, bits) | {"projection_flops": flops}


@misconception(
    "attention_cost",
    "Your W_K and W_V are as wide as W_Q. They make num_key_value_heads heads, not all: sharing "
    "saves projections as well as bytes.",
    see=COST,
)
def sharing_heads_saves_no_projections(config, seq_len, bits=16):
    every = _cost(config, seq_len, bits, kv_heads=config["num_attention_heads"])
    return _cost(config, seq_len, bits) | {"projection_flops": every["projection_flops"]}


@alternative("attention_cost")
def matrix_by_matrix(config, seq_len, bits=16):
    num_heads, dim = config["num_attention_heads"], config["hidden_size"]
    kv = config["num_key_value_heads"] if "num_key_value_heads" in config else num_heads
    width = config["head_dim"] if "head_dim" in config else dim // num_heads
    kv_bytes = projections = scores = 0
    for _ in range(config["num_hidden_layers"]):
        kv_bytes += 2 * kv * width * seq_len * bits // 8
        for rows, columns in ((dim, num_heads * width), (dim, kv * width), (dim, kv * width)):
            projections += 2 * seq_len * rows * columns
        projections += 2 * seq_len * num_heads * width * dim
        scores += num_heads * (2 * seq_len * width * seq_len + 2 * seq_len * seq_len * width)
    return {"kv_bytes": kv_bytes, "projection_flops": projections, "score_flops": scores}


@alternative("attention_cost")
def in_floating_point(config, seq_len, bits=16):
    return {name: float(value) for name, value in _cost(config, seq_len, bits).items()}


# packed_attention


def _packed(
    q, k, v, documents, window, chunk_size, *, back=None, same=True, full=False, distances=None
):
    """Right, but for the first key of a chunk's slice, the documents, and slicing at all."""
    outs = []
    for start in range(0, q.shape[2], chunk_size):
        stop = min(start + chunk_size, q.shape[2])
        first = 0 if full else max(0, start - (window - 1 if back is None else back))
        if distances is None:
            distance = torch.arange(start, stop)[:, None] - torch.arange(first, stop)
        else:
            distance = distances[start:stop, first:stop]
        mask = (distance >= 0) & (distance < window)
        if same:
            documents_seen = documents[:, None, first:stop]
            mask = mask & (documents[:, start:stop, None] == documents_seen)
        mask = mask if mask.ndim == 2 else mask[:, None]
        scores = q[:, :, start:stop] @ k[:, :, first:stop].mT / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        outs.append(weights @ v[:, :, first:stop])
    return torch.cat(outs, 2)


@misconception(
    "packed_attention",
    "Your values are right, but something of T x T elements exists at once: all scores. Take the "
    "queries chunk by chunk.",
    see=COST,
)
def holds_all_scores_at_once(q, k, v, documents, window, chunk_size):
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    mask = (distance >= 0) & (distance < window)
    mask = mask & (documents[:, :, None] == documents[:, None, :])
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask[:, None], -math.inf).softmax(-1) @ v


@misconception(
    "packed_attention",
    "Your values are right and the queries go in chunks, but each chunk meets all keys, and the "
    "mask hides most of them again. Slice k and v before the product.",
    see=COST,
)
def multiplies_with_every_key(q, k, v, documents, window, chunk_size):
    return _packed(q, k, v, documents, window, chunk_size, full=True)


@misconception(
    "packed_attention",
    "Your values are right and the scores are sliced, but the mask was built for all T x T pairs. "
    "Build it for the chunk and the keys that it sees.",
    see=COST,
)
def builds_the_whole_mask(q, k, v, documents, window, chunk_size):
    whole = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    return _packed(q, k, v, documents, window, chunk_size, distances=whole)


@misconception(
    "packed_attention",
    "Your chunks see no key before their start, so that the first queries of a chunk lose their "
    "past. A chunk needs window - 1 keys from before it.",
    see=MASKS,
)
def chunks_do_not_look_back(q, k, v, documents, window, chunk_size):
    return _packed(q, k, v, documents, window, chunk_size, back=0)


@misconception(
    "packed_attention",
    "Your window is one too wide: t - s < window counts the own position, so that the oldest key "
    "seen is t - window + 1.",
    see=MASKS,
)
def window_does_not_count_the_own_position(q, k, v, documents, window, chunk_size):
    return _packed(q, k, v, documents, window + 1, chunk_size)


@misconception(
    "packed_attention",
    "You leave the documents out: a token reads the text before it even where that belongs to "
    "another document.",
    see=MASKS,
)
def reads_across_documents(q, k, v, documents, window, chunk_size):
    return _packed(q, k, v, documents, window, chunk_size, same=False)


@misconception(
    "packed_attention",
    "You leave the window out: a query sees its whole document.",
    see=MASKS,
)
def leaves_the_window_out(q, k, v, documents, window, chunk_size):
    return _packed(q, k, v, documents, q.shape[2], chunk_size)


@alternative("packed_attention")
def chunks_as_a_list(q, k, v, documents, window, chunk_size):
    return _packed(q, k, v, documents, window, chunk_size)


@alternative("packed_attention")
def chunks_by_torch(q, k, v, documents, window, chunk_size):
    out = torch.zeros_like(q)
    for start in range(0, q.shape[2], chunk_size):
        rows = slice(start, start + chunk_size)
        columns = slice(max(0, start - window + 1), start + chunk_size)
        position = torch.arange(q.shape[2])
        distance = position[rows, None] - position[columns]
        mask = (distance >= 0) & (distance < window)
        mask = mask & (documents[:, rows, None] == documents[:, None, columns])
        out[:, :, rows] = F.scaled_dot_product_attention(
            q[:, :, rows], k[:, :, columns], v[:, :, columns], attn_mask=mask[:, None]
        )
    return out
