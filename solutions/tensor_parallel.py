"""Chapter 13: tensor and sequence parallelism."""

import torch

from reference.parallel.ranks import CLASSROOM, run


def parallel_mlp(comm, x, w1, w2, grad_y):
    """Forward and backward of y = relu(x W1^T) W2^T, each rank with its part of the hidden width.

    x: (B, D), the same on all ranks    w1: (F, D), w2: (D, F), whole: compute with your part alone
    grad_y: (B, D), of y, the same on all ranks
    returns (y, grad_x, grad_w1, grad_w2): y and grad_x (B, D), whole, on all ranks; gradients of
    this rank's parts, (F / N, D) and (D, F / N): hidden units rank F/N to (rank + 1) F/N

    Two collectives are enough: one on the way forward, one on the way back.

    Source: Megatron-LM, arXiv 1909.08053, sec. 3.
    """
    # BEGIN SOLUTION
    w1, w2 = w1.chunk(comm.size)[comm.rank], w2.chunk(comm.size, 1)[comm.rank]
    hidden = (x @ w1.T).relu()
    y = comm.all_reduce(hidden @ w2.T)
    grad_hidden = (grad_y @ w2) * (hidden > 0)
    grad_x = comm.all_reduce(grad_hidden @ w1)
    return y, grad_x, grad_hidden.T @ x, grad_y.T @ hidden
    # END SOLUTION


def run_parallel_mlp(x, w1, w2, grad_y, num_ranks):
    """Call parallel_mlp on simulated ranks. Given: do not change.

    returns a dict of lists, one entry a rank: outputs, grad_x, grad_w1, grad_w2, calls (of
    collectives), sent (bytes)
    """

    def program(comm):
        given = [t.clone() for t in (x, w1, w2, grad_y)]
        found = parallel_mlp(comm, *given)
        total = comm.traffic.total()
        return *(t.clone() for t in found), total.num_calls, total.wire_bytes

    done = run(num_ranks, program, is_measured=False).results
    names = ("outputs", "grad_x", "grad_w1", "grad_w2", "calls", "sent")
    return {name: [result[i] for result in done] for i, name in enumerate(names)}


def row_parallel_linear(comm, x, weight, bias):
    """A linear layer cut by inputs: y = x W^T + b, on all ranks.

    x: (B, D / N), this rank's part of the inputs    weight: (F, D / N), the columns for them
    bias: (F,), whole, the same on all ranks
    returns (B, F), whole, the same on all ranks

    The program that stands here passed its test, on one rank.
    """
    # BEGIN SOLUTION
    return comm.all_reduce(x @ weight.T) + bias
    # STARTER
    # | return comm.all_reduce(x @ weight.T + bias)
    # END SOLUTION


def run_row_parallel_linear(x, weight, bias, num_ranks):
    """Call row_parallel_linear on simulated ranks. Given: do not change.

    returns a list of outputs, one a rank
    """

    def program(comm):
        parts = x.chunk(comm.size, 1)[comm.rank], weight.chunk(comm.size, 1)[comm.rank]
        return row_parallel_linear(comm, *(p.clone() for p in parts), bias.clone()).clone()

    return run(num_ranks, program, is_measured=False).results


def heads_of_rank(rank, world_size, num_heads, num_kv_heads):
    """Which heads of grouped-query attention a rank computes.

    Query head i uses key/value head i // (num_heads / num_kv_heads). Ranks take query heads in
    order, equally many each; world_size divides num_heads, and divides num_kv_heads or is divided
    by it.
    returns (query_heads, kv_heads): two lists of integers; of key/value heads those that the rank's
    queries use, each once
    """
    # BEGIN SOLUTION
    share, group = num_heads // world_size, num_heads // num_kv_heads
    queries = list(range(rank * share, (rank + 1) * share))
    return queries, sorted({head // group for head in queries})
    # END SOLUTION


def vocab_parallel_loss(comm, logits, targets):
    """Cross-entropy from logits of which each rank has a part of the vocabulary.

    logits: (B, V / N), tokens rank V/N to (rank + 1) V/N - 1    targets: (B,), ids from 0 to V - 1
    returns (B,): log(sum over v of exp(z_v)) - z_target, on all ranks

    Logits may be larger than exp can take. Of each row at most three numbers may travel in
    all-reduces, whatever V is.

    Source: Megatron-LM, arXiv 1909.08053, sec. 3.
    """
    # BEGIN SOLUTION
    count = logits.shape[1]
    highest = comm.all_reduce(logits.amax(1), "max")
    here = targets - comm.rank * count
    inside = (here >= 0) & (here < count)
    picked = logits.gather(1, torch.where(inside, here, 0)[:, None])[:, 0] * inside
    sums = comm.all_reduce(torch.stack([(logits - highest[:, None]).exp().sum(1), picked]))
    return sums[0].log() + highest - sums[1]
    # END SOLUTION


def run_vocab_parallel_loss(logits, targets, num_ranks):
    """Call vocab_parallel_loss on simulated ranks. Given: do not change.

    returns a dict of lists, one entry a rank: losses, payload (numbers in collectives)
    """

    def program(comm):
        part = logits.chunk(comm.size, 1)[comm.rank].clone()
        loss = vocab_parallel_loss(comm, part, targets.clone())
        return loss.clone(), comm.traffic.total().payload_bytes / logits.element_size()

    done = run(num_ranks, program, is_measured=False).results
    return {name: [result[i] for result in done] for i, name in enumerate(("losses", "payload"))}


def dropout_seed(seed, dp_rank, tp_rank, tp_size, region):
    """The seed of a rank's dropout in one region of the model, so that masks agree where they must.

    dp_rank: which rows of the batch; tp_rank: which part of the model, 0 to tp_size - 1
    region: "stream": activations that all tensor-parallel ranks of the same rows hold alike
            "heads": attention weights, of which each has its own heads
            "positions": the stream under sequence parallelism, where each has its own positions
    returns an integer of 0 or more

    Ranks that hold the same numbers need the same mask; all others, and other regions, must not
    share one. Seeds of different runs, `seed` and `seed + 1`, may overlap.
    """
    # BEGIN SOLUTION
    kind = ("stream", "heads", "positions").index(region)
    part = 0 if region == "stream" else tp_rank
    return seed + 1_000_003 * ((dp_rank * tp_size + part) * 3 + kind)
    # STARTER
    # | return seed
    # END SOLUTION


def sequence_parallel_sublayer(comm, x, norm, inner):
    """y = x + inner(norm(x)), where each rank has its own positions of x and its own part of inner.

    x: (T / N, D), positions rank T/N to (rank + 1) T/N
    norm: norm(x) normalizes each position by itself, and keeps the shape
    inner: inner(h) takes (T, D), all positions, and returns (T, D): this rank's summand of the
    result. Attention and a parallel MLP both are such functions.
    returns (T / N, D), this rank's positions of y

    One all-gather and one reduce-scatter travel, no more; and nobody normalizes another rank's
    positions.

    Source: Korthikanti et al., arXiv 2205.05198, sec. 4.2.2.
    """
    # BEGIN SOLUTION
    return x + comm.reduce_scatter(inner(comm.all_gather(norm(x))))
    # END SOLUTION


def run_sequence_parallel_sublayer(x, weight, mixes):
    """Call sequence_parallel_sublayer on simulated ranks, one for each of `mixes`, (T, T): inner is
    mixes[rank] @ h, norm an RMSNorm with `weight`, (D,). Given: do not change.

    returns a dict of lists, one entry a rank: outputs, sent (bytes), calls (of collectives), inputs
    and normed (positions that inner and norm were called with)
    """

    def program(comm):
        rows, normed = [], []

        def norm(h):
            normed.append(len(h))
            return torch.nn.functional.rms_norm(h, (h.shape[1],), weight, 1e-6)

        def inner(h):
            rows.append(len(h))
            return mixes[comm.rank][: len(h), : len(h)] @ h

        part = x.chunk(comm.size)[comm.rank].clone()
        y = sequence_parallel_sublayer(comm, part, norm, inner)
        total = comm.traffic.total()
        return y.clone(), total.wire_bytes, total.num_calls, rows, normed

    done = run(len(mixes), program, is_measured=False).results
    names = ("outputs", "sent", "calls", "inputs", "normed")
    return {name: [result[i] for result in done] for i, name in enumerate(names)}


def tensor_parallel_bytes(batch, seq_len, dim, num_layers, num_ranks, sequence_parallel):
    """Bytes that one rank sends in the layers of one training step, activations in 16 bits.

    A layer has two parallel regions, attention and MLP. Collectives are rings; nothing is
    recomputed; embedding and head are left out.
    returns a number

    Source: Narayanan et al., arXiv 2104.04473, sec. 3.2.
    """
    # BEGIN SOLUTION
    all_reduce = 2 * (num_ranks - 1) / num_ranks * 2 * batch * seq_len * dim
    return num_layers * 4 * all_reduce
    # END SOLUTION


def matmul_reduce_scatter(comm, x, weight):
    """The end of a row-parallel layer under sequence parallelism, computing while sums travel.

    x: (T, f), this rank's part of the inputs, all positions    weight: (D, f)
    returns (T / N, D): this rank's positions of the sum over ranks of x W^T

    As in a ring's reduce-scatter, N - 1 steps: a part of the positions leaves for the next rank,
    one arrives from the previous, and this rank's product for the part that arrives is added. But
    nothing says that all products must be there before the first part leaves.
    comm.isend(t, dst) and comm.irecv(t, src) return handles at once.

    No rank may send more than (N - 1)/N of T D numbers, in isend alone.
    """
    # BEGIN SOLUTION
    n, parts = comm.size, x.chunk(comm.size)
    total = parts[(comm.rank - 1) % n] @ weight.T
    for step in range(1, n):
        arriving = torch.empty_like(total)
        handles = [
            comm.isend(total, (comm.rank + 1) % n),
            comm.irecv(arriving, (comm.rank - 1) % n),
        ]
        own = parts[(comm.rank - 1 - step) % n] @ weight.T
        for handle in handles:
            handle.wait()
        total = arriving + own
    return total
    # END SOLUTION


def run_matmul_reduce_scatter(xs, weights):
    """Call matmul_reduce_scatter on simulated ranks, one for each of `xs`. Given: do not change.

    returns a dict of lists, one entry a rank: outputs, sent (bytes), collectives (calls of anything
    but send and recv), seconds (on the virtual clock)
    """

    def program(comm):
        y = matmul_reduce_scatter(comm, xs[comm.rank].clone(), weights[comm.rank].clone())
        total = comm.traffic.total()
        messages = [comm.traffic.total(operation=o).num_calls for o in ("send", "recv")]
        return y.clone(), total.wire_bytes, total.num_calls - sum(messages), comm.now_seconds

    done = run(len(xs), program, hardware=CLASSROOM).results
    names = ("outputs", "sent", "collectives", "seconds")
    return {name: [result[i] for result in done] for i, name in enumerate(names)}
