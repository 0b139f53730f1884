"""Chapter 14: wrong answers that people give, and right ones in another form."""

import math

import torch
import torch.nn.functional as F

from autograder import alternative, misconception

TRANSPOSE = "3. A transpose between ranks"
RING = "4. Keys go round"
BALANCE = "5. A fair share"
MODEL = "6. Through the whole model"
BOTH = "7. Ulysses x Ring"
LIMITS = "8. Limits"
SEQUENCE = "9. Not sequence parallelism"


# ulysses_attention


def _to_heads(comm, x):
    by_rank = x.unflatten(1, (comm.size, -1)).transpose(0, 1).contiguous()
    return comm.all_to_all(by_rank).flatten(0, 1)


def _to_positions(comm, x):
    return comm.all_to_all(x.unflatten(0, (comm.size, -1)).contiguous())


def _attend(q, k, v, is_causal=True):
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    return out[0].transpose(0, 1)


def _repeated(x, comm):
    return x.repeat_interleave(max(1, comm.size // x.shape[1]), 1)


def _ulysses(comm, q, k, v, *, repeat=_repeated, is_causal=True):
    k, v = repeat(k, comm), repeat(v, comm)
    out = _attend(*(_to_heads(comm, x) for x in (q, k, v)), is_causal=is_causal)
    return _to_positions(comm, out).transpose(0, 1).flatten(1, 2)


@misconception(
    "ulysses_attention",
    "Each rank attends to its own positions alone. The all-to-all is there to bring the others'.",
    see=TRANSPOSE,
)
def attends_to_its_own_positions(comm, q, k, v):
    return _attend(q, k, v)


@misconception(
    "ulysses_attention",
    "You divide heads of this rank's own positions, and attend there. Ulysses does not split the "
    "heads of the input: it trades positions for heads, so that a rank has few heads of all "
    "positions.",
    see=TRANSPOSE,
)
def splits_heads_of_the_input(comm, q, k, v):
    share = q.shape[1] // comm.size
    mine = slice(comm.rank * share, (comm.rank + 1) * share)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1)[:, mine] for x in (k, v))
    out = _attend(q[:, mine], k, v)
    return comm.all_gather(out.transpose(0, 1).contiguous()).transpose(0, 1)


@misconception(
    "ulysses_attention",
    "You gather q, k and v of all ranks, all heads, and use a part: right, and each rank sends, "
    "and holds, N times what an all-to-all would bring it.",
    see=TRANSPOSE,
)
def gathers_everything(comm, q, k, v):
    size = len(q)
    out = _attend(*(comm.all_gather(x) for x in (q, k, v)))
    return out[comm.rank * size : (comm.rank + 1) * size]


@misconception(
    "ulysses_attention",
    "You cut the rank's positions, not its heads, into the parts that are sent: without sorting by "
    "head first, dimension 0 is positions, and everybody gets all heads of some.",
    see=TRANSPOSE,
)
def sends_positions(comm, q, k, v):
    k, v = _repeated(k, comm), _repeated(v, comm)
    share = comm.size

    def wrong(x):
        return x.reshape(share, -1, x.shape[1] // share, x.shape[2])

    q, k, v = (comm.all_to_all(wrong(x).contiguous()).flatten(0, 1) for x in (q, k, v))
    return _to_positions(comm, _attend(q, k, v)).transpose(0, 1).flatten(1, 2)


@misconception(
    "ulysses_attention",
    "What comes back is sorted by sender, that is by group of heads, then by position. You read it "
    "as if positions came first.",
    see=TRANSPOSE,
)
def does_not_sort_what_comes_back(comm, q, k, v):
    k2, v2 = _repeated(k, comm), _repeated(v, comm)
    out = _attend(*(_to_heads(comm, x) for x in (q, k2, v2)))
    return _to_positions(comm, out).reshape(q.shape)


@misconception(
    "ulysses_attention",
    "With fewer key/value heads than ranks you copy them in turns, 0 1 0 1. Neighbouring query "
    "heads share one, so neighbouring ranks do: 0 0 1 1.",
    see=TRANSPOSE,
)
def copies_heads_in_turns(comm, q, k, v):
    def in_turns(x, comm):
        return x.repeat(1, max(1, comm.size // x.shape[1]), 1)

    return _ulysses(comm, q, k, v, repeat=in_turns)


@misconception(
    "ulysses_attention",
    "You give keys and values as many heads as queries before they travel: right, and all the "
    "bytes that grouping had saved are sent again.",
    see=TRANSPOSE,
)
def repeats_heads_before_they_travel(comm, q, k, v):
    group = q.shape[1] // k.shape[1]
    return _ulysses(comm, q, k, v, repeat=lambda x, _: x.repeat_interleave(group, 1))


@misconception("ulysses_attention", "The causal mask is missing.", see=TRANSPOSE)
def forgets_the_mask(comm, q, k, v):
    return _ulysses(comm, q, k, v, is_causal=False)


@alternative("ulysses_attention")
def ulysses_by_heads_first(comm, q, k, v):
    def forth(x):  # (t, H, d) -> (1, H / N, T, d)
        parts = comm.all_to_all(x.transpose(0, 1).contiguous())  # (N h, t, d)
        return torch.cat(parts.chunk(comm.size), 1)[None]

    k, v = _repeated(k, comm), _repeated(v, comm)
    out = F.scaled_dot_product_attention(
        *(forth(x) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )[0]
    back = comm.all_to_all(torch.cat(out.chunk(comm.size, 1)).contiguous())
    return back.transpose(0, 1)


@alternative("ulysses_attention")
def ulysses_by_einsum_with_one_message(comm, q, k, v):
    n = comm.size
    k, v = _repeated(k, comm), _repeated(v, comm)
    split = [x.chunk(n, 1) for x in (q, k, v)]
    packed = torch.stack([torch.cat([x[r] for x in split], 1) for r in range(n)])
    whole = comm.all_to_all(packed.contiguous()).flatten(0, 1)
    q, k, v = whole.split([x[0].shape[1] for x in split], 1)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[2])
    scores = scores + torch.full(scores.shape[1:], -math.inf, dtype=q.dtype).triu(1)
    out = torch.einsum("hts,shd->thd", scores.softmax(-1), v)
    back = comm.all_to_all(out.unflatten(0, (n, -1)).contiguous())
    return torch.cat(list(back), 1)


# ring_attention


def _sum_by_weight(outs, lses):
    lses = torch.stack(lses)
    total = lses.logsumexp(0)
    weights = (lses - total).exp()[..., None]
    return (torch.stack(outs) * weights).sum(0), total


def _part(q, here, scale=None):
    keys, values = here.chunk(2, 1)
    scores = q @ keys.T * (1 / math.sqrt(q.shape[1]) if scale is None else scale)
    return scores.softmax(1) @ values, scores.logsumexp(1)


def _exchange(comm, here, tag=0, towards=1):
    arriving = torch.empty_like(here)
    handles = [
        comm.isend(here, (comm.rank + towards) % comm.size, tag=tag),
        comm.irecv(arriving, (comm.rank - towards) % comm.size, tag=tag),
    ]
    return arriving, handles


def _ring(comm, q, k, v, join=_sum_by_weight, *, part=_part, steps=None, extra=0):
    """All parts' outputs, joined at the end."""
    here, outs, lses = torch.cat([k, v], 1), [], []
    steps = comm.size if steps is None else steps
    for step in range(steps):
        if step + 1 < steps + extra and comm.size > 1:
            arriving, handles = _exchange(comm, here)
        else:
            arriving, handles = here, []
        out, lse = part(q, here)
        outs, lses = [*outs, out], [*lses, lse]
        for handle in handles:
            handle.wait()
        here, handles, arriving = arriving, None, None
        if len(outs) > 1 and join is _sum_by_weight:
            out, lse = join(outs, lses)
            outs, lses = [out], [lse]
    return join(outs, lses)


@misconception(
    "ring_attention",
    "You average the ranks' partial outputs. Each is a softmax over some keys by itself; one over "
    "all keys weighs them by their exponentials' sums, which their log-sum-exp says.",
    see=RING,
)
def averages_partial_outputs(comm, q, k, v):
    def join(outs, lses):
        return torch.stack(outs).mean(0), torch.stack(lses).logsumexp(0)

    return _ring(comm, q, k, v, join)


@misconception(
    "ring_attention",
    "You add up normalized partial outputs: with N parts of equal weight, N times too much.",
    see=RING,
)
def sums_partial_outputs(comm, q, k, v):
    def join(outs, lses):
        return torch.stack(outs).sum(0), torch.stack(lses).logsumexp(0)

    return _ring(comm, q, k, v, join)


@misconception(
    "ring_attention",
    "You take exp of the scores as they are, and divide at the end: beyond 88 in float32, or 709 "
    "in float64, that is infinite. Keep everything relative to a maximum.",
    see=RING,
)
def does_not_shift_scores(comm, q, k, v):
    def part(q, here):
        keys, values = here.chunk(2, 1)
        terms = (q @ keys.T / math.sqrt(q.shape[1])).exp()
        return terms @ values, terms.sum(1)

    def join(outs, sums):
        total = torch.stack(sums).sum(0)
        return torch.stack(outs).sum(0) / total[:, None], total.log()

    return _ring(comm, q, k, v, join, part=part)


@misconception(
    "ring_attention",
    "You gather keys and values: a few lines, right values, and every rank holds those of the "
    "whole text, which the ring was to avoid. Llama 3 does it where they are small; here it is "
    "asked not to.",
    see=RING,
)
def gathers_all_keys(comm, q, k, v):
    return _part(q, comm.all_gather(torch.cat([k, v], 1)))


@misconception(
    "ring_attention",
    "You attend first and send afterwards: the network waits for the products, and then the "
    "products for the network. Start both messages, attend, then wait.",
    see=RING,
)
def sends_after_attending(comm, q, k, v):
    here = torch.cat([k, v], 1)
    out, lse = _part(q, here)
    for _ in range(comm.size - 1):
        arriving, handles = _exchange(comm, here)
        for handle in handles:
            handle.wait()
        here, handles, arriving = arriving, None, None
        out, lse = _sum_by_weight(*zip((out, lse), _part(q, here), strict=True))
    return out, lse


@misconception(
    "ring_attention",
    "You pass keys on once more than needed: after N - 1 steps every rank has seen all.",
    see=RING,
)
def sends_once_too_often(comm, q, k, v):
    return _ring(comm, q, k, v, extra=1)


@misconception(
    "ring_attention",
    "You stop a step too early: the last keys that arrive are never attended to.",
    see=RING,
)
def leaves_the_last_part_out(comm, q, k, v):
    return _ring(comm, q, k, v, steps=max(1, comm.size - 1))


@misconception(
    "ring_attention",
    "You collect what arrives and attend to all of it at the end: the ring is an all-gather then, "
    "in memory and in time.",
    see=RING,
)
def collects_what_arrives(comm, q, k, v):
    held = [torch.cat([k, v], 1)]
    for _ in range(comm.size - 1):
        arriving, handles = _exchange(comm, held[-1])
        for handle in handles:
            handle.wait()
        held.append(arriving)
    return _part(q, torch.cat(held))


@misconception("ring_attention", "The scores are not divided by sqrt(d).", see=RING)
def forgets_the_scale(comm, q, k, v):
    return _ring(comm, q, k, v, part=lambda q, here: _part(q, here, 1.0))


@alternative("ring_attention")
def ring_with_running_maximum(comm, q, k, v):
    here = torch.cat([k, v], 1)
    m, total, out = q.new_full((len(q), 1), -math.inf), q.new_zeros(len(q), 1), q * 0
    for step in range(comm.size):
        last = step + 1 == comm.size
        arriving, handles = (here, []) if last else _exchange(comm, here)
        keys, values = here[:, : q.shape[1]], here[:, q.shape[1] :]
        scores = q / math.sqrt(q.shape[1]) @ keys.T
        new = torch.maximum(m, scores.amax(1, keepdim=True))
        terms, factor = (scores - new).exp(), (m - new).exp()
        total, out, m = total * factor + terms.sum(1, keepdim=True), out * factor, new
        out = out + terms @ values
        for handle in handles:
            handle.wait()
        here, handles, arriving = arriving, None, None
    return out / total, (m + total.log())[:, 0]


@alternative("ring_attention")
def ring_the_other_way_with_two_messages(comm, q, k, v):
    out = lse = None
    for step in range(comm.size):
        handles, arriving = [], [k, v]
        if step + 1 < comm.size:
            pairs = [_exchange(comm, x, tag, towards=-1) for tag, x in enumerate((k, v))]
            arriving, handles = [p[0] for p in pairs], [h for p in pairs for h in p[1]]
            pairs = None
        scores = torch.einsum("td,sd->ts", q, k) / math.sqrt(q.shape[1])
        part, own = scores.softmax(1) @ v, scores.logsumexp(1)
        if out is None:
            out, lse = part, own
        else:
            weight = torch.sigmoid(own - lse)[:, None]
            out, lse = out + weight * (part - out), torch.logaddexp(lse, own)
        for handle in handles:
            handle.wait()
        k, v = arriving
        handles, arriving = None, None
    return out, lse


# zigzag_batch


def _zigzag(seq_len, rank, num_ranks):
    parts = torch.arange(seq_len).chunk(2 * num_ranks)
    return torch.cat([parts[rank], parts[2 * num_ranks - 1 - rank]])


@misconception(
    "zigzag_batch",
    "On one rank all is right. Compare what rank 0 of two gets with the text: tokens, those that "
    "follow them, and their places.",
    see=MODEL,
    is_starter=True,
)
def shifts_and_counts_locally(tokens, rank, num_ranks):
    parts = tokens[:, :-1].chunk(2 * num_ranks, 1)
    inputs = torch.cat([parts[rank], parts[2 * num_ranks - 1 - rank]], 1)
    targets = torch.cat([inputs[:, 1:], tokens[:, -1:]], 1)
    return inputs, targets, torch.arange(inputs.shape[1])


@misconception(
    "zigzag_batch",
    "Positions restart at 0 on each rank: RoPE then measures wrong distances between the queries "
    "of one and the keys of another.",
    see=MODEL,
)
def restarts_positions(tokens, rank, num_ranks):
    place = _zigzag(tokens.shape[1] - 1, rank, num_ranks)
    return tokens[:, place], tokens[:, place + 1], torch.arange(len(place))


@misconception(
    "zigzag_batch",
    "Positions count on from rank to rank, as they do in contiguous parts. This rank has an early "
    "and a late part.",
    see=MODEL,
)
def counts_positions_contiguously(tokens, rank, num_ranks):
    place = _zigzag(tokens.shape[1] - 1, rank, num_ranks)
    size = len(place)
    return tokens[:, place], tokens[:, place + 1], torch.arange(rank * size, (rank + 1) * size)


@misconception(
    "zigzag_batch",
    "Targets are shifted in the rank's own tensor: at the end of each part the next token is "
    "another rank's. Shift before you divide.",
    see=MODEL,
)
def shifts_after_dividing(tokens, rank, num_ranks):
    place = _zigzag(tokens.shape[1] - 1, rank, num_ranks)
    inputs = tokens[:, place]
    return inputs, torch.cat([inputs[:, 1:], tokens[:, place[-1:] + 1]], 1), place


@misconception(
    "zigzag_batch",
    "You divide contiguously: one part a rank. Zigzag gives each an early and a late one.",
    see=MODEL,
)
def divides_contiguously(tokens, rank, num_ranks):
    place = torch.arange(tokens.shape[1] - 1).chunk(num_ranks)[rank]
    return tokens[:, place], tokens[:, place + 1], place


@misconception(
    "zigzag_batch",
    "You divide all T + 1 tokens: the last is a target alone, and parts come out unequal.",
    see=MODEL,
)
def divides_the_last_token_too(tokens, rank, num_ranks):
    place = _zigzag(tokens.shape[1], rank, num_ranks)
    return tokens[:, place], tokens[:, (place + 1).clamp(max=tokens.shape[1] - 1)], place


@misconception(
    "zigzag_batch",
    "Your second part is rank + N: that is every N-th part. Zigzag pairs the first with the last.",
    see=MODEL,
)
def takes_every_nth_part(tokens, rank, num_ranks):
    parts = torch.arange(tokens.shape[1] - 1).chunk(2 * num_ranks)
    place = torch.cat([parts[rank], parts[rank + num_ranks]])
    return tokens[:, place], tokens[:, place + 1], place


@misconception(
    "zigzag_batch",
    "Your late part stands before the early one. Any order would do, if everybody kept it: asked "
    "for is the early one first.",
    see=MODEL,
)
def puts_the_late_part_first(tokens, rank, num_ranks):
    place = torch.cat(_zigzag(tokens.shape[1] - 1, rank, num_ranks).chunk(2)[::-1])
    return tokens[:, place], tokens[:, place + 1], place


@alternative("zigzag_batch")
def zigzag_by_slices(tokens, rank, num_ranks):
    size = (tokens.shape[1] - 1) // (2 * num_ranks)
    late = 2 * num_ranks - 1 - rank
    cuts = [slice(part * size, (part + 1) * size) for part in (rank, late)]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(tokens.shape[1])
    return tuple(
        torch.cat([x[..., cut] for cut in cuts], -1) for x in (inputs, targets, positions)
    )  # fmt: skip


@alternative("zigzag_batch")
def zigzag_by_reshape(tokens, rank, num_ranks):
    seq_len = tokens.shape[1] - 1
    table = torch.arange(seq_len).view(2 * num_ranks, -1)
    place = table[[rank, -1 - rank]].reshape(-1)
    return tokens.index_select(1, place), tokens.index_select(1, place + 1), place


# context_mean


@misconception(
    "context_mean",
    "Try ranks that count 1 and 3 tokens, and one that counts none.",
    see=MODEL,
    is_starter=True,
)
def means_of_local_means(comm, losses, is_counted):
    counted = is_counted.to(losses.dtype)
    weights = counted / counted.sum()
    return comm.all_reduce((losses * weights).sum(), "mean"), weights / comm.size


@misconception(
    "context_mean",
    "You take the mean of the ranks' means, with care for ranks without tokens: those with few "
    "tokens weigh as much as those with many.",
    see=MODEL,
)
def means_of_local_means_without_nan(comm, losses, is_counted):
    counted = is_counted.to(losses.dtype)
    weights = counted / counted.sum().clamp(min=1)
    return comm.all_reduce((losses * weights).sum(), "mean"), weights / comm.size


@misconception(
    "context_mean",
    "You divide by all tokens, counted or not.",
    see=MODEL,
)
def divides_by_all_tokens(comm, losses, is_counted):
    counted, count = is_counted.to(losses.dtype), len(losses) * comm.size
    return comm.all_reduce((losses * counted).sum()) / count, counted / count


@misconception(
    "context_mean",
    "You do not leave anything out: padding is counted.",
    see=MODEL,
)
def counts_padding(comm, losses, is_counted):
    return comm.all_reduce(losses.mean(), "mean"), torch.ones_like(losses) / (
        len(losses) * comm.size
    )


@misconception(
    "context_mean",
    "Your mean is right, but its derivative is that of this rank's own mean: summed over ranks, "
    "the gradients weigh ranks equally.",
    see=MODEL,
)
def takes_local_weights(comm, losses, is_counted):
    counted = is_counted.to(losses.dtype)
    count = comm.all_reduce(counted.sum()).clamp(min=1)
    own = counted.sum().clamp(min=1)
    return comm.all_reduce((losses * counted).sum()) / count, counted / own / comm.size


@misconception(
    "context_mean",
    "You divide the gradient by N once more, as data parallelism's mean would. Parts of a text add "
    "up.",
    see=MODEL,
)
def divides_weights_by_ranks(comm, losses, is_counted):
    counted = is_counted.to(losses.dtype)
    count = comm.all_reduce(counted.sum()).clamp(min=1)
    return comm.all_reduce((losses * counted).sum()) / count, counted / count / comm.size


@misconception(
    "context_mean",
    "You return this rank's share of the mean: shares have yet to be added up.",
    see=MODEL,
)
def returns_the_share(comm, losses, is_counted):
    counted = is_counted.to(losses.dtype)
    count = comm.all_reduce(counted.sum()).clamp(min=1)
    return (losses * counted).sum() / count, counted / count


@misconception(
    "context_mean",
    "Where nobody counts a token you divide zero by zero, and the step after it is lost.",
    see=MODEL,
)
def divides_by_zero_where_nobody_counts(comm, losses, is_counted):
    counted = is_counted.to(losses.dtype)
    count = comm.all_reduce(counted.sum())
    return comm.all_reduce((losses * counted).sum()) / count, counted / count


@alternative("context_mean")
def mean_by_two_sums(comm, losses, is_counted):
    count = comm.all_reduce(is_counted.sum()).item()
    if not count:
        return losses.new_zeros(()), torch.zeros_like(losses)
    total = comm.all_reduce(losses[is_counted].sum())
    return total / count, is_counted.to(losses.dtype) / count


@alternative("context_mean")
def mean_by_autograd(comm, losses, is_counted):
    leaf = losses.clone().requires_grad_()
    count = comm.all_gather(is_counted.sum().reshape(1)).sum().clamp(min=1)
    share = leaf.masked_fill(~is_counted, 0).sum() / count
    share.backward()
    return comm.all_reduce(share.detach().clone()), leaf.grad


# usp_place


def _usp(rank, r, u, seq_len, heads, kv_heads, place=None):
    row, column = divmod(rank, u) if place is None else place
    part, share = seq_len // (r * u), heads // u
    queries = list(range(column * share, (column + 1) * share))
    return (
        list(range(rank * part, (rank + 1) * part)),
        list(range(row * part * u, (row + 1) * part * u)),
        queries,
        sorted({q * kv_heads // heads for q in queries}),
    )


@misconception(
    "usp_place",
    "You take rows for columns: neighbours in rank order are a row, which exchanges positions for "
    "heads.",
    see=BOTH,
)
def swaps_rows_and_columns(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads):
    place = rank % num_ring, rank // num_ring
    return _usp(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads, place)


@misconception(
    "usp_place",
    "Inside attention you give the rank all positions, as in Ulysses alone. The all-to-all knows "
    "its row only; keys of other rows come round the ring.",
    see=BOTH,
)
def has_all_positions_inside(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads):
    before, _, *heads = _usp(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads)
    return before, list(range(seq_len)), *heads


@misconception(
    "usp_place",
    "Inside attention you leave the rank its own positions: the all-to-all has brought those of "
    "its row.",
    see=BOTH,
)
def keeps_its_positions_inside(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads):
    before, _, *heads = _usp(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads)
    return before, before, *heads


@misconception(
    "usp_place",
    "Before attention you divide by rows only. Outside of it heads are whole on every rank, and "
    "positions are divided over all ranks.",
    see=BOTH,
)
def divides_positions_by_rows_alone(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads):
    _, inside, *heads = _usp(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads)
    return inside, inside, *heads


@misconception(
    "usp_place",
    "You give the rank all heads. That is a ring alone: in a row each computes some.",
    see=BOTH,
)
def computes_all_heads(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads):
    place = _usp(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads)
    return *place[:2], list(range(num_heads)), list(range(num_kv_heads))


@misconception(
    "usp_place",
    "You deal heads out in turns. An all-to-all sends the j-th part of neighbouring heads to the "
    "j-th rank of the row.",
    see=BOTH,
)
def deals_heads_in_turns(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads):
    place = _usp(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads)
    queries = list(range(rank % num_ulysses, num_heads, num_ulysses))
    return *place[:2], queries, sorted({q * num_kv_heads // num_heads for q in queries})


@misconception(
    "usp_place",
    "With fewer key/value heads than ranks in a row, neighbours share one: not every K-th.",
    see=BOTH,
)
def shares_kv_heads_in_turns(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads):
    place = _usp(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads)
    if num_kv_heads >= num_ulysses:
        return place
    return *place[:3], [rank % num_ulysses % num_kv_heads]


@misconception(
    "usp_place",
    "You name a key/value head once for each query head that uses it. The rank holds it once.",
    see=BOTH,
)
def names_kv_heads_repeatedly(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads):
    place = _usp(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads)
    return *place[:3], [q * num_kv_heads // num_heads for q in place[2]]


@alternative("usp_place")
def place_by_asking(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads):
    ranks = num_ring * num_ulysses
    before = [p for p in range(seq_len) if p * ranks // seq_len == rank]
    inside = [p for p in range(seq_len) if p * num_ring // seq_len == rank // num_ulysses]
    queries = [h for h in range(num_heads) if h * num_ulysses // num_heads == rank % num_ulysses]
    return before, inside, queries, sorted({h // (num_heads // num_kv_heads) for h in queries})


@alternative("usp_place")
def place_by_tensors(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads):
    positions = torch.arange(seq_len).view(num_ring, num_ulysses, -1)
    row, column = rank // num_ulysses, rank % num_ulysses
    queries = torch.arange(num_heads).view(num_ulysses, -1)[column]
    kv = torch.unique(queries // (num_heads // num_kv_heads))
    found = positions[row, column], positions[row].flatten(), queries, kv
    return tuple(x.tolist() for x in found)


# causal_work


def _work(layout, seq_len, rank, num_ranks):
    size, half = seq_len // num_ranks, seq_len // num_ranks // 2
    if layout == "contiguous":
        return list(range(rank * size, (rank + 1) * size))
    if layout == "striped":
        return list(range(rank, seq_len, num_ranks))
    late = 2 * num_ranks - 1 - rank
    return [*range(rank * half, (rank + 1) * half), *range(late * half, (late + 1) * half)]


@misconception(
    "causal_work",
    "You give every rank the same work. Contiguous parts do not: the first rank's queries see few "
    "keys, the last one's nearly all.",
    see=BALANCE,
)
def divides_the_triangle_equally(layout, seq_len, rank, num_ranks):
    return seq_len * (seq_len + 1) / 2 / num_ranks


@misconception(
    "causal_work",
    "You count all pairs: without the mask every query sees every key.",
    see=BALANCE,
)
def ignores_the_mask(layout, seq_len, rank, num_ranks):
    return seq_len * seq_len // num_ranks


@misconception(
    "causal_work",
    "You count the rank's own keys alone. Those of other ranks visit, and are seen if they stand "
    "before.",
    see=BALANCE,
)
def counts_its_own_keys_alone(layout, seq_len, rank, num_ranks):
    size = seq_len // num_ranks
    return size * (size + 1) // 2


@misconception(
    "causal_work",
    "A query sees its own position as well: p + 1 keys.",
    see=BALANCE,
)
def leaves_the_own_position_out(layout, seq_len, rank, num_ranks):
    return sum(_work(layout, seq_len, rank, num_ranks))


@misconception(
    "causal_work",
    "You count who sees the rank's keys. Asked for are the keys that its queries see.",
    see=BALANCE,
)
def counts_queries_of_its_keys(layout, seq_len, rank, num_ranks):
    return sum(seq_len - p for p in _work(layout, seq_len, rank, num_ranks))


@misconception(
    "causal_work",
    "Zigzag's second part is the mirror image of the first: 2 N - 1 - rank, not the next one.",
    see=BALANCE,
)
def pairs_neighbouring_parts(layout, seq_len, rank, num_ranks):
    layout = "contiguous" if layout == "zigzag" else layout
    return sum(p + 1 for p in _work(layout, seq_len, rank, num_ranks))


@misconception(
    "causal_work",
    "Striped is nearly fair, not quite: rank r's queries each stand r places later than rank 0's.",
    see=BALANCE,
)
def takes_striped_for_exact(layout, seq_len, rank, num_ranks):
    if layout == "striped":
        return seq_len * (seq_len + 1) / 2 / num_ranks
    return sum(p + 1 for p in _work(layout, seq_len, rank, num_ranks))


@alternative("causal_work")
def work_in_closed_form(layout, seq_len, rank, num_ranks):
    size = seq_len // num_ranks
    if layout == "contiguous":
        return size * (2 * rank * size + size + 1) // 2
    if layout == "striped":
        return size * (2 * (rank + 1) + (size - 1) * num_ranks) // 2
    return seq_len * (seq_len + 1) // 2 // num_ranks


@alternative("causal_work")
def work_by_the_mask(layout, seq_len, rank, num_ranks):
    mask = torch.ones(seq_len, seq_len, dtype=torch.long).tril()
    return int(mask[_work(layout, seq_len, rank, num_ranks)].sum())


# context_bytes


def _bytes(method, seq_len, dim, kv_dim, n):
    numbers = {
        "ulysses": (2 * dim + 2 * kv_dim) / n, "ring": 2 * kv_dim, "gathered": 2 * kv_dim,
        "tensor": 2 * dim,
    }[method]  # fmt: skip
    return 2 * seq_len / n * (n - 1) * numbers


@misconception(
    "context_bytes",
    "Ulysses' bytes do not fall with N in your formula: of T / N positions a rank sends parts, "
    "once. They are 1/N of Megatron's.",
    see=LIMITS,
)
def lets_ulysses_stay(method, seq_len, dim, kv_dim, num_ranks):
    found = _bytes(method, seq_len, dim, kv_dim, num_ranks)
    return found * num_ranks if method == "ulysses" else found


@misconception(
    "context_bytes",
    "You let the ring fall with N. Its part is 1/N of the text, but it is passed on N - 1 times.",
    see=LIMITS,
)
def lets_the_ring_fall(method, seq_len, dim, kv_dim, num_ranks):
    found = _bytes(method, seq_len, dim, kv_dim, num_ranks)
    return found / num_ranks if method in ("ring", "gathered") else found


@misconception(
    "context_bytes",
    "You send parts to yourself as well: of N parts N - 1 leave. (The paper leaves the factor out, "
    "for large N.)",
    see=LIMITS,
)
def sends_to_itself(method, seq_len, dim, kv_dim, num_ranks):
    sent = _bytes(method, seq_len, dim, kv_dim, max(2, num_ranks)) / (max(2, num_ranks) - 1)
    return sent * max(2, num_ranks)


@misconception(
    "context_bytes",
    "The output travels too: four transposes, not three.",
    see=LIMITS,
)
def forgets_the_output(method, seq_len, dim, kv_dim, num_ranks):
    found = _bytes(method, seq_len, dim, kv_dim, num_ranks)
    return found * (dim + 2 * kv_dim) / (2 * dim + 2 * kv_dim) if method == "ulysses" else found


@misconception(
    "context_bytes",
    "Values travel beside the keys: twice as much.",
    see=LIMITS,
)
def forgets_the_values(method, seq_len, dim, kv_dim, num_ranks):
    found = _bytes(method, seq_len, dim, kv_dim, num_ranks)
    return found / 2 if method in ("ring", "gathered") else found


@misconception(
    "context_bytes",
    "You give keys and values the width of queries. With grouped queries they are narrower, which "
    "is most of the ring's charm.",
    see=LIMITS,
)
def gives_keys_the_width_of_queries(method, seq_len, dim, kv_dim, num_ranks):
    return _bytes(method, seq_len, dim, dim, num_ranks)


@misconception(
    "context_bytes",
    "You count numbers, or bytes of other than 16 bits: two bytes each.",
    see=LIMITS,
)
def counts_numbers(method, seq_len, dim, kv_dim, num_ranks):
    return _bytes(method, seq_len, dim, kv_dim, num_ranks) / 2


@misconception(
    "context_bytes",
    "You let a ring pass keys on N times: after N - 1 all have seen them.",
    see=LIMITS,
)
def goes_round_once_more(method, seq_len, dim, kv_dim, num_ranks):
    found = _bytes(method, seq_len, dim, kv_dim, num_ranks)
    return found * num_ranks / (num_ranks - 1) if method == "ring" else found


@alternative("context_bytes")
def bytes_by_cases(method, seq_len, dim, kv_dim, num_ranks):
    part = seq_len // num_ranks
    if method == "ulysses":
        leaving = (num_ranks - 1) / num_ranks
        return sum(part * width * leaving * 2 for width in (dim, kv_dim, kv_dim, dim))
    if method == "tensor":
        return 2 * (num_ranks - 1) / num_ranks * seq_len * dim * 2
    return (num_ranks - 1) * part * (kv_dim + kv_dim) * 2


@alternative("context_bytes")
def bytes_by_messages(method, seq_len, dim, kv_dim, num_ranks):
    total, part = 0, seq_len / num_ranks
    for _ in range(num_ranks - 1):
        if method == "ulysses":
            total += 4 * part * (dim + kv_dim) / num_ranks
        else:
            total += 4 * part * (dim if method == "tensor" else kv_dim)
    return total


# held_by_rank


def _held(method, p, i, o, n):
    if method == "tensor":
        return p / n, i / n + o
    return (p if method == "context" else p / n), (i + o) / n


@misconception(
    "held_by_rank",
    "You treat context parallelism as tensor with sequence parallelism. It cuts the text and no "
    "matrix: every rank has all parameters.",
    see=SEQUENCE,
)
def takes_cp_for_sp(method, parameters, inside, outside, num_ranks):
    held = _held(method, parameters, inside, outside, num_ranks)
    return parameters / num_ranks, held[1]


@misconception(
    "held_by_rank",
    "You let context parallelism divide norms, dropout and residuals alone, as sequence "
    "parallelism does. It divides attention and the MLP as well, by positions.",
    see=SEQUENCE,
)
def divides_the_outside_alone(method, parameters, inside, outside, num_ranks):
    if method == "context":
        return parameters, inside + outside / num_ranks
    return _held(method, parameters, inside, outside, num_ranks)


@misconception(
    "held_by_rank",
    "You let context parallelism divide attention and the MLP alone. The stream is in parts all "
    "the way, norms and residuals included.",
    see=SEQUENCE,
)
def divides_the_inside_alone(method, parameters, inside, outside, num_ranks):
    if method == "context":
        return parameters, inside / num_ranks + outside
    return _held(method, parameters, inside, outside, num_ranks)


@misconception(
    "held_by_rank",
    "Tensor parallelism by itself leaves norms, dropout and residuals whole, on all ranks alike.",
    see=SEQUENCE,
)
def lets_tensor_divide_everything(method, parameters, inside, outside, num_ranks):
    held = _held(method, parameters, inside, outside, num_ranks)
    return held[0], (inside + outside) / num_ranks


@misconception(
    "held_by_rank",
    "You let sequence parallelism undo tensor parallelism: it comes on top, and what is inside "
    "stays divided.",
    see=SEQUENCE,
)
def lets_sp_divide_the_outside_alone(method, parameters, inside, outside, num_ranks):
    if method == "tensor and sequence":
        return parameters / num_ranks, inside + outside / num_ranks
    return _held(method, parameters, inside, outside, num_ranks)


@misconception(
    "held_by_rank",
    "You copy all parameters under sequence parallelism. It stands beside tensor parallelism, "
    "which divides them.",
    see=SEQUENCE,
)
def copies_parameters_under_sp(method, parameters, inside, outside, num_ranks):
    held = _held(method, parameters, inside, outside, num_ranks)
    return (parameters if method == "tensor and sequence" else held[0]), held[1]


@misconception(
    "held_by_rank",
    "You leave a context-parallel rank all activations, as if keys of the whole text were kept. "
    "They visit, and leave again.",
    see=SEQUENCE,
)
def keeps_all_activations(method, parameters, inside, outside, num_ranks):
    if method == "context":
        return parameters, inside + outside
    return _held(method, parameters, inside, outside, num_ranks)


@alternative("held_by_rank")
def held_by_table(method, parameters, inside, outside, num_ranks):
    n = num_ranks
    cut_parameters, cut_outside = {
        "tensor": (n, 1), "tensor and sequence": (n, n), "context": (1, n)
    }[method]  # fmt: skip
    return parameters / cut_parameters, inside / n + outside / cut_outside


@alternative("held_by_rank")
def held_by_words(method, parameters, inside, outside, num_ranks):
    has_text_divided = method.endswith(("sequence", "context"))
    outside = outside / num_ranks if has_text_divided else outside
    matrices = parameters / num_ranks if method.startswith("tensor") else parameters
    return [matrices, inside / num_ranks + outside]


# ring_attention_backward


def _tile(q, here, lse, total, grad):
    """dq, and dk beside dv, of the keys that visit."""
    keys, values = here.chunk(2, 1)
    scale = 1 / math.sqrt(q.shape[1])
    p = (q @ keys.T * scale - lse[:, None]).exp()
    ds = p * (grad @ values.T - total) * scale
    return ds @ keys, torch.cat([ds.T @ q, p.T @ grad], 1)


def _ring_backward(comm, q, k, v, out, lse, grad, *, hops=0, total=None, tile=_tile):
    total = (grad * out).sum(1, keepdim=True) if total is None else total
    dq, here, behind = torch.zeros_like(q), torch.cat([k, v], 1), None
    for step in range(comm.size):
        arriving, handles = _exchange(comm, here) if step + 1 < comm.size else (here, [])
        part, own = tile(q, here, lse, total, grad)
        dq += part
        if behind is not None:
            for handle in behind[1]:
                handle.wait()
            own += behind[0]
        is_sent = step + 1 < comm.size + hops and comm.size > 1
        behind = None
        behind = _exchange(comm, own, 1) if is_sent else (own, [])
        for handle in handles:
            handle.wait()
        here, handles, arriving = arriving, None, None
    for handle in behind[1]:
        handle.wait()
    return dq, *behind[0].chunk(2, 1)


@misconception(
    "ring_attention_backward",
    "dk and dv are what this rank's queries say about its own keys. All ranks' queries have seen "
    "them.",
    see=RING,
)
def keeps_its_own_gradients(comm, q, k, v, out, lse, grad):
    total = (grad * out).sum(1, keepdim=True)
    dq, _, _ = _ring_backward(comm, q, k, v, out, lse, grad, hops=1)
    _, own = _tile(q, torch.cat([k, v], 1), lse, total, grad)
    return dq, *own.chunk(2, 1)


@misconception(
    "ring_attention_backward",
    "Gradients stop one step from home: after N - 1 steps they stand at the previous rank, and you "
    "return those of another's keys.",
    see=RING,
)
def stops_one_step_from_home(comm, q, k, v, out, lse, grad):
    return _ring_backward(comm, q, k, v, out, lse, grad)


@misconception(
    "ring_attention_backward",
    "You normalize each part by itself: P = softmax of its scores. With the log-sum-exp of all "
    "keys a part's probabilities add up to less than 1, as they must.",
    see=RING,
)
def normalizes_each_part(comm, q, k, v, out, lse, grad):
    def tile(q, here, lse, total, grad):
        scores = q @ here.chunk(2, 1)[0].T / math.sqrt(q.shape[1])
        return _tile(q, here, scores.logsumexp(1), total, grad)

    return _ring_backward(comm, q, k, v, out, lse, grad, hops=1, tile=tile)


@misconception(
    "ring_attention_backward",
    "D = rowsum(grad * out) is missing: softmax's derivative subtracts it from each row.",
    see=RING,
)
def forgets_d(comm, q, k, v, out, lse, grad):
    zero = torch.zeros_like(lse)[:, None]
    return _ring_backward(comm, q, k, v, out, lse, grad, hops=1, total=zero)


@misconception(
    "ring_attention_backward",
    "You gather keys and values and all-reduce their gradients: right, and every rank holds the "
    "whole text's, twice.",
    see=RING,
)
def gathers_and_reduces(comm, q, k, v, out, lse, grad):
    whole = comm.all_gather(torch.cat([k, v], 1))
    total = (grad * out).sum(1, keepdim=True)
    dq, gradients = _tile(q, whole, lse, total, grad)
    mine = comm.all_reduce(gradients).chunk(comm.size)[comm.rank]
    return dq, *mine.chunk(2, 1)


@misconception(
    "ring_attention_backward",
    "dq is that of the last part alone: it is a sum over all steps.",
    see=RING,
)
def keeps_the_last_dq(comm, q, k, v, out, lse, grad):
    found = []

    def tile(q, here, lse, total, grad):
        dq, own = _tile(q, here, lse, total, grad)
        found[:] = [dq]
        return dq, own

    _, dk, dv = _ring_backward(comm, q, k, v, out, lse, grad, hops=1, tile=tile)
    return found[0], dk, dv


@alternative("ring_attention_backward")
def backward_with_gradients_sent_home(comm, q, k, v, out, lse, grad):
    """No second ring: each part's gradients go to their owner directly."""
    n, total = comm.size, (grad * out).sum(1, keepdim=True)
    here = torch.cat([k, v], 1)
    dq, mine = _tile(q, here, lse, total, grad)
    for step in range(1, n):
        arriving, handles = _exchange(comm, here)
        for handle in handles:
            handle.wait()
        here, handles, arriving = arriving, None, None
        part, own = _tile(q, here, lse, total, grad)
        dq = dq + part
        theirs, handles = _exchange(comm, own, tag=1, towards=-step)
        for handle in handles:
            handle.wait()
        mine = mine + theirs
        handles, theirs, own = None, None, None
    return dq, *mine.chunk(2, 1)


@alternative("ring_attention_backward")
def backward_in_one_ring(comm, q, k, v, out, lse, grad):
    """Keys, values and their gradients as one message; after the last step gradients alone."""
    total, dq = (grad * out).sum(1, keepdim=True), torch.zeros_like(q)
    here, gradients = torch.cat([k, v], 1), torch.cat([k, v], 1) * 0
    width = here.shape[1]
    for step in range(comm.size):
        part, own = _tile(q, here, lse, total, grad)
        dq, gradients = dq + part, gradients + own
        if comm.size == 1:
            break
        is_last = step + 1 == comm.size
        packed = gradients if is_last else torch.cat([here, gradients], 1)
        arriving, handles = _exchange(comm, packed)
        here = gradients = own = None
        for handle in handles:
            handle.wait()
        packed = handles = None
        if is_last:
            gradients = arriving
        else:
            here, gradients = arriving[:, :width].clone(), arriving[:, width:].clone()
        arriving = None
    return dq, *gradients.chunk(2, 1)


@misconception(
    "ulysses_attention",
    "You gather all keys and values. The result is right, and with many key/value heads it costs "
    "far more than exchanging positions for heads.",
    see=TRANSPOSE,
)
def gathers_keys_and_values(comm, q, k, v):
    keys, values = comm.all_gather(k), comm.all_gather(v)
    t = q.shape[0]
    mask = torch.ones(t, keys.shape[0], dtype=torch.bool).tril(comm.rank * t)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, keys, values))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


@misconception(
    "zigzag_batch",
    "Your targets are the inputs: a model learns to repeat the token that it sees.",
    see=MODEL,
)
def predicts_what_it_sees(tokens, rank, num_ranks):
    parts = torch.arange(tokens.shape[1] - 1).chunk(2 * num_ranks)
    positions = torch.cat([parts[rank], parts[2 * num_ranks - 1 - rank]])
    return tokens[:, positions], tokens[:, positions], positions


@misconception(
    "causal_work",
    "You divide all pairs equally. The total is right; ranks have different shares of it.",
    see=BALANCE,
)
def divides_all_pairs_equally(layout, seq_len, rank, num_ranks):
    return seq_len * (seq_len + 1) // 2 // num_ranks


@misconception(
    "context_bytes",
    "Under Ulysses a rank keeps its own part of each tensor: (N - 1)/N of it leaves.",
    see=LIMITS,
)
def sends_its_own_part_too(method, seq_len, dim, kv_dim, num_ranks):
    part = 2 * seq_len / num_ranks
    if method == "ulysses":
        return part * (2 * dim + 2 * kv_dim)
    return part * (num_ranks - 1) * 2 * (dim if method == "tensor" else kv_dim)
