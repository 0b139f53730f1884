"""Chapter 07: wrong answers that people give, and right ones in another form."""

import math

import torch
import torch.nn.functional as F

from autograder import alternative, misconception

OVERFLOW = "2. Overflow"
ONLINE = "3. The online softmax"
CARRY = "4. Carrying the output along"
TILES = "5. Tiles"
FLASH = "6. FlashAttention"
BACKWARD = "7. The backward pass"
DECODE = "8. One query, many keys"
TRAFFIC = "9. What moves between the memories"
FLOPS = "10. FLOPs go up"


# streaming_logsumexp


def _stream(blocks, update):
    m = total = None
    for block in blocks:
        top = block.amax(-1)
        if m is None:
            m, total = torch.full_like(top, -torch.inf), torch.zeros_like(top)
        new_m = torch.maximum(m, top)
        safe = new_m.masked_fill(new_m == -torch.inf, 0.0)
        total = update(total, m, safe, (block - safe[..., None]).exp().sum(-1))
        m = new_m
    return m + total.log()


@misconception(
    "streaming_logsumexp",
    "You take exp before anything is subtracted: it overflows from 89 on in float32. Subtract the "
    "maximum first.",
    see=OVERFLOW,
)
def takes_exp_of_bare_values(blocks):
    return torch.log(sum(block.exp().sum(-1) for block in blocks))


@misconception(
    "streaming_logsumexp",
    "The sum so far is not rescaled when the maximum grows. It was a sum of exp(x - old maximum): "
    "multiply it by exp(old - new).",
    see=ONLINE,
)
def forgets_to_rescale_the_sum(blocks):
    return _stream(blocks, lambda total, m, new, terms: total + terms)


@misconception(
    "streaming_logsumexp",
    "Your factor is inverted: exp(new - old) grows where the old sum should shrink.",
    see=ONLINE,
)
def inverts_the_factor(blocks):
    return _stream(
        blocks,
        lambda total, m, new, terms: (
            total * (new - m.masked_fill(m == -torch.inf, 0.0)).exp() + terms
        ),
    )


@misconception(
    "streaming_logsumexp",
    "You subtract the maximum of the first block for all of them. A later block may be larger by "
    "any amount: the maximum must be allowed to grow.",
    see=ONLINE,
)
def keeps_the_first_maximum(blocks):
    m = total = None
    for block in blocks:
        if m is None:
            m = block.amax(-1)
            safe, total = m.masked_fill(m == -torch.inf, 0.0), torch.zeros_like(m)
        total = total + (block - safe[..., None]).exp().sum(-1)
    return safe + total.log()


@misconception(
    "streaming_logsumexp",
    "Where only -inf has been seen you compute -inf - -inf, which is NaN. Subtract 0 there.",
    see=ONLINE,
)
def subtracts_infinity_from_infinity(blocks):
    m = total = None
    for block in blocks:
        top = block.amax(-1)
        if m is None:
            m, total = top, (block - top[..., None]).exp().sum(-1)
            continue
        new_m = torch.maximum(m, top)
        total = total * (m - new_m).exp() + (block - new_m[..., None]).exp().sum(-1)
        m = new_m
    return m + total.log()


@misconception(
    "streaming_logsumexp",
    "You collect all blocks and sum at the end. The point of the online form is that nothing is "
    "kept but a maximum and a sum.",
    see=ONLINE,
)
def collects_all_blocks(blocks):
    return torch.cat(list(blocks), -1).logsumexp(-1)


@alternative("streaming_logsumexp")
def with_logaddexp(blocks):
    total = None
    for block in blocks:
        part = block.logsumexp(-1)
        total = part if total is None else torch.logaddexp(total, part)
    return total


@alternative("streaming_logsumexp")
def value_by_value(blocks):
    m = total = None
    for block in blocks:
        for x in block.unbind(-1):
            if m is None:
                m, total = torch.full_like(x, -torch.inf), torch.zeros_like(x)
            new = torch.maximum(m, x)
            shift = torch.where(new.isinf(), torch.zeros_like(new), new)
            total = total * torch.exp(m - shift) + torch.exp(x - shift)
            m = new
    return torch.where(total > 0, m + torch.log(total), torch.full_like(m, -torch.inf))


# merge_partials


@misconception(
    "merge_partials",
    "You average the two outputs. Each was divided by its own sum: a part that the query hardly "
    "looks at must count for little. The weights are exp(lse), normalised.",
    see=CARRY,
)
def averages_the_parts(out_a, lse_a, out_b, lse_b):
    return (out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b)


@misconception(
    "merge_partials",
    "You weight by the log-sum-exps themselves. The sums behind them are exp(lse).",
    see=CARRY,
)
def weights_by_the_logarithms(out_a, lse_a, out_b, lse_b):
    total = lse_a + lse_b
    out = (out_a * lse_a[..., None] + out_b * lse_b[..., None]) / total[..., None]
    return out, torch.logaddexp(lse_a, lse_b)


@misconception(
    "merge_partials",
    "You add the outputs as if they were unnormalised. They were divided already: weigh them.",
    see=CARRY,
)
def adds_the_parts(out_a, lse_a, out_b, lse_b):
    return out_a + out_b, torch.logaddexp(lse_a, lse_b)


@misconception(
    "merge_partials",
    "You take exp of the log-sum-exps, which overflows for large scores. Only differences of them "
    "belong into exp.",
    see=OVERFLOW,
)
def takes_exp_of_large_numbers(out_a, lse_a, out_b, lse_b):
    a, b = lse_a.exp(), lse_b.exp()
    total = a + b
    safe = total.masked_fill(total == 0, 1.0)
    return (out_a * a[..., None] + out_b * b[..., None]) / safe[..., None], total.log()


@misconception(
    "merge_partials",
    "Your log-sum-exp of the whole is the larger of the two. It is log(exp a + exp b), up to log 2 "
    "more; the next merge would go wrong.",
    see=CARRY,
)
def keeps_the_larger_logarithm(out_a, lse_a, out_b, lse_b):
    weight = torch.sigmoid((lse_a - lse_b).nan_to_num(0.0))[..., None]
    return out_a * weight + out_b * (1 - weight), torch.maximum(lse_a, lse_b)


@misconception(
    "merge_partials",
    "Two empty parts give NaN: -inf minus -inf. No keys at all is a case: zeros and -inf.",
    see=CARRY,
)
def forgets_that_both_may_be_empty(out_a, lse_a, out_b, lse_b):
    m = torch.maximum(lse_a, lse_b)
    a, b = (lse_a - m).exp(), (lse_b - m).exp()
    return (out_a * a[..., None] + out_b * b[..., None]) / (a + b)[..., None], m + (a + b).log()


@alternative("merge_partials")
def with_a_sigmoid(out_a, lse_a, out_b, lse_b):
    difference = torch.where(lse_a == lse_b, torch.zeros_like(lse_a), lse_a - lse_b)
    weight = torch.sigmoid(difference)[..., None]
    return out_b + weight * (out_a - out_b), torch.logaddexp(lse_a, lse_b)


@alternative("merge_partials")
def with_a_softmax_over_parts(out_a, lse_a, out_b, lse_b):
    lse = torch.stack((lse_a, lse_b))
    weights = lse.softmax(0).nan_to_num(0.0)
    return (torch.stack((out_a, out_b)) * weights[..., None]).sum(0), lse.logsumexp(0)


# tiles


def _tiles(t, s, block_q, block_k, *, offset=None, is_kept=None, mask=None):
    offset = s - t if offset is None else offset
    found = []
    for i in range(-(-t // block_q)):
        first, last = i * block_q, min((i + 1) * block_q, t) - 1
        for j in range(-(-s // block_k)):
            start, end = j * block_k, min((j + 1) * block_k, s) - 1
            kept = start <= offset + last if is_kept is None else is_kept(i, j)
            if kept:
                needs = end > offset + first if mask is None else mask(i, j)
                found.append((i, j, needs))
    return found


@misconception(
    "tiles",
    "You compare block numbers. Only square tiles have their diagonal at i = j: compare the "
    "positions of their first and last rows and columns.",
    see=TILES,
)
def compares_block_numbers(num_queries, num_keys, block_q, block_k):
    return _tiles(
        num_queries, num_keys, block_q, block_k,
        is_kept=lambda i, j: j <= i, mask=lambda i, j: i == j,
    )  # fmt: skip


@misconception(
    "tiles",
    "You keep every tile. Half of them hold no pair that is seen: skipping them is half of the "
    "time of a causal kernel.",
    see=TILES,
)
def visits_every_tile(num_queries, num_keys, block_q, block_k):
    return _tiles(num_queries, num_keys, block_q, block_k, is_kept=lambda i, j: True)


@misconception(
    "tiles",
    "You mask every tile. Most of them are seen in full, and the comparison is wasted there.",
    see=TILES,
)
def masks_every_tile(num_queries, num_keys, block_q, block_k):
    return _tiles(num_queries, num_keys, block_q, block_k, mask=lambda i, j: True)


@misconception(
    "tiles",
    "You align at the top left: query 0 at position 0. With more keys than queries, the queries "
    "are the last positions.",
    see=TILES,
)
def aligns_at_the_top_left(num_queries, num_keys, block_q, block_k):
    return _tiles(num_queries, num_keys, block_q, block_k, offset=0)


@misconception(
    "tiles",
    "A query does not see its own key in your tiles: you are one position short.",
    see=TILES,
)
def hides_a_querys_own_key(num_queries, num_keys, block_q, block_k):
    return _tiles(num_queries, num_keys, block_q, block_k, offset=num_keys - num_queries - 1)


@misconception(
    "tiles",
    "You leave out the last, short block: the number of blocks is rounded up.",
    see=TILES,
)
def drops_the_short_blocks(num_queries, num_keys, block_q, block_k):
    found = _tiles(num_queries, num_keys, block_q, block_k)
    return [x for x in found if x[0] < num_queries // block_q and x[1] < num_keys // block_k]


@alternative("tiles")
def from_a_mask(num_queries, num_keys, block_q, block_k):
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    return [
        (i, j, not bool(tile.all()))
        for i, rows in enumerate(seen.split(block_q))
        for j, tile in enumerate(rows.split(block_k, dim=1))
        if tile.any()
    ]


@alternative("tiles")
def by_counting_blocks(num_queries, num_keys, block_q, block_k):
    found = []
    for i in range(math.ceil(num_queries / block_q)):
        begin = num_keys - num_queries + i * block_q
        stop = num_keys - num_queries + min((i + 1) * block_q, num_queries)
        for j in range(max(0, min(math.ceil(stop / block_k), math.ceil(num_keys / block_k)))):
            found.append((i, j, min((j + 1) * block_k, num_keys) - 1 > begin))
    return found


# flash_attention


def _flash(q, k, v, block_q, block_k, is_causal, **change):
    """The right loops, with one thing changed."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:3], dtype=q.dtype)
    scale = 1.0 if change.get("no_scale") else 1 / math.sqrt(q.shape[-1])
    last = num_keys // block_k * block_k if change.get("drop_short") else num_keys
    for start in range(0, num_queries, block_q):
        rows = torch.arange(start, min(start + block_q, num_queries))
        tile = q[:, :, rows] * scale
        m = tile.new_full(tile.shape[:-1], -torch.inf)
        total, acc = torch.zeros_like(m), torch.zeros_like(tile)
        for first in range(0, last, block_k):
            if is_causal and first > start + block_q - 1:
                break
            columns = torch.arange(first, min(first + block_k, num_keys))
            scores = tile @ k[:, :, columns].mT
            if is_causal and not change.get("by_block"):
                scores = scores.masked_fill(columns > rows[:, None], -torch.inf)
            if change.get("by_block") and is_causal and first // block_k > start // block_q:
                continue
            m, total, acc = change.get("update", _update)(m, total, acc, scores, v[:, :, columns])
        total = total if change.get("keep_total", True) else torch.ones_like(total)
        if not change.get("divided"):
            acc = acc / total[..., None]
        out[:, :, rows], lse[:, :, rows] = acc, change.get("lse", _lse)(m, total)
    return out, lse


def _lse(m, total):
    return m + total.log()


def _update(m, total, acc, scores, v, *, factor=None, factor_acc=None):
    new_m = torch.maximum(m, scores.amax(-1))
    p = (scores - new_m[..., None]).exp()
    right = (m - new_m).exp()
    c = right if factor is None else factor(m, new_m)
    c_acc = c if factor_acc is None else factor_acc(m, new_m)
    return new_m, total * c + p.sum(-1), acc * c_acc[..., None] + p @ v


@misconception(
    "flash_attention",
    "Neither the sum nor the output so far is rescaled when the maximum grows. Both were built "
    "with exp(s - old maximum).",
    see=FLASH,
)
def does_not_rescale(q, k, v, block_q, block_k, is_causal=False):
    def ones(m, new_m):
        return torch.ones_like(m)

    return _flash(q, k, v, block_q, block_k, is_causal,
                  update=lambda *x: _update(*x, factor=ones))  # fmt: skip


@misconception(
    "flash_attention",
    "You rescale the sum but not the output. Both carry exp(s - m): what is done to one must be "
    "done to the other.",
    see=FLASH,
)
def rescales_the_sum_but_not_the_output(q, k, v, block_q, block_k, is_causal=False):
    def ones(m, new_m):
        return torch.ones_like(m)

    return _flash(q, k, v, block_q, block_k, is_causal,
                  update=lambda *x: _update(*x, factor_acc=ones))  # fmt: skip


@misconception(
    "flash_attention",
    "Your rescaling factor is inverted: exp(old - new) is at most 1, yours at least 1.",
    see=FLASH,
)
def inverts_the_rescaling(q, k, v, block_q, block_k, is_causal=False):
    def inverted(m, new_m):
        return torch.where(m == -torch.inf, torch.zeros_like(m), (new_m - m).exp())

    return _flash(q, k, v, block_q, block_k, is_causal,
                  update=lambda *x: _update(*x, factor=inverted))  # fmt: skip


@misconception(
    "flash_attention",
    "You divide by the running sum at every step and again at the end. Divide once: at the end, "
    "or, if you must, at every step with the old sum multiplied back in.",
    see=FLASH,
)
def divides_twice(q, k, v, block_q, block_k, is_causal=False):
    def update(m, total, acc, scores, values):
        m, total, acc = _update(m, total, acc, scores, values)
        return m, total, acc / total[..., None]

    return _flash(q, k, v, block_q, block_k, is_causal, update=update)


@misconception(
    "flash_attention",
    "Your causal mask goes by block number alone: a block is seen or not. On the diagonal a tile "
    "is seen in part, and is masked element by element.",
    see=TILES,
)
def masks_by_block_alone(q, k, v, block_q, block_k, is_causal=False):
    return _flash(q, k, v, block_q, block_k, is_causal, by_block=True)


@misconception(
    "flash_attention",
    "Your result is right and your memory is not: all scores were held at once. That is what "
    "FlashAttention is there to avoid; compute them tile by tile.",
    see=FLASH,
)
def computes_all_scores_first(q, k, v, block_q, block_k, is_causal=False):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@misconception(
    "flash_attention",
    "Scores are not divided by sqrt(d).",
    see=FLASH,
)
def forgets_the_scale(q, k, v, block_q, block_k, is_causal=False):
    return _flash(q, k, v, block_q, block_k, is_causal, no_scale=True)


@misconception(
    "flash_attention",
    "The last block of keys is left out where it is short.",
    see=FLASH,
)
def leaves_out_the_short_block(q, k, v, block_q, block_k, is_causal=False):
    return _flash(q, k, v, block_q, block_k, is_causal, drop_short=True)


@misconception(
    "flash_attention",
    "You attend to each key block by itself and average the results, as if FlashAttention were an "
    "approximation. It is exact: blocks share one softmax, through the running sum.",
    see=CARRY,
)
def treats_blocks_as_independent(q, k, v, block_q, block_k, is_causal=False):
    outs, count = torch.zeros_like(q), 0
    lse = None
    for first in range(0, k.shape[2], block_k):
        columns = torch.arange(first, min(first + block_k, k.shape[2]))
        scores = q @ k[:, :, columns].mT / math.sqrt(q.shape[-1])
        if is_causal:
            hidden = columns > torch.arange(q.shape[2])[:, None]
            scores = scores.masked_fill(hidden, -1e9)
        outs, count = outs + scores.softmax(-1) @ v[:, :, columns], count + 1
        part = scores.logsumexp(-1)
        lse = part if lse is None else torch.logaddexp(lse, part)
    return outs / count, lse


@misconception(
    "flash_attention",
    "You return the maximum and not the log-sum-exp: log l is missing. The backward pass needs "
    "m + log l.",
    see=BACKWARD,
)
def returns_the_maximum(q, k, v, block_q, block_k, is_causal=False):
    return _flash(q, k, v, block_q, block_k, is_causal, lse=lambda m, total: m)


@alternative("flash_attention")
def dividing_at_every_step_rightly(q, k, v, block_q, block_k, is_causal=False):
    def update(m, total, acc, scores, values):
        new_m = torch.maximum(m, scores.amax(-1))
        p, old = (scores - new_m[..., None]).exp(), total * (m - new_m).exp()
        new_total = old + p.sum(-1)
        return new_m, new_total, (acc * old[..., None] + p @ values) / new_total[..., None]

    return _flash(q, k, v, block_q, block_k, is_causal, update=update, divided=True)


@alternative("flash_attention")
def keys_outside_queries_inside(q, k, v, block_q, block_k, is_causal=False):
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    for first in range(0, k.shape[2], block_k):
        columns = torch.arange(first, min(first + block_k, k.shape[2]))
        for start in range(0, q.shape[2], block_q):
            rows = torch.arange(start, min(start + block_q, q.shape[2]))
            if is_causal and first > rows[-1]:
                continue
            scores = q[:, :, rows] @ k[:, :, columns].mT / math.sqrt(q.shape[-1])
            if is_causal:
                scores = scores.masked_fill(columns > rows[:, None], -torch.inf)
            part = scores.logsumexp(-1)
            new = torch.logaddexp(lse[:, :, rows], part)
            safe = new.masked_fill(new == -torch.inf, 0.0)
            p = (scores - safe[..., None]).exp()
            old = (lse[:, :, rows] - safe).exp()[..., None]
            out[:, :, rows] = out[:, :, rows] * old + p @ v[:, :, columns]
            lse[:, :, rows] = new
    return out, lse


# flash_backward


def _backward(grad, q, k, v, out, lse, block_k, **change):
    scale = 1 / math.sqrt(q.shape[-1])
    delta = (grad * out).sum(-1, keepdim=True)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, k.shape[2], block_k):
        keys = slice(start, start + block_k)
        scores = q @ k[:, :, keys].mT * scale
        p = change.get("p", lambda s, lse: (s - lse[..., None]).exp())(scores, lse)
        dv[:, :, keys] = p.mT @ grad
        dp = grad @ v[:, :, keys].mT
        ds = change.get("ds", lambda p, dp, delta: p * (dp - delta))(p, dp, delta)
        dq += ds @ k[:, :, keys] * change.get("scale_q", scale)
        dk[:, :, keys] = ds.mT @ q * change.get("scale_k", scale)
    return dq, dk, dv


@misconception(
    "flash_backward",
    "The term D is missing: a softmax's gradient is P * (dP - D), since raising one probability "
    "lowers the others.",
    see=BACKWARD,
)
def forgets_delta(grad, q, k, v, out, lse, block_k):
    return _backward(grad, q, k, v, out, lse, block_k, ds=lambda p, dp, delta: p * dp)


@misconception(
    "flash_backward",
    "Your D is summed over the keys of one block. It belongs to the whole row: rowsum(grad * out) "
    "gives it without any key.",
    see=BACKWARD,
)
def sums_delta_within_a_block(grad, q, k, v, out, lse, block_k):
    return _backward(
        grad, q, k, v, out, lse, block_k,
        ds=lambda p, dp, delta: p * (dp - (p * dp).sum(-1, keepdim=True)),
    )  # fmt: skip


@misconception(
    "flash_backward",
    "You normalise the scores of each block by itself. P needs the sum over all keys, which is in "
    "the log-sum-exp.",
    see=BACKWARD,
)
def applies_softmax_within_a_block(grad, q, k, v, out, lse, block_k):
    return _backward(grad, q, k, v, out, lse, block_k, p=lambda s, lse: s.softmax(-1))


@misconception(
    "flash_backward",
    "The scale is missing in dq and dk: scores are q k^T / sqrt(d), so their gradient passes "
    "through the division.",
    see=BACKWARD,
)
def forgets_the_scale_of_the_gradient(grad, q, k, v, out, lse, block_k):
    return _backward(grad, q, k, v, out, lse, block_k, scale_q=1.0, scale_k=1.0)


@misconception(
    "flash_backward",
    "dq has the scale and dk has not. Both come from the same dS.",
    see=BACKWARD,
)
def scales_dq_alone(grad, q, k, v, out, lse, block_k):
    return _backward(grad, q, k, v, out, lse, block_k, scale_k=1.0)


@misconception(
    "flash_backward",
    "You hold all of P, as a backward pass does that stored it. Compute P again, block by block: "
    "that is why the forward pass kept the log-sum-exp.",
    see=BACKWARD,
)
def holds_all_probabilities(grad, q, k, v, out, lse, block_k):
    return _backward(grad, q, k, v, out, lse, max(1, k.shape[2]))


@alternative("flash_backward")
def by_query_rows(grad, q, k, v, out, lse, block_k):
    scale = 1 / math.sqrt(q.shape[-1])
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, q.shape[2], 8):
        rows = slice(start, start + 8)
        for first in range(0, k.shape[2], block_k):
            keys = slice(first, first + block_k)
            p = torch.exp(q[:, :, rows] @ k[:, :, keys].mT * scale - lse[:, :, rows, None])
            delta = (grad[:, :, rows] * out[:, :, rows]).sum(-1)[..., None]
            ds = p * (grad[:, :, rows] @ v[:, :, keys].mT - delta)
            dq[:, :, rows] += scale * (ds @ k[:, :, keys])
            dk[:, :, keys] += scale * (ds.mT @ q[:, :, rows])
            dv[:, :, keys] += p.mT @ grad[:, :, rows]
    return dq, dk, dv


@alternative("flash_backward")
def with_einsum_and_lists(grad, q, k, v, out, lse, block_k):
    q = q * q.shape[-1] ** -0.5
    delta = torch.einsum("bhtd,bhtd->bht", grad, out)
    dq, dks, dvs = 0, [], []
    for key, value in zip(k.split(block_k, 2), v.split(block_k, 2), strict=True):
        p = torch.einsum("bhtd,bhsd->bhts", q, key).sub(lse.unsqueeze(-1)).exp()
        ds = p * (torch.einsum("bhtd,bhsd->bhts", grad, value) - delta.unsqueeze(-1))
        dvs.append(torch.einsum("bhts,bhtd->bhsd", p, grad))
        dks.append(torch.einsum("bhts,bhtd->bhsd", ds, q))
        dq = dq + torch.einsum("bhts,bhsd->bhtd", ds, key)
    return [dq * q.shape[-1] ** -0.5, torch.cat(dks, 2), torch.cat(dvs, 2)]


# split_decode


def _parts(q, k, v, num_splits):
    outs, scores = [], []
    for k_part, v_part in zip(k.chunk(num_splits, 2), v.chunk(num_splits, 2), strict=True):
        s = q @ k_part.mT / math.sqrt(q.shape[-1])
        outs.append(s.softmax(-1) @ v_part)
        scores.append(s)
    return torch.stack(outs), scores


@misconception(
    "split_decode",
    "Your result is the program's as it came. Give it two parts, one whose keys the query likes "
    "and one whose keys it does not: how much does each count, and how much should it?",
    see=DECODE,
    is_starter=True,
)
def the_program_is_not_repaired_yet(q, k, v, num_splits):
    return _parts(q, k, v, num_splits)[0].mean(0)


@misconception(
    "split_decode",
    "You weigh each part by its number of keys. What counts is how much attention they get: the "
    "sum of exp(score).",
    see=DECODE,
)
def weighs_by_size(q, k, v, num_splits):
    outs, scores = _parts(q, k, v, num_splits)
    sizes = torch.tensor([s.shape[-1] for s in scores], dtype=q.dtype).view(-1, 1, 1, 1, 1)
    return (outs * sizes).sum(0) / sizes.sum()


@misconception(
    "split_decode",
    "You weigh each part by its largest score alone. Many middling keys can outweigh one large: "
    "the log-sum-exp counts them all.",
    see=DECODE,
)
def weighs_by_the_largest_score(q, k, v, num_splits):
    outs, scores = _parts(q, k, v, num_splits)
    weights = torch.stack([s.amax(-1, keepdim=True) for s in scores]).softmax(0)
    return (outs * weights).sum(0)


@misconception(
    "split_decode",
    "You take exp of bare scores to weigh the parts: it overflows. Subtract a maximum that all "
    "parts share, or take a softmax of the log-sum-exps.",
    see=OVERFLOW,
)
def weighs_by_bare_exponentials(q, k, v, num_splits):
    outs, scores = _parts(q, k, v, num_splits)
    sums = torch.stack([s.exp().sum(-1, keepdim=True) for s in scores])
    return (outs * sums).sum(0) / sums.sum(0)


@misconception(
    "split_decode",
    "You add the parts without weights.",
    see=DECODE,
)
def adds_the_splits(q, k, v, num_splits):
    return _parts(q, k, v, num_splits)[0].sum(0) if num_splits > 1 else q * 0


@alternative("split_decode")
def with_a_shared_maximum(q, k, v, num_splits):
    parts = zip(k.chunk(num_splits, 2), v.chunk(num_splits, 2), strict=True)
    found = []
    for k_part, v_part in parts:
        s = q @ k_part.mT / math.sqrt(q.shape[-1])
        m = s.amax(-1, keepdim=True)
        p = torch.exp(s - m)
        found.append((p @ v_part, p.sum(-1, keepdim=True), m))
    top = torch.stack([m for *_, m in found]).amax(0)
    numerator = sum(acc * torch.exp(m - top) for acc, _, m in found)
    return numerator / sum(total * torch.exp(m - top) for _, total, m in found)


@alternative("split_decode")
def one_part_after_the_other(q, k, v, num_splits):
    outs, scores = _parts(q, k, v, num_splits)
    out, lse = outs[0], scores[0].logsumexp(-1, keepdim=True)
    for part, s in zip(outs[1:], scores[1:], strict=True):
        other = s.logsumexp(-1, keepdim=True)
        out = torch.lerp(out, part, torch.sigmoid(other - lse))
        lse = torch.logaddexp(lse, other)
    return out


# hbm_bytes


def _traffic(n, d, block_k, size, *, standard=None, flash=None):
    passes = math.ceil(n / block_k)
    return {
        "standard": size * (4 * n * n + 4 * n * d if standard is None else standard),
        "flash": size * (2 * n * d + 3 * n * d * passes if flash is None else flash(passes)),
    }


@misconception(
    "hbm_bytes",
    "You count S and P as written and never read. Each kernel reads what the one before it wrote.",
    see=TRAFFIC,
)
def writes_but_never_reads(seq_len, head_dim, block_k, element_bytes=2):
    n, d = seq_len, head_dim
    return _traffic(n, d, block_k, element_bytes, standard=2 * n * n + 4 * n * d)


@misconception(
    "hbm_bytes",
    "You count elements. A float16 element has two bytes: multiply by element_bytes.",
    see=TRAFFIC,
)
def counts_elements(seq_len, head_dim, block_k, element_bytes=2):
    return _traffic(seq_len, head_dim, block_k, 1)


@misconception(
    "hbm_bytes",
    "Your FlashAttention reads everything once, as if SRAM held it all. q and O make a round trip "
    "for every block of keys: the traffic is N^2 d^2 / M, not N d.",
    see=TRAFFIC,
)
def reads_everything_once(seq_len, head_dim, block_k, element_bytes=2):
    n, d = seq_len, head_dim
    return _traffic(n, d, block_k, element_bytes, flash=lambda passes: 4 * n * d)


@misconception(
    "hbm_bytes",
    "You count O as written and not as read. In the order of the first paper a block of keys "
    "continues the output of the block before it.",
    see=TRAFFIC,
)
def forgets_that_the_output_comes_back(seq_len, head_dim, block_k, element_bytes=2):
    n, d = seq_len, head_dim
    return _traffic(n, d, block_k, element_bytes, flash=lambda p: 2 * n * d + 2 * n * d * p)


@misconception(
    "hbm_bytes",
    "You round the number of passes down. A short last block is a pass as well.",
    see=TRAFFIC,
)
def rounds_the_passes_down(seq_len, head_dim, block_k, element_bytes=2):
    n, d = seq_len, head_dim
    return _traffic(
        n, d, block_k, element_bytes, flash=lambda _: 2 * n * d + 3 * n * d * (n // block_k)
    )


@alternative("hbm_bytes")
def kernel_by_kernel(seq_len, head_dim, block_k, element_bytes=2):
    row, square = seq_len * head_dim, seq_len**2
    kernels = [(row + row, square), (square, square), (square + row, row)]
    flash = 0
    for _ in range(0, seq_len, block_k):
        flash += 2 * row + row
    return {
        "standard": element_bytes * sum(read + written for read, written in kernels),
        "flash": element_bytes * (flash + 2 * row),
    }


@alternative("hbm_bytes")
def factored(seq_len, head_dim, block_k, element_bytes=2):
    passes = (seq_len + block_k - 1) // block_k
    return {
        "standard": 4 * seq_len * (seq_len + head_dim) * element_bytes,
        "flash": seq_len * head_dim * (2 + 3 * passes) * element_bytes,
    }


# attention_flops


def _flops(n, d, forward, standard, flash, per=2):
    product = per * n * n * d
    return {
        "forward": forward * product,
        "backward_standard": standard * product,
        "backward_flash": flash * product,
    }


@misconception(
    "attention_flops",
    "You give FlashAttention fewer FLOPs. It has more: it computes S again. What falls is the "
    "traffic between the memories, and that is what took the time.",
    see=FLOPS,
)
def thinks_that_flash_saves_flops(seq_len, head_dim):
    return _flops(seq_len, head_dim, 2, 4, 3)


@misconception(
    "attention_flops",
    "You give both backward passes the same work. FlashAttention kept no P and computes the "
    "scores once more.",
    see=BACKWARD,
)
def forgets_the_recomputation(seq_len, head_dim):
    return _flops(seq_len, head_dim, 2, 4, 4)


@misconception(
    "attention_flops",
    "You count a multiplication with its addition as one. Two, as everybody quotes them.",
    see=FLOPS,
)
def counts_products_as_one(seq_len, head_dim):
    return _flops(seq_len, head_dim, 2, 4, 5, per=1)


@misconception(
    "attention_flops",
    "You count one product in the forward pass. There are two: q k^T and P v; and two for each of "
    "them on the way back.",
    see=FLOPS,
)
def counts_one_forward_product(seq_len, head_dim):
    return _flops(seq_len, head_dim, 1, 2, 3)


@alternative("attention_flops")
def product_by_product(seq_len, head_dim):
    n, d = seq_len, head_dim
    scores, values = 2 * n * d * n, 2 * n * n * d
    backward = {"dv": values, "dp": scores, "dq": values, "dk": values}
    return {
        "forward": scores + values,
        "backward_standard": sum(backward.values()),
        "backward_flash": scores + sum(backward.values()),
    }


@alternative("attention_flops")
def by_the_published_ratio(seq_len, head_dim):
    forward = 4 * seq_len**2 * head_dim
    return {
        "forward": forward,
        "backward_standard": 2 * forward,
        "backward_flash": 5 * forward // 2,
    }


@alternative("split_decode")
def with_torch(q, k, v, num_splits):
    return F.scaled_dot_product_attention(q, k, v)
