"""Chapter 14: context parallelism."""

import math

import torch
import torch.nn.functional as F

from reference.parallel.ranks import CLASSROOM, run


def ulysses_attention(comm, q, k, v):
    """Causal attention over the whole text by two changes of layout, as in DeepSpeed-Ulysses.

    q: (t, H, d), this rank's positions rank t to (rank + 1) t, all heads
    k, v: (t, K, d); query head i uses key/value head i // (H / K)
    returns (t, H, d), this rank's positions of softmax(q k^T / sqrt(d)) v over all N t positions

    N divides H, and divides K or is divided by it. Attend with
    F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), which takes
    (1, heads, positions, d). comm.all_to_all(x) divides dimension 0 in N parts, sends part j to
    rank j, and joins what comes in rank order. No rank may send more numbers than (N - 1)/N of its
    q, of its output, and of k and v with N heads each where they have fewer.

    Source: Jacobs et al., arXiv 2309.14509, sec. 3.
    """
    # BEGIN SOLUTION
    n = comm.size

    def to_heads(x):  # (t, H, d) -> (T, H / N, d)
        by_rank = x.unflatten(1, (n, -1)).transpose(0, 1).contiguous()
        return comm.all_to_all(by_rank).flatten(0, 1)

    copies = max(1, n // k.shape[1])
    k, v = (x.repeat_interleave(copies, 1) for x in (k, v))
    q, k, v = (to_heads(x).transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    parts = comm.all_to_all(out[0].transpose(0, 1).unflatten(0, (n, -1)).contiguous())
    return parts.transpose(0, 1).flatten(1, 2)
    # END SOLUTION


def run_ulysses_attention(q, k, v, num_ranks):
    """Call ulysses_attention on simulated ranks, with whole (T, heads, d) tensors divided over
    them. Given: do not change.

    returns a dict of lists, one entry a rank: outputs, sent (numbers)
    """

    def program(comm):
        parts = [x.chunk(comm.size)[comm.rank].clone() for x in (q, k, v)]
        out = ulysses_attention(comm, *parts)
        return out.clone(), comm.traffic.total().wire_bytes / q.element_size()

    done = run(num_ranks, program, is_measured=False).results
    return {name: [result[i] for result in done] for i, name in enumerate(("outputs", "sent"))}


def ring_attention(comm, q, k, v):
    """Attention over the whole text, without a mask, while keys and values go round a ring.

    q, k, v: (t, d), this rank's positions, one head; T = N t in all
    returns (out, lse): out (t, d) = softmax(S) V for this rank's queries, S = q K^T / sqrt(d) over
    all T keys; lse (t,) = log(sum(exp(S))), which backward will need

    Scores may be larger than exp can take. Only messages: comm.isend(x, dst) and
    comm.irecv(out, src) return handles at once; `handle.wait()`, and then what was sent may be
    overwritten and what was received read. Send each key and value at most N - 1 times, hold no
    more than a few ranks' keys at a time, and attend while the next ones travel.

    Source: Liu et al., arXiv 2310.01889, alg. 1.
    """
    # BEGIN SOLUTION
    here = torch.cat([k, v], 1)
    out, lse = torch.zeros_like(q), q.new_full((len(q),), -math.inf)
    for step in range(comm.size):
        handles, arriving = [], here
        if step + 1 < comm.size:
            arriving = torch.empty_like(here)
            handles = [
                comm.isend(here, (comm.rank + 1) % comm.size),
                comm.irecv(arriving, (comm.rank - 1) % comm.size),
            ]
        keys, values = here.chunk(2, 1)
        scores = q @ keys.T / math.sqrt(q.shape[1])
        part_lse = scores.logsumexp(1)
        part = (scores - part_lse[:, None]).exp() @ values
        total = torch.logaddexp(lse, part_lse)
        out = out * (lse - total).exp()[:, None] + part * (part_lse - total).exp()[:, None]
        lse = total
        for handle in handles:
            handle.wait()
        here = arriving
    return out, lse
    # END SOLUTION


def run_ring_attention(q, k, v, num_ranks):
    """Call ring_attention on simulated ranks, with whole (T, d) tensors divided over them. Given:
    do not change.

    returns a dict of lists, one entry a rank: outputs, lses, sent (bytes), collectives (calls of
    anything but send and recv), peak (bytes held at most, beside q, k and v), seconds (on the
    virtual clock)
    """

    def program(comm):
        parts = [x.chunk(comm.size)[comm.rank].clone() for x in (q, k, v)]
        before = comm.memory.use.current_bytes
        out, lse = ring_attention(comm, *parts)
        peak, seconds, total = comm.memory.use.peak_bytes, comm.now_seconds, comm.traffic.total()
        messages = [comm.traffic.total(operation=o).num_calls for o in ("send", "recv")]
        return (
            out.clone(), lse.clone(), total.wire_bytes, total.num_calls - sum(messages),
            peak - before, seconds,
        )  # fmt: skip

    done = run(num_ranks, program, hardware=CLASSROOM).results
    names = ("outputs", "lses", "sent", "collectives", "peak", "seconds")
    return {name: [result[i] for result in done] for i, name in enumerate(names)}


def zigzag_batch(tokens, rank, num_ranks):
    """What rank `rank` trains on, of texts divided in zigzag.

    tokens: (B, T + 1); the model sees the first T, and at each predicts the next one. These T
    positions are cut in 2 N equal parts; rank r has parts r and 2 N - 1 - r, in this order.
    returns (inputs, targets, positions): (B, T / N), (B, T / N) and (T / N,): the tokens, those
    that follow them in the text, and the places in the text by which RoPE turns

    The program that stands here trains without an error, on one rank even rightly.
    """
    # BEGIN SOLUTION
    parts = torch.arange(tokens.shape[1] - 1).chunk(2 * num_ranks)
    positions = torch.cat([parts[rank], parts[2 * num_ranks - 1 - rank]])
    return tokens[:, positions], tokens[:, positions + 1], positions
    # STARTER
    # | parts = tokens[:, :-1].chunk(2 * num_ranks, 1)
    # | inputs = torch.cat([parts[rank], parts[2 * num_ranks - 1 - rank]], 1)
    # | targets = torch.cat([inputs[:, 1:], tokens[:, -1:]], 1)
    # | return inputs, targets, torch.arange(inputs.shape[1])
    # END SOLUTION


def context_mean(comm, losses, is_counted):
    """The mean loss of all ranks' counted tokens, and what it says about this rank's losses.

    losses: (t,), of this rank's tokens    is_counted: (t,), bool; padding is not counted
    returns (mean, weights): the mean over the counted tokens of all ranks together, a tensor of one
    number, the same on all; and its derivative with respect to this rank's losses, (t,). Both are
    zero where no rank counts any token.

    Ranks may count different numbers of tokens, some none.
    """
    # BEGIN SOLUTION
    counted = is_counted.to(losses.dtype)
    total = comm.all_reduce(torch.stack([(losses * counted).sum(), counted.sum()]))
    count = total[1].clamp(min=1)
    return total[0] / count, counted / count
    # STARTER
    # | counted = is_counted.to(losses.dtype)
    # | weights = counted / counted.sum()
    # | return comm.all_reduce((losses * weights).sum(), "mean"), weights / comm.size
    # END SOLUTION


def run_context_mean(losses, is_counted, num_ranks):
    """Call context_mean on simulated ranks, with (T,) tensors divided over them. Given: do not
    change.

    returns a dict of lists, one entry a rank: means, weights
    """

    def program(comm):
        parts = [x.chunk(comm.size)[comm.rank].clone() for x in (losses, is_counted)]
        mean, weights = context_mean(comm, *parts)
        return mean.clone().reshape(()), weights.clone()

    done = run(num_ranks, program, is_measured=False).results
    return {name: [result[i] for result in done] for i, name in enumerate(("means", "weights"))}


def usp_place(rank, num_ring, num_ulysses, seq_len, num_heads, num_kv_heads):
    """What a rank of a num_ring x num_ulysses grid has, outside of attention and inside it.

    Ranks are numbered along rows: rank 1 is rank 0's neighbour in a row, a group of num_ulysses
    ranks that exchange positions for heads by all-to-all. A column is a ring, of which each member
    keeps its queries. Positions are divided in rank order, contiguously; heads in order, as the
    all-to-all does. Query head i uses key/value head i // (num_heads / num_kv_heads).
    returns (before, inside, query_heads, kv_heads), four lists of integers: the positions that the
    rank has outside of attention; those of its queries inside; the query heads that it computes
    there; and the key/value heads that these use, each once

    Source: Fang and Zhao, arXiv 2405.07719.
    """
    # BEGIN SOLUTION
    row, column = divmod(rank, num_ulysses)
    part = seq_len // (num_ring * num_ulysses)
    share, group = num_heads // num_ulysses, num_heads // num_kv_heads
    before = list(range(rank * part, (rank + 1) * part))
    inside = list(range(row * part * num_ulysses, (row + 1) * part * num_ulysses))
    queries = list(range(column * share, (column + 1) * share))
    return before, inside, queries, sorted({head // group for head in queries})
    # END SOLUTION


def causal_work(layout, seq_len, rank, num_ranks):
    """How many pairs of a query and a key rank `rank` computes under a causal mask, all steps of
    the ring together.

    A query sees its own position and all before it. The rank's queries are
    "contiguous"  rank T/N to (rank + 1) T/N
    "zigzag"      parts rank and 2 N - 1 - rank of 2 N
    "striped"     rank, rank + N, rank + 2 N, ...
    returns a whole number
    """
    # BEGIN SOLUTION
    size = seq_len // num_ranks
    if layout == "contiguous":
        mine = range(rank * size, (rank + 1) * size)
    elif layout == "striped":
        mine = range(rank, seq_len, num_ranks)
    else:
        half, last = size // 2, 2 * num_ranks - 1 - rank
        mine = [*range(rank * half, (rank + 1) * half), *range(last * half, (last + 1) * half)]
    return sum(position + 1 for position in mine)
    # END SOLUTION


def context_bytes(method, seq_len, dim, kv_dim, num_ranks):
    """Bytes that one rank sends for the attention of one layer, forward, one row, in 16 bits.

    dim: width of all query heads, as of the output    kv_dim: width of all key heads, as of the
    values; at least as many heads as ranks
    method: "ulysses"   all-to-all of q, k, v and the output
            "ring"      keys and values go round
            "gathered"  all-gather of keys and values, a ring
            "tensor"    Megatron: all-gather of attention's input, of width dim, and reduce-scatter
                        of its output, both rings
    returns a number

    Sources: arXiv 2309.14509, sec. 3.2; arXiv 2310.01889, sec. 3.
    """
    # BEGIN SOLUTION
    part = 2 * seq_len / num_ranks * (num_ranks - 1)
    if method == "ulysses":
        return part * (2 * dim + 2 * kv_dim) / num_ranks
    return part * 2 * (dim if method == "tensor" else kv_dim)
    # END SOLUTION


def held_by_rank(method, parameters, inside, outside, num_ranks):
    """What one of num_ranks ranks holds of a layer, in bytes, given what one rank alone would.

    parameters: of the matrices
    inside: activations that attention and MLP keep, between their first and last matrix
    outside: activations that norms, dropout and residuals keep
    method: "tensor"               Megatron's tensor parallelism
            "tensor and sequence"  the same with Megatron's sequence parallelism
            "context"              context parallelism
    returns (parameters, activations), two numbers; communication buffers are left out
    """
    # BEGIN SOLUTION
    if method == "tensor":
        return parameters / num_ranks, inside / num_ranks + outside
    activations = (inside + outside) / num_ranks
    return (parameters if method == "context" else parameters / num_ranks), activations
    # END SOLUTION


def ring_attention_backward(comm, q, k, v, out, lse, grad):
    """Gradients of ring attention: keys and values go round again, and their gradients with them.

    q, k, v, out, grad: (t, d), this rank's positions; lse: (t,); as ring_attention took and gave
    them, and grad the gradient of out
    returns (dq, dk, dv), each (t, d), of this rank's positions, with what all ranks' queries say
    about its keys and values

    With S = q K^T / sqrt(d), P = exp(S - lse), D = rowsum(grad * out) and dS = P (grad V^T - D):
    dV = P^T grad, dK = dS^T q / sqrt(d), dQ = dS K / sqrt(d). Only messages, as in ring_attention;
    messages with different `tag=` are not taken for each other. No rank may send more than 2 N - 1
    times the size of its k and v, or hold the keys of more than a few ranks.

    Source: Liu et al., arXiv 2310.01889, app. A.
    """
    # BEGIN SOLUTION
    n, after, before = comm.size, (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    scale, total = 1 / math.sqrt(q.shape[1]), (grad * out).sum(1, keepdim=True)

    def pass_on(x, tag):
        arriving = torch.empty_like(x)
        return arriving, [comm.isend(x, after, tag=tag), comm.irecv(arriving, before, tag=tag)]

    dq, here, behind = torch.zeros_like(q), torch.cat([k, v], 1), None
    for step in range(n):
        arriving, handles = pass_on(here, 0) if step + 1 < n else (here, [])
        keys, values = here.chunk(2, 1)
        p = (q @ keys.T * scale - lse[:, None]).exp()
        ds = p * (grad @ values.T - total) * scale
        dq += ds @ keys
        gradients = torch.cat([ds.T @ q, p.T @ grad], 1)
        if behind is not None:
            for handle in behind[1]:
                handle.wait()
            gradients += behind[0]
        behind = pass_on(gradients, 1) if n > 1 else (gradients, [])
        for handle in handles:
            handle.wait()
        here, handles = arriving, None
    for handle in behind[1]:
        handle.wait()
    return dq, *behind[0].chunk(2, 1)
    # END SOLUTION


def run_ring_attention_backward(q, k, v, grad, num_ranks):
    """Call ring_attention_backward on simulated ranks, with whole (T, d) tensors divided over them.
    Given: do not change.

    returns a dict of lists, one entry a rank: dq, dk, dv, sent (bytes), collectives (calls of
    anything but send and recv), peak (bytes held at most, beside the inputs)
    """
    scores = q @ k.T / math.sqrt(q.shape[1])
    lse, out = scores.logsumexp(1), scores.softmax(1) @ v

    def program(comm):
        given = (q, k, v, out, lse, grad)
        parts = [x.chunk(comm.size)[comm.rank].clone() for x in given]
        before = comm.memory.use.current_bytes
        gradients = ring_attention_backward(comm, *parts)
        peak, total = comm.memory.use.peak_bytes, comm.traffic.total()
        messages = [comm.traffic.total(operation=o).num_calls for o in ("send", "recv")]
        return (
            *(x.clone() for x in gradients), total.wire_bytes, total.num_calls - sum(messages),
            peak - before,
        )  # fmt: skip

    done = run(num_ranks, program).results
    names = ("dq", "dk", "dv", "sent", "collectives", "peak")
    return {name: [result[i] for result in done] for i, name in enumerate(names)}
