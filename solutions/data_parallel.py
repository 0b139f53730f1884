"""Chapter 11: collectives and data parallelism."""

import math

import torch

from reference.parallel.ranks import CLASSROOM, run


def ring_all_reduce(comm, parts):
    """All-reduce a list of tensors round a ring, out of messages alone.

    parts: a list of comm.size tensors of any shapes, the same shapes on all ranks
    returns a list of the same shapes: sums over all ranks; leaves `parts` as they are

    2 (N-1) steps. In each a rank sends one part to the next rank, (rank + 1) % N, and receives one
    from the previous. In the first N-1 steps what arrives is added to, in the others it is kept.
    Use comm.isend(tensor, dst), which gives a handle to wait for, and comm.recv(tensor, src), which
    fills `tensor`. A comm.send waits until the other side receives: if all ranks send first, none
    does.

    Source: Patarasuk and Yuan, J. Parallel Distrib. Comput. 69 (2009) 117-124.
    """
    # BEGIN SOLUTION
    n, parts = comm.size, [part.clone() for part in parts]
    for step in range(2 * (n - 1)):
        leaving = parts[(comm.rank - step) % n]
        own = parts[(comm.rank - step - 1) % n]
        sending = comm.isend(leaving, (comm.rank + 1) % n)
        arriving = comm.recv(torch.empty_like(own), (comm.rank - 1) % n)
        sending.wait()
        own.copy_(own + arriving if step < n - 1 else arriving)
    return parts
    # END SOLUTION


def run_ring_all_reduce(parts_of_ranks):
    """Call ring_all_reduce on simulated ranks, one for each list. Given: do not change.

    returns a dict: parts (a list for each rank), sent (bytes, by rank), collectives (calls of
    anything but send and recv), seconds (on the virtual clock, of the slowest rank)
    """

    def program(comm):
        given = [part.clone() for part in parts_of_ranks[comm.rank]]
        found = ring_all_reduce(comm, given)
        calls = comm.traffic.total().num_calls - sum(
            comm.traffic.total(operation=o).num_calls for o in ("send", "recv")
        )
        return [part.clone() for part in found], comm.traffic.total().wire_bytes, calls

    done = run(len(parts_of_ranks), program, hardware=CLASSROOM, is_measured=False)
    names = ("parts", "sent", "collectives")
    found = {name: [result[i] for result in done.results] for i, name in enumerate(names)}
    return found | {"seconds": done.trace.seconds}


def all_reduce_seconds(algorithm, world_size, num_bytes, latency_seconds, bytes_per_second):
    """How long an all-reduce takes by the alpha-beta model.

    algorithm: "star", "tree", "ring" or "gossip"    world_size: N    num_bytes: B, of the tensor
    returns seconds

    A message of n bytes takes latency + n / bandwidth; messages between different pairs run side by
    side, those of one rank after each other, unless one is sent while another is received.

    star: rank 0 receives the tensor of each other rank in turn, then sends the sum to each in turn
    tree: pairs, then pairs of pairs, up to rank 0, each step with whole tensors; then back down
    ring: N parts, N-1 steps that add and N-1 that copy
    gossip: whole tensors go round the ring until each rank has all; each adds for itself
    """
    # BEGIN SOLUTION
    n, levels = world_size, math.ceil(math.log2(world_size))
    steps, size = {
        "star": (2 * (n - 1), num_bytes),
        "tree": (2 * levels, num_bytes),
        "ring": (2 * (n - 1), num_bytes / n),
        "gossip": (n - 1, num_bytes),
    }[algorithm]
    return steps * (latency_seconds + size / bytes_per_second)
    # END SOLUTION


def place_of_rank(rank, world_size, gpus_per_node, num_rows):
    """Where a rank computes, and on what: its GPU's number on its node, and its rows of the data.

    rank: the global rank, 0 to world_size - 1    num_rows: rows 0 to num_rows - 1
    returns (gpu, rows): an integer, and a list of integers: rank, rank + N, rank + 2N, ...

    Ranks fill the nodes in order. All ranks together take each row once; the last round may be
    incomplete. The program that stands here did well on one node. On the second, CUDA reported an
    invalid device; whoever then mended that line trained on half of the data.
    """
    # BEGIN SOLUTION
    return rank % gpus_per_node, list(range(rank, num_rows, world_size))
    # STARTER
    # | local_rank = rank % gpus_per_node
    # | return rank, list(range(local_rank, num_rows, world_size))
    # END SOLUTION


def mean_gradient(comm, weight, rows, targets):
    """The gradient of the loss of all rows of all ranks, on every rank.

    weight: (D,) of this rank. Each rank drew its own; all are to compute with rank 0's.
    rows: (B, D), targets: (B,), this rank's. B may differ from rank to rank.
    returns (weight, gradient): rank 0's weight, and the gradient there of the mean over all rows of
    all ranks of (row . weight - target)^2; leaves the arguments as they are

    For B rows, the gradient of the sum is 2 rows^T (rows weight - targets). Besides the weight at
    the start, no rank may send more than an all-reduce of D + 1 numbers does.
    """
    # BEGIN SOLUTION
    weight = comm.broadcast(weight.clone(), src=0)
    total = 2 * rows.T @ (rows @ weight - targets)
    sums = comm.all_reduce(torch.cat([total, total.new_tensor([len(rows)])]))
    return weight, sums[:-1] / sums[-1]
    # END SOLUTION


def run_mean_gradient(weights, rows_of_ranks, targets_of_ranks):
    """Call mean_gradient on simulated ranks, one for each of `weights`. Given: do not change.

    returns a dict of lists, one entry a rank: weights, gradients, sent (bytes)
    """

    def program(comm):
        given = (weights, rows_of_ranks, targets_of_ranks)
        weight, gradient = mean_gradient(comm, *(of[comm.rank].clone() for of in given))
        return weight.clone(), gradient.clone(), comm.traffic.total().wire_bytes

    done = run(len(weights), program, is_measured=False).results
    names = ("weights", "gradients", "sent")
    return {name: [result[i] for result in done] for i, name in enumerate(names)}


def assign_buckets(sizes, bucket_bytes, first_bucket_bytes):
    """Which gradients travel together.

    sizes: bytes of each parameter's gradient, in the order in which forward uses the parameters
    returns a list of buckets, each a list of indices into `sizes`

    Backward makes gradients in the reverse order, and buckets are filled as they come. A bucket is
    closed as soon as it has reached its limit: first_bucket_bytes for the first, bucket_bytes for
    the others. The last one may remain below.

    Source: PyTorch Distributed, arXiv 2006.15704, sec. 3.2.3 and 4.2.
    """
    # BEGIN SOLUTION
    buckets, held, limit = [[]], 0, first_bucket_bytes
    for i in reversed(range(len(sizes))):
        if buckets[-1] and held >= limit:
            buckets.append([])
            held, limit = 0, bucket_bytes
        buckets[-1].append(i)
        held += sizes[i]
    return buckets
    # END SOLUTION


def overlapped_backward(comm, weights, inputs, grad):
    """Backward through a chain of linear layers, whose gradients travel while it goes on.

    weights: a list of (D, D), the same on all ranks; layer i computed y = x W^T
    inputs: a list of (B, D), this rank's input of each layer    grad: (B, D), of the last output
    returns a list of (D, D): for each layer the mean over ranks of dW = dy^T x

    From the last layer to the first: dW, then dx = dy W for the layer below (not for the first).
    comm.all_reduce(t, "mean", async_op=True) returns a handle at once; its wait() gives the result.
    One all-reduce a layer; nobody computes anything twice. What can the network do while a rank
    computes the next dx?
    """
    # BEGIN SOLUTION
    handles = []
    for i in reversed(range(len(weights))):
        handles.append(comm.all_reduce(grad.T @ inputs[i], "mean", async_op=True))
        if i > 0:
            grad = grad @ weights[i]
    return [handle.wait() for handle in reversed(handles)]
    # END SOLUTION


def run_overlapped_backward(weights, inputs_of_ranks, grads):
    """Call overlapped_backward on simulated ranks, one for each of `grads`. Given: do not change.

    returns a dict: gradients (a list for each rank), calls (of collectives) and seconds (virtual),
    by rank
    """

    def program(comm):
        given = [w.clone() for w in weights], [x.clone() for x in inputs_of_ranks[comm.rank]]
        found = overlapped_backward(comm, *given, grads[comm.rank].clone())
        return [g.clone() for g in found], comm.traffic.total().num_calls, comm.now_seconds

    done = run(len(grads), program, hardware=CLASSROOM).results
    names = ("gradients", "calls", "seconds")
    return {name: [result[i] for result in done] for i, name in enumerate(names)}


def accumulated_gradient(comm, gradient_of, micro_batches):
    """The mean gradient of several micro-batches on several ranks, for one optimizer step.

    gradient_of: gradient_of(batch) computes the gradient (P,) of this rank's micro-batch
    micro_batches: a list, as long on every rank
    returns (P,): the mean over all micro-batches of all ranks, the same on each

    A rank sends no more than one all-reduce of P elements, however many micro-batches there are.
    """
    # BEGIN SOLUTION
    total = sum(gradient_of(batch) for batch in micro_batches)
    return comm.all_reduce(total / len(micro_batches), "mean")
    # END SOLUTION


def run_accumulated_gradient(gradients_of_ranks):
    """Call accumulated_gradient on simulated ranks. Given: do not change.

    gradients_of_ranks: for each rank (m, P), the gradients of its micro-batches
    returns a dict of lists, one entry a rank: gradients, sent (bytes)
    """

    def program(comm):
        mine = gradients_of_ranks[comm.rank]
        found = accumulated_gradient(comm, lambda i: mine[i].clone(), list(range(len(mine))))
        return found.clone(), comm.traffic.total().wire_bytes

    done = run(len(gradients_of_ranks), program, is_measured=False).results
    return {name: [result[i] for result in done] for i, name in enumerate(("gradients", "sent"))}


def batch_statistics(comm, x):
    """Mean and variance of each channel over the rows of all ranks, for batch normalization.

    x: (B, C), this rank's rows, at least one. B may differ from rank to rank
    returns (mean, var), (C,) each in the dtype of x: over all rows of all ranks; var divides by the
    number of rows

    Three collectives at most (one can do), and what a rank sends does not grow with its rows. Rows
    may lie far from zero: of float32 rows with a mean of 1000 and a variance of 0.01, the variance
    is still right to 1 %. The program that stands here gives each rank the same two vectors, and
    they are not those of the whole batch.
    """
    # BEGIN SOLUTION
    mean = x.mean(0)
    mine = torch.cat([mean, (x - mean).square().sum(0), x.new_tensor([len(x)])])
    gathered = comm.all_gather(mine[None])  # (ranks, 2 C + 1)
    means, squares, counts = gathered.split([len(mean), len(mean), 1], 1)
    mean = (counts * means).sum(0) / counts.sum()
    return mean, (squares + counts * (means - mean).square()).sum(0) / counts.sum()
    # STARTER
    # | mean = comm.all_reduce(x.mean(0), "mean")
    # | var = comm.all_reduce(x.var(0, unbiased=False), "mean")
    # | return mean, var
    # END SOLUTION


def run_batch_statistics(rows_of_ranks):
    """Call batch_statistics on simulated ranks, one for each of the (B, C). Given: do not change.

    returns a dict of lists, one entry a rank: means, vars, calls (of collectives), sent (bytes)
    """

    def program(comm):
        mean, var = batch_statistics(comm, rows_of_ranks[comm.rank].clone())
        traffic = comm.traffic.total()
        return mean.clone(), var.clone(), traffic.num_calls, traffic.wire_bytes

    done = run(len(rows_of_ranks), program, is_measured=False).results
    names = ("means", "vars", "calls", "sent")
    return {name: [result[i] for result in done] for i, name in enumerate(names)}


def train_until_all_are_done(comm, weight, gradients, lr):
    """SGD on ranks that have different numbers of batches; nobody waits for ever, no data is lost.

    weight: (D,), the same on all ranks
    gradients: a list of (D,), this rank's gradient for each of its batches, perhaps none. (So that
    you can see what goes on, a batch's gradient does not depend on the weight here.)
    returns (weight, num_steps): (D,), the same on all ranks, and the number of steps of the rank
    that has the most batches; leaves the arguments as they are

    In step i, those ranks that have a batch number i contribute; the update is
    weight - lr * mean over those ranks, and every rank makes it.
    """
    # BEGIN SOLUTION
    num_steps = 0
    while True:
        has_batch = num_steps < len(gradients)
        mine = gradients[num_steps] if has_batch else torch.zeros_like(weight)
        sums = comm.all_reduce(torch.cat([mine, mine.new_tensor([float(has_batch)])]))
        if sums[-1] == 0:
            return weight, num_steps
        weight = weight - lr * sums[:-1] / sums[-1]
        num_steps += 1
    # END SOLUTION


def run_train_until_all_are_done(weight, gradients_of_ranks, lr):
    """Call train_until_all_are_done on simulated ranks. Given: do not change.

    returns a dict of lists, one entry a rank: weights, steps
    """

    def program(comm):
        mine = [gradient.clone() for gradient in gradients_of_ranks[comm.rank]]
        found, num_steps = train_until_all_are_done(comm, weight.clone(), mine, lr)
        return found.clone(), num_steps

    done = run(len(gradients_of_ranks), program, is_measured=False).results
    return {name: [result[i] for result in done] for i, name in enumerate(("weights", "steps"))}
