"""Chapter 11: wrong answers that people give, and right ones in another form."""

import itertools
import math

import torch

from autograder import alternative, misconception
from reference.parallel.data_parallel import (
    gossip_all_reduce,
    ring_all_gather,
    star_all_reduce,
    tree_all_reduce,
)

NAMES = "2. Names"
MESSAGES = "4. All-reduce from messages"
COST = "5. What it costs"
DATA_PARALLEL = "6. Data parallelism"
OVERLAP = "7. Hooks and overlap"
BUCKETS = "8. Buckets"
ACCUMULATION = "9. Accumulation"
BATCH_NORM = "11. Buffers and batch normalization"
UNEVEN = "12. Uneven inputs"


# ring_all_reduce


def _round(comm, parts, is_added, first=0, *, in_place=False):
    """N-1 steps round the ring; in step s rank r sends part r - s + first."""
    n = comm.size
    parts = parts if in_place else [part.clone() for part in parts]
    for step in range(n - 1):
        own = parts[(comm.rank - step - 1 + first) % n]
        sending = comm.isend(parts[(comm.rank - step + first) % n], (comm.rank + 1) % n)
        arriving = comm.recv(torch.empty_like(own), (comm.rank - 1) % n)
        sending.wait()
        own.copy_(own + arriving if is_added else arriving)
    return parts


@misconception(
    "ring_all_reduce",
    "One rank gathers everything, adds, and sends the result to each. That is a star: its middle "
    "sends and receives N-1 whole tensors while the others wait. In a ring no rank is special.",
    see=MESSAGES,
)
def gathers_on_one_rank(comm, parts):
    return [star_all_reduce(comm, part) for part in parts]


@misconception(
    "ring_all_reduce",
    "Whole tensors go round your ring: (N-1) B for each rank, growing with N. Send one part a "
    "step; 2 (N-1)/N B are enough.",
    see=MESSAGES,
)
def sends_whole_tensors(comm, parts):
    return [gossip_all_reduce(comm, part) for part in parts]


@misconception(
    "ring_all_reduce",
    "You stop after N-1 steps: each rank then has one finished part (a reduce-scatter). N-1 more "
    "steps carry the finished parts round.",
    see=MESSAGES,
)
def stops_after_the_first_round(comm, parts):
    return _round(comm, parts, True)


@misconception(
    "ring_all_reduce",
    "You add in the second round as well. What arrives there is finished: a part that is added to "
    "another finished one counts some ranks twice.",
    see=MESSAGES,
)
def adds_in_both_rounds(comm, parts):
    return _round(comm, _round(comm, parts, True), True, first=1)


@misconception(
    "ring_all_reduce",
    "You end with every rank's own part, gathered: nothing was added, or the second round began "
    "with part r, the only one that nothing was added to. After the first round part r + 1 is "
    "finished on rank r; send that first.",
    see=MESSAGES,
)
def carries_unfinished_parts(comm, parts):
    return _round(comm, _round(comm, parts, True), False)


@misconception(
    "ring_all_reduce",
    "Every rank sends before it receives. A send waits until the other side receives, so all wait "
    "for all: begin the send with isend, receive, then wait for the send.",
    see=MESSAGES,
)
def sends_before_receiving(comm, parts):
    n, parts = comm.size, [part.clone() for part in parts]
    for step in range(2 * (n - 1)):
        own = parts[(comm.rank - step - 1) % n]
        comm.send(parts[(comm.rank - step) % n], (comm.rank + 1) % n)
        arriving = comm.recv(torch.empty_like(own), (comm.rank - 1) % n)
        own.copy_(own + arriving if step < n - 1 else arriving)
    return parts


@misconception(
    "ring_all_reduce",
    "You call the collective that you are to build. Take isend and recv only.",
    see=MESSAGES,
)
def calls_all_reduce(comm, parts):
    return [comm.all_reduce(part.clone()) for part in parts]


@misconception(
    "ring_all_reduce",
    "You return means. An all-reduce sums; whoever wants a mean divides.",
    see=MESSAGES,
)
def divides_by_the_number_of_ranks(comm, parts):
    summed = _round(comm, _round(comm, parts, True), False, first=1)
    return [part / comm.size for part in summed]


@misconception(
    "ring_all_reduce",
    "Your tree of whole tensors has fewer steps and more bytes: rank 0 sends the whole tensor once "
    "a level. For large tensors the ring is what balances the load.",
    see=COST,
)
def climbs_a_tree(comm, parts):
    return [tree_all_reduce(comm, part) for part in parts]


@misconception(
    "ring_all_reduce",
    "Your rounds have N steps each. After N-1 a part has met every rank; in one more it meets the "
    "first again.",
    see=MESSAGES,
)
def takes_a_step_too_many(comm, parts):
    n, parts = comm.size, [part.clone() for part in parts]
    for step in range(2 * n):
        own = parts[(comm.rank - step - 1) % n]
        sending = comm.isend(parts[(comm.rank - step) % n], (comm.rank + 1) % n)
        arriving = comm.recv(torch.empty_like(own), (comm.rank - 1) % n)
        sending.wait()
        own.copy_(own + arriving if step < n else arriving)
    return parts


@alternative("ring_all_reduce")
def in_two_rounds(comm, parts):
    return _round(comm, _round(comm, parts, True), False, first=1)


@alternative("ring_all_reduce")
def round_the_other_way(comm, parts):
    """To the previous rank, from the next one."""
    n, parts = comm.size, [part.clone() for part in parts]
    for is_added in (True, False):
        start = 0 if is_added else -1
        for step in range(n - 1):
            leaving = parts[(comm.rank + step + start) % n]
            own = parts[(comm.rank + step + 1 + start) % n]
            sending = comm.isend(leaving, (comm.rank - 1) % n)
            arriving = comm.recv(torch.empty_like(own), (comm.rank + 1) % n)
            sending.wait()
            own.copy_(own + arriving if is_added else arriving)
    return parts


@alternative("ring_all_reduce")
def owns_part_r_at_half_time(comm, parts):
    parts = _round(comm, parts, True, first=-1)
    return ring_all_gather(comm, parts)


# all_reduce_seconds


def _seconds(algorithm, n, b, latency, bandwidth, **changes):
    levels = math.ceil(math.log2(n))
    table = {
        "star": (2 * (n - 1), b),
        "tree": (2 * levels, b),
        "ring": (2 * (n - 1), b / n),
        "gossip": (n - 1, b),
    } | {name: change(n, b, levels) for name, change in changes.items()}
    steps, size = table[algorithm]
    return steps * (latency + size / bandwidth)


@misconception(
    "all_reduce_seconds",
    "Your ring has N-1 steps. They make a reduce-scatter; the finished parts need N-1 more to get "
    "to everyone.",
    see=COST,
)
def forgets_half_of_the_ring(*given):
    return _seconds(*given, ring=lambda n, b, levels: (n - 1, b / n))


@misconception(
    "all_reduce_seconds",
    "In each step of your ring a rank sends the whole tensor. It sends one part of N: B / N bytes.",
    see=COST,
)
def ring_sends_whole_tensors(*given):
    return _seconds(*given, ring=lambda n, b, levels: (2 * (n - 1), b))


@misconception(
    "all_reduce_seconds",
    "You count the latency once. Each message has to wait for the one before, and pays it again: "
    "this is why rings of thousands of ranks are slow for small tensors.",
    see=COST,
)
def counts_latency_once(algorithm, n, b, latency, bandwidth):
    transfer = _seconds(algorithm, n, b, 0.0, bandwidth)
    return transfer + (latency if n > 1 else 0.0)


@misconception(
    "all_reduce_seconds",
    "You leave out the latency. For small tensors there is hardly anything else.",
    see=COST,
)
def leaves_out_latency(algorithm, n, b, latency, bandwidth):
    return _seconds(algorithm, n, b, 0.0, bandwidth)


@misconception(
    "all_reduce_seconds",
    "Your tree only climbs: rank 0 has the sum, and the others do not. It must come down again.",
    see=COST,
)
def climbs_only(*given):
    return _seconds(*given, tree=lambda n, b, levels: (levels, b))


@misconception(
    "all_reduce_seconds",
    "You take log2 N levels where N is no power of two. A level is there or not: round up.",
    see=COST,
)
def takes_parts_of_levels(*given):
    return _seconds(*given, tree=lambda n, b, levels: (2 * math.log2(n), b))


@misconception(
    "all_reduce_seconds",
    "Your gossip is as cheap as one message. An all-gather with a sum at home gives the right "
    "values and N-1 whole tensors of traffic: all-gather plus a local sum is not free.",
    see=COST,
)
def gossip_is_free(*given):
    return _seconds(*given, gossip=lambda n, b, levels: (min(1, n - 1), b))


@misconception(
    "all_reduce_seconds",
    "In your star rank 0 hears all others at once. It has one link: N-1 tensors come in one after "
    "the other, and go out one after the other.",
    see=COST,
)
def star_hears_all_at_once(*given):
    return _seconds(*given, star=lambda n, b, levels: (2 * min(1, n - 1), b))


@misconception(
    "all_reduce_seconds",
    "You round the levels of the tree down. Five ranks need three levels: the fifth has to get in.",
    see=COST,
)
def rounds_levels_down(*given):
    return _seconds(*given, tree=lambda n, b, levels: (2 * int(math.log2(n)), b))


@misconception(
    "all_reduce_seconds",
    "Your star only gathers: the sum must be sent to each rank again.",
    see=COST,
)
def star_only_gathers(*given):
    return _seconds(*given, star=lambda n, b, levels: (n - 1, b))


@misconception(
    "all_reduce_seconds",
    "You take the ring's bytes, 2 (N-1)/N B, for every algorithm.",
    see=COST,
)
def takes_the_ring_for_all(algorithm, n, b, latency, bandwidth):
    return _seconds("ring", n, b, latency, bandwidth)


@alternative("all_reduce_seconds")
def adds_latency_and_transfer(algorithm, n, b, latency, bandwidth):
    levels = (n - 1).bit_length()
    if algorithm == "ring":
        return 2 * (n - 1) * latency + 2 * (n - 1) / n * b / bandwidth
    steps = {"star": 2 * n - 2, "tree": 2 * levels, "gossip": n - 1}[algorithm]
    return steps * latency + steps * b / bandwidth


@alternative("all_reduce_seconds")
def counts_levels_by_doubling(algorithm, n, b, latency, bandwidth):
    levels, reached = 0, 1
    while reached < n:
        levels, reached = levels + 1, 2 * reached
    steps = {"star": 2 * (n - 1), "ring": 2 * (n - 1), "gossip": n - 1, "tree": 2 * levels}
    message = latency + (b / n if algorithm == "ring" else b) / bandwidth
    return sum(message for _ in range(steps[algorithm]))


# place_of_rank


@misconception(
    "place_of_rank",
    "One of the two numbers of a rank stands where the other belongs. Write down both for the "
    "first rank of the second node, and ask of each what it is good for.",
    see=NAMES,
    is_starter=True,
)
def has_the_two_numbers_turned_round(rank, world_size, gpus_per_node, num_rows):
    return rank, list(range(rank % gpus_per_node, num_rows, world_size))


@misconception(
    "place_of_rank",
    "You take the global rank for the GPU. GPUs are numbered on each node, from 0: the second node "
    "has no GPU number 8. The local rank names the GPU.",
    see=NAMES,
)
def takes_the_global_rank_for_the_gpu(rank, world_size, gpus_per_node, num_rows):
    return rank, list(range(rank, num_rows, world_size))


@misconception(
    "place_of_rank",
    "You take the local rank for the data: the first ranks of all nodes train on the same rows, "
    "and most rows are never seen. The global rank divides the data.",
    see=NAMES,
)
def takes_the_local_rank_for_the_data(rank, world_size, gpus_per_node, num_rows):
    local = rank % gpus_per_node
    return local, list(range(local, num_rows, world_size))


@misconception(
    "place_of_rank",
    "You divide the data by the GPUs of one node: every node then trains on all rows. Divide by "
    "the number of all ranks.",
    see=NAMES,
)
def divides_the_data_by_one_node(rank, world_size, gpus_per_node, num_rows):
    local = rank % gpus_per_node
    return local, list(range(local, num_rows, gpus_per_node))


@misconception(
    "place_of_rank",
    "rank // gpus_per_node is the node's number. Its remainder is the number on the node.",
    see=NAMES,
)
def takes_the_node_for_the_gpu(rank, world_size, gpus_per_node, num_rows):
    return rank // gpus_per_node, list(range(rank, num_rows, world_size))


@misconception(
    "place_of_rank",
    "You give each rank a block of neighbouring rows and drop the rest. Ranks take turns: rank, "
    "rank + N, rank + 2N, and so on, until no row is left.",
    see=NAMES,
)
def takes_blocks(rank, world_size, gpus_per_node, num_rows):
    size = num_rows // world_size
    return rank % gpus_per_node, list(range(rank * size, (rank + 1) * size))


@misconception(
    "place_of_rank",
    "You give each rank a block of neighbouring rows. Ranks take turns: rank, rank + N, rank + 2N.",
    see=NAMES,
)
def takes_blocks_rounded_up(rank, world_size, gpus_per_node, num_rows):
    size = -(-num_rows // world_size)
    return rank % gpus_per_node, list(range(num_rows))[rank * size : (rank + 1) * size]


@misconception(
    "place_of_rank",
    "You drop the last, incomplete round: each row is to be taken once.",
    see=NAMES,
)
def drops_the_last_round(rank, world_size, gpus_per_node, num_rows):
    whole = num_rows - num_rows % world_size
    return rank % gpus_per_node, list(range(rank, whole, world_size))


@alternative("place_of_rank")
def by_divmod(rank, world_size, gpus_per_node, num_rows):
    _, gpu = divmod(rank, gpus_per_node)
    return gpu, [row for row in range(num_rows) if row % world_size == rank]


@alternative("place_of_rank")
def by_slicing(rank, world_size, gpus_per_node, num_rows):
    node = rank // gpus_per_node
    return rank - node * gpus_per_node, list(range(num_rows))[rank::world_size]


# mean_gradient


def _total(weight, rows, targets):
    return 2 * rows.T @ (rows @ weight - targets)


def _count(rows):
    return rows.new_tensor([len(rows)])


@misconception(
    "mean_gradient",
    "Gradients are summed over ranks, not averaged: the step grows with the number of ranks.",
    see=DATA_PARALLEL,
)
def sums_gradients(comm, weight, rows, targets):
    weight = comm.broadcast(weight.clone(), src=0)
    return weight, comm.all_reduce(_total(weight, rows, targets) / len(rows))


@misconception(
    "mean_gradient",
    "You take the mean of the ranks' means. With different numbers of rows that is not the mean of "
    "all rows: a row of a small batch counts more. Sum gradients and rows, then divide.",
    see=DATA_PARALLEL,
)
def averages_means(comm, weight, rows, targets):
    weight = comm.broadcast(weight.clone(), src=0)
    return weight, comm.all_reduce(_total(weight, rows, targets) / len(rows), "mean")


@misconception(
    "mean_gradient",
    "Each rank computes with its own weight. Equal gradients keep replicas equal only if they "
    "start equal: the first broadcast is not optional.",
    see=DATA_PARALLEL,
)
def skips_the_broadcast(comm, weight, rows, targets):
    total = torch.cat([_total(weight, rows, targets), _count(rows)])
    sums = comm.all_reduce(total)
    return weight.clone(), sums[:-1] / sums[-1]


@misconception(
    "mean_gradient",
    "You compute the gradient with your own weight, and broadcast afterwards. The gradient then "
    "belongs to other weights than those that are updated.",
    see=DATA_PARALLEL,
)
def broadcasts_too_late(comm, weight, rows, targets):
    sums = comm.all_reduce(torch.cat([_total(weight, rows, targets), _count(rows)]))
    return comm.broadcast(weight.clone(), src=0), sums[:-1] / sums[-1]


@misconception(
    "mean_gradient",
    "Only rank 0 gets the gradient: a reduce leaves the others with their own. Replicas drift "
    "apart from the first step on.",
    see=DATA_PARALLEL,
)
def reduces_to_rank_0(comm, weight, rows, targets):
    weight = comm.broadcast(weight.clone(), src=0)
    total = torch.cat([_total(weight, rows, targets), _count(rows)])
    sums = comm.reduce(total, dst=0)
    return weight, sums[:-1] / sums[-1]


@misconception(
    "mean_gradient",
    "You return this rank's gradient. Without communication there are N models, not one.",
    see=DATA_PARALLEL,
)
def does_not_communicate_gradients(comm, weight, rows, targets):
    weight = comm.broadcast(weight.clone(), src=0)
    return weight, _total(weight, rows, targets) / len(rows)


@misconception(
    "mean_gradient",
    "You gather all gradients and sum at home: right values, and N-1 whole gradients from each "
    "rank where an all-reduce sends less than two.",
    see=COST,
)
def gathers_and_sums(comm, weight, rows, targets):
    weight = comm.broadcast(weight.clone(), src=0)
    total = torch.cat([_total(weight, rows, targets), _count(rows)])
    sums = comm.all_gather(total[None]).sum(0)
    return weight, sums[:-1] / sums[-1]


@misconception(
    "mean_gradient",
    "You average the weights. Another training then begins: the exercise, as DDP, takes rank 0's.",
    see=DATA_PARALLEL,
)
def averages_the_weights(comm, weight, rows, targets):
    weight = comm.all_reduce(weight.clone(), "mean")
    sums = comm.all_reduce(torch.cat([_total(weight, rows, targets), _count(rows)]))
    return weight, sums[:-1] / sums[-1]


@misconception(
    "mean_gradient",
    "You divide by the number of ranks, not of rows: the gradient of a sum.",
    see=DATA_PARALLEL,
)
def divides_by_ranks_only(comm, weight, rows, targets):
    weight = comm.broadcast(weight.clone(), src=0)
    return weight, comm.all_reduce(_total(weight, rows, targets), "mean")


@misconception(
    "mean_gradient",
    "The factor 2 is missing: it comes from the square.",
    see=DATA_PARALLEL,
)
def forgets_the_factor_of_the_square(comm, weight, rows, targets):
    weight = comm.broadcast(weight.clone(), src=0)
    sums = comm.all_reduce(torch.cat([_total(weight, rows, targets) / 2, _count(rows)]))
    return weight, sums[:-1] / sums[-1]


@misconception(
    "mean_gradient",
    "You return the gradient of the sum over rows: divide by the number of all rows.",
    see=DATA_PARALLEL,
)
def returns_the_sum(comm, weight, rows, targets):
    weight = comm.broadcast(weight.clone(), src=0)
    return weight, comm.all_reduce(_total(weight, rows, targets))


@misconception(
    "mean_gradient",
    "Each rank computes with its own weight, and you take the mean of means: the first broadcast "
    "is missing, and rows of small batches count more.",
    see=DATA_PARALLEL,
)
def averages_means_without_a_broadcast(comm, weight, rows, targets):
    mean = _total(weight, rows, targets) / len(rows)
    return weight.clone(), comm.all_reduce(mean, "mean")


@alternative("mean_gradient")
def weighs_means_by_rows(comm, weight, rows, targets):
    weight = comm.broadcast(weight.clone(), src=0)
    count = comm.all_reduce(_count(rows))
    mean = _total(weight, rows, targets) / len(rows)
    return weight, comm.all_reduce(mean * (len(rows) / count))


@alternative("mean_gradient")
def by_autograd(comm, weight, rows, targets):
    weight = comm.broadcast(weight.clone(), src=0)
    leaf = weight.clone().requires_grad_()
    (rows @ leaf - targets).square().sum().backward()
    sums = comm.all_reduce(torch.cat([leaf.grad, _count(rows)]))
    return weight, sums[:-1] / sums[-1]


# assign_buckets


def _fill(order, sizes, limit, first, *, is_closed_before=False):
    buckets, held, bound = [[]], 0, first
    for i in order:
        full = held + sizes[i] > bound if is_closed_before else held >= bound
        if buckets[-1] and full:
            buckets.append([])
            held, bound = 0, limit
        buckets[-1].append(i)
        held += sizes[i]
    return buckets


def _backwards(sizes):
    return range(len(sizes) - 1, -1, -1)


@misconception(
    "assign_buckets",
    "Your buckets follow forward. Backward makes the last layer's gradients first; a first bucket "
    "with the first layer's would be full at the very end.",
    see=BUCKETS,
)
def follows_forward(sizes, bucket_bytes, first_bucket_bytes):
    return _fill(range(len(sizes)), sizes, bucket_bytes, first_bucket_bytes)


@misconception(
    "assign_buckets",
    "You fill buckets in forward order and turn their list round. What is left over then stands in "
    "the first bucket to leave, and within a bucket the order is still forward's.",
    see=BUCKETS,
)
def reverses_the_list_of_buckets(sizes, bucket_bytes, first_bucket_bytes):
    return _fill(range(len(sizes)), sizes, bucket_bytes, first_bucket_bytes)[::-1]


@misconception(
    "assign_buckets",
    "You close a bucket before it would exceed the limit. Here the gradient that makes it full "
    "still belongs to it.",
    see=BUCKETS,
)
def closes_before_the_limit(sizes, bucket_bytes, first_bucket_bytes):
    order = _backwards(sizes)
    return _fill(order, sizes, bucket_bytes, first_bucket_bytes, is_closed_before=True)


@misconception(
    "assign_buckets",
    "You give all buckets the same limit. The first one is small, so that the network has "
    "something to do as early as possible.",
    see=BUCKETS,
)
def has_no_small_first_bucket(sizes, bucket_bytes, first_bucket_bytes):
    return _fill(_backwards(sizes), sizes, bucket_bytes, bucket_bytes)


@misconception(
    "assign_buckets",
    "All your buckets have the first one's limit: many small messages, each with its latency.",
    see=BUCKETS,
)
def keeps_the_small_limit(sizes, bucket_bytes, first_bucket_bytes):
    return _fill(_backwards(sizes), sizes, first_bucket_bytes, first_bucket_bytes)


@misconception(
    "assign_buckets",
    "Every gradient has a bucket of its own: one latency for each of hundreds of tensors.",
    see=BUCKETS,
)
def one_bucket_each(sizes, bucket_bytes, first_bucket_bytes):
    return [[i] for i in _backwards(sizes)]


@misconception(
    "assign_buckets",
    "You have one bucket: it is full when backward is over, and nothing overlaps.",
    see=BUCKETS,
)
def one_bucket_for_all(sizes, bucket_bytes, first_bucket_bytes):
    return [list(_backwards(sizes))]


@misconception(
    "assign_buckets",
    "The limits are turned round: the first bucket is the large one.",
    see=BUCKETS,
)
def has_a_large_first_bucket(sizes, bucket_bytes, first_bucket_bytes):
    return _fill(_backwards(sizes), sizes, first_bucket_bytes, bucket_bytes)


@misconception(
    "assign_buckets",
    "A bucket that has just reached its limit stays open: it is closed at the limit, not above it.",
    see=BUCKETS,
)
def closes_above_the_limit(sizes, bucket_bytes, first_bucket_bytes):
    return _fill(_backwards(sizes), sizes, bucket_bytes + 1, first_bucket_bytes + 1)


@misconception(
    "assign_buckets",
    "You open a bucket as soon as one is full, also where nothing is left: an empty bucket at the "
    "end is an all-reduce of nothing.",
    see=BUCKETS,
)
def leaves_an_empty_bucket(sizes, bucket_bytes, first_bucket_bytes):
    buckets, held = [[]], 0
    for i in _backwards(sizes):
        buckets[-1].append(i)
        held += sizes[i]
        if held >= (first_bucket_bytes if len(buckets) == 1 else bucket_bytes):
            buckets.append([])
            held = 0
    return buckets


@misconception(
    "assign_buckets",
    "The last bucket, which is not full, gets lost, and the first layers' gradients with it.",
    see=BUCKETS,
)
def loses_the_last_bucket(sizes, bucket_bytes, first_bucket_bytes):
    buckets = leaves_an_empty_bucket(sizes, bucket_bytes, first_bucket_bytes)
    return buckets[:-1]


@misconception(
    "assign_buckets",
    "Your indices count from the end. They are indices into `sizes`, in which the last layer has "
    "the highest.",
    see=BUCKETS,
)
def counts_from_the_end(sizes, bucket_bytes, first_bucket_bytes):
    buckets = _fill(_backwards(sizes), sizes, bucket_bytes, first_bucket_bytes)
    return [[len(sizes) - 1 - i for i in bucket] for bucket in buckets]


@alternative("assign_buckets")
def closes_when_full(sizes, bucket_bytes, first_bucket_bytes):
    buckets, current, held = [], [], 0
    for i in reversed(range(len(sizes))):
        current.append(i)
        held += sizes[i]
        if held >= (bucket_bytes if buckets else first_bucket_bytes):
            buckets.append(current)
            current, held = [], 0
    return [*buckets, current] if current else buckets


@alternative("assign_buckets")
def cuts_a_list(sizes, bucket_bytes, first_bucket_bytes):
    rest, buckets, limit = list(range(len(sizes)))[::-1], [], first_bucket_bytes
    while rest:
        reached = itertools.accumulate(sizes[i] for i in rest)
        length = next((k for k, held in enumerate(reached, 1) if held >= limit), len(rest))
        buckets.append(rest[:length])
        rest, limit = rest[length:], bucket_bytes
    return buckets


# overlapped_backward


@misconception(
    "overlapped_backward",
    "Your DDP does not overlap: either you wait for each all-reduce before you go on, or you start "
    "them when backward is over. Start a layer's as soon as its gradient is there, keep the "
    "handle, and wait at the end.",
    see=OVERLAP,
)
def does_not_overlap(comm, weights, inputs, grad):
    found = []
    for i in reversed(range(len(weights))):
        found.insert(0, comm.all_reduce(grad.T @ inputs[i], "mean"))
        if i > 0:
            grad = grad @ weights[i]
    return found


def _local(weights, inputs, grad):
    found = []
    for i in reversed(range(len(weights))):
        found.insert(0, grad.T @ inputs[i])
        if i > 0:
            grad = grad @ weights[i]
    return found


def _local(weights, inputs, grad):
    found = []
    for i in reversed(range(len(weights))):
        found.insert(0, grad.T @ inputs[i])
        if i > 0:
            grad = grad @ weights[i]
    return found


@misconception(
    "overlapped_backward",
    "You send one vector of all gradients at the end: one latency, and no overlap.",
    see=OVERLAP,
)
def sends_one_vector(comm, weights, inputs, grad):
    flat = comm.all_reduce(torch.cat([g.flatten() for g in _local(weights, inputs, grad)]), "mean")
    return [part.view_as(w) for part, w in zip(flat.chunk(len(weights)), weights, strict=True)]


@misconception(
    "overlapped_backward",
    "Gradients are summed over ranks, not averaged.",
    see=DATA_PARALLEL,
)
def sums_in_the_background(comm, weights, inputs, grad):
    handles = []
    for i in reversed(range(len(weights))):
        handles.insert(0, comm.all_reduce(grad.T @ inputs[i], async_op=True))
        if i > 0:
            grad = grad @ weights[i]
    return [handle.wait() for handle in handles]


@misconception(
    "overlapped_backward",
    "You return the tensors that you handed over, without wait(): the result is not there before. "
    "On a GPU this is a race that you win most of the time.",
    see=OVERLAP,
)
def never_waits(comm, weights, inputs, grad):
    found = _local(weights, inputs, grad)
    for gradient in found:
        comm.all_reduce(gradient, "mean", async_op=True)
    return found


@misconception(
    "overlapped_backward",
    "Your gradients stand in the order of backward: the last layer's first.",
    see=OVERLAP,
)
def returns_them_backwards(comm, weights, inputs, grad):
    handles = []
    for i in reversed(range(len(weights))):
        handles.append(comm.all_reduce(grad.T @ inputs[i], "mean", async_op=True))
        if i > 0:
            grad = grad @ weights[i]
    return [handle.wait() for handle in handles]


@misconception(
    "overlapped_backward",
    "You average what goes backward, dx, over the ranks. Other rows have other activations: only "
    "the parameters' gradients are shared.",
    see=OVERLAP,
)
def averages_activations(comm, weights, inputs, grad):
    handles = []
    for i in reversed(range(len(weights))):
        handles.insert(0, comm.all_reduce(grad.T @ inputs[i], "mean", async_op=True))
        if i > 0:
            grad = comm.all_reduce(grad @ weights[i], "mean")
    return [handle.wait() for handle in handles]


@misconception(
    "overlapped_backward",
    "You compute dx for the first layer as well. Nobody below needs it, and it is work.",
    see=OVERLAP,
)
def computes_the_last_dx(comm, weights, inputs, grad):
    handles = []
    for i in reversed(range(len(weights))):
        gradient = grad.T @ inputs[i]
        grad = grad @ weights[i]
        handles.insert(0, comm.all_reduce(gradient, "mean", async_op=True))
    return [handle.wait() for handle in handles]


@misconception(
    "overlapped_backward",
    "You divide twice: by hand, and in the mean.",
    see=OVERLAP,
)
def divides_twice(comm, weights, inputs, grad):
    handles = []
    for i in reversed(range(len(weights))):
        gradient = grad.T @ inputs[i] / comm.size
        handles.insert(0, comm.all_reduce(gradient, "mean", async_op=True))
        if i > 0:
            grad = grad @ weights[i]
    return [handle.wait() for handle in handles]


@misconception(
    "overlapped_backward",
    "You go on to dx before you have used dy: the layer's dW then takes the gradient of its input.",
    see=OVERLAP,
)
def overwrites_dy_too_early(comm, weights, inputs, grad):
    handles = []
    for i in reversed(range(len(weights))):
        if i > 0:
            grad = grad @ weights[i]
        handles.insert(0, comm.all_reduce(grad.T @ inputs[i], "mean", async_op=True))
    return [handle.wait() for handle in handles]


@misconception(
    "overlapped_backward",
    "Your dW is transposed: y = x W^T, so W has a row for each output, and dW = dy^T x.",
    see=OVERLAP,
)
def transposes_dw(comm, weights, inputs, grad):
    handles = []
    for i in reversed(range(len(weights))):
        handles.insert(0, comm.all_reduce(inputs[i].T @ grad, "mean", async_op=True))
        if i > 0:
            grad = grad @ weights[i]
    return [handle.wait() for handle in handles]


@alternative("overlapped_backward")
def computes_dx_before_dw(comm, weights, inputs, grad):
    handles = [None] * len(weights)
    for i in range(len(weights) - 1, -1, -1):
        below = grad @ weights[i] if i else None
        handles[i] = comm.all_reduce(grad.T @ inputs[i], "mean", async_op=True)
        grad = below
    return [handle.wait() for handle in handles]


@alternative("overlapped_backward")
def sums_and_divides(comm, weights, inputs, grad):
    under_way = {}
    for i in reversed(range(len(weights))):
        gradient = (grad.T @ inputs[i]) / comm.size
        under_way[i] = comm.all_reduce(gradient, async_op=True), gradient
        if i:
            grad = grad @ weights[i]
    for handle, _ in under_way.values():
        handle.wait()
    return [under_way[i][1] for i in range(len(weights))]


# accumulated_gradient


@misconception(
    "accumulated_gradient",
    "You communicate each micro-batch: m times the traffic for the same sum. Accumulate at home "
    "(no_sync), and reduce once.",
    see=ACCUMULATION,
)
def reduces_each_micro_batch(comm, gradient_of, micro_batches):
    reduced = [comm.all_reduce(gradient_of(batch), "mean") for batch in micro_batches]
    return sum(reduced) / len(micro_batches)


@misconception(
    "accumulated_gradient",
    "You do not divide by the number of micro-batches: the step is m times too long.",
    see=ACCUMULATION,
)
def forgets_the_micro_batches(comm, gradient_of, micro_batches):
    return comm.all_reduce(sum(map(gradient_of, micro_batches)), "mean")


@misconception(
    "accumulated_gradient",
    "You do not divide by the number of ranks.",
    see=ACCUMULATION,
)
def forgets_the_ranks(comm, gradient_of, micro_batches):
    return comm.all_reduce(sum(map(gradient_of, micro_batches)) / len(micro_batches))


@misconception(
    "accumulated_gradient",
    "You reduce the last micro-batch only: the others stay at home, and replicas drift apart. What "
    "is reduced must be the accumulated sum.",
    see=ACCUMULATION,
)
def reduces_the_last_only(comm, gradient_of, micro_batches):
    *first, last = [gradient_of(batch) for batch in micro_batches]
    return (sum(first) + comm.all_reduce(last, "mean")) / len(micro_batches)


@misconception(
    "accumulated_gradient",
    "You reduce the accumulated gradient after every micro-batch: what was averaged is averaged "
    "again, and traffic is m-fold.",
    see=ACCUMULATION,
)
def reduces_the_sum_each_time(comm, gradient_of, micro_batches):
    total = 0
    for batch in micro_batches:
        total = comm.all_reduce(total + gradient_of(batch), "mean")
    return total / len(micro_batches)


@misconception(
    "accumulated_gradient",
    "You keep the last micro-batch's gradient: each overwrites the one before, as if zero_grad "
    "stood within the loop.",
    see=ACCUMULATION,
)
def overwrites(comm, gradient_of, micro_batches):
    for batch in micro_batches:
        gradient = gradient_of(batch)
    return comm.all_reduce(gradient, "mean")


@misconception(
    "accumulated_gradient",
    "You never communicate: the mean over your own micro-batches is not that over all ranks.",
    see=ACCUMULATION,
)
def stays_at_home(comm, gradient_of, micro_batches):
    return sum(map(gradient_of, micro_batches)) / len(micro_batches)


@misconception(
    "accumulated_gradient",
    "You add everything up and divide by nothing.",
    see=ACCUMULATION,
)
def divides_by_nothing(comm, gradient_of, micro_batches):
    return comm.all_reduce(sum(map(gradient_of, micro_batches)))


@misconception(
    "accumulated_gradient",
    "You divide by the number of ranks twice: by hand, and in the mean.",
    see=ACCUMULATION,
)
def divides_by_ranks_twice(comm, gradient_of, micro_batches):
    mean = sum(map(gradient_of, micro_batches)) / len(micro_batches)
    return comm.all_reduce(mean, "mean") / comm.size


@alternative("accumulated_gradient")
def scales_each_gradient(comm, gradient_of, micro_batches):
    parts = comm.size * len(micro_batches)
    return comm.all_reduce(sum(gradient_of(batch) / parts for batch in micro_batches))


@alternative("accumulated_gradient")
def stacks_gradients(comm, gradient_of, micro_batches):
    mean = torch.stack([gradient_of(batch) for batch in micro_batches]).mean(0)
    return comm.all_reduce(mean, "mean")


# batch_statistics


def _merged(comm, x):
    """Of all ranks' rows: the mean, the sum of squares around it, and the number."""
    mine = torch.stack([x.mean(0), ((x - x.mean(0)) ** 2).sum(0), torch.full_like(x[0], len(x))])
    means, squares, counts = comm.all_gather(mine[None]).unbind(1)
    mean = (means * counts).sum(0) / counts.sum(0)
    return mean, (squares + counts * (means - mean) ** 2).sum(0), counts.sum(0)


@misconception(
    "batch_statistics",
    "Two ranks with one row each have variances of zero, and so has your mean of them. Which "
    "quantities of a rank may be added up?",
    see=BATCH_NORM,
    is_starter=True,
)
def averages_means_and_variances(comm, x):
    mean = comm.all_reduce(x.mean(0), "mean")
    return mean, comm.all_reduce(x.var(0, unbiased=False), "mean")


@misconception(
    "batch_statistics",
    "Your variance is E[x^2] - E[x]^2. With a mean of 1000 both are a million, where float32's "
    "spacing is 0.06: of a variance of 0.01 nothing is left, and it may come out negative. Take "
    "squares around a mean: each rank's own, and merge, or that of all ranks, in a second round.",
    see=BATCH_NORM,
)
def subtracts_two_large_squares(comm, x):
    sums = comm.all_reduce(torch.cat([x.sum(0), x.square().sum(0), x.new_tensor([len(x)])]))
    mean, square = (sums[:-1] / sums[-1]).chunk(2)
    return mean, square - mean.square()


@misconception(
    "batch_statistics",
    "Right means, but you average variances, weighed by rows. The variance of all rows also has "
    "the distances between the ranks' means: add n_r (mean_r - mean)^2 for each rank.",
    see=BATCH_NORM,
)
def averages_variances_by_rows(comm, x):
    n = x.new_tensor([len(x)])
    sums = comm.all_reduce(torch.cat([x.sum(0), x.var(0, unbiased=False) * len(x), n]))
    mean, var = (sums[:-1] / sums[-1]).chunk(2)
    return mean, var


@misconception(
    "batch_statistics",
    "You average over ranks as if all had equally many rows. Let each rank's number of rows travel "
    "too, weigh by it, and divide by the number of all.",
    see=BATCH_NORM,
)
def averages_moments(comm, x):
    mean = comm.all_reduce(x.mean(0), "mean")
    return mean, comm.all_reduce((x - mean).square().mean(0), "mean")


@misconception(
    "batch_statistics",
    "You divide by the number of rows less one. Batch normalization normalizes with the biased "
    "variance; the unbiased one only goes into the running statistics.",
    see=BATCH_NORM,
)
def takes_the_unbiased_variance(comm, x):
    mean, squares, n = _merged(comm, x)
    return mean, squares / (n - 1)


@misconception(
    "batch_statistics",
    "You return this rank's own statistics: a BatchNorm on each rank, normalizing with a few rows.",
    see=BATCH_NORM,
)
def takes_its_own_rows(comm, x):
    comm.barrier()
    return x.mean(0), x.var(0, unbiased=False)


@misconception(
    "batch_statistics",
    "You return the mean of the squares: the rows are not centred.",
    see=BATCH_NORM,
)
def forgets_to_centre(comm, x):
    sums = comm.all_reduce(torch.cat([x.sum(0), x.square().sum(0), x.new_tensor([len(x)])]))
    mean, square = (sums[:-1] / sums[-1]).chunk(2)
    return mean, square


@misconception(
    "batch_statistics",
    "You return standard deviations.",
    see=BATCH_NORM,
)
def returns_standard_deviations(comm, x):
    mean, squares, n = _merged(comm, x)
    return mean, (squares / n).sqrt()


@misconception(
    "batch_statistics",
    "You gather all rows. That is the whole batch on every rank, which data parallelism is there "
    "to avoid, and it asks for equally many rows. A few numbers a channel are enough.",
    see=BATCH_NORM,
)
def gathers_all_rows(comm, x):
    rows = comm.all_gather(x)
    return rows.mean(0), rows.var(0, unbiased=False)


@misconception(
    "batch_statistics",
    "You gather all rows, filled up to equal numbers. That is the whole batch on every rank, which "
    "data parallelism is there to avoid. A few numbers a channel are enough.",
    see=BATCH_NORM,
)
def gathers_padded_rows(comm, x):
    counts = comm.all_gather(torch.tensor([len(x)])).tolist()
    rows = comm.all_gather(torch.cat([x, x.new_zeros(max(counts) - len(x), x.shape[1])])[None])
    whole = torch.cat([part[:count] for part, count in zip(rows, counts, strict=True)])
    return whole.mean(0), whole.var(0, unbiased=False)


@alternative("batch_statistics")
def communicates_twice(comm, x):
    """The mean of all rows, then the squares around it."""
    sums = comm.all_reduce(torch.cat([x.sum(0), x.new_tensor([len(x)])]))
    mean = sums[:-1] / sums[-1]
    return mean, comm.all_reduce((x - mean).square().sum(0)) / sums[-1]


@alternative("batch_statistics")
def communicates_three_times(comm, x):
    """The number by itself, in whole numbers."""
    count = comm.all_reduce(torch.tensor(len(x)))
    mean = comm.all_reduce(x.sum(0)) / count
    return mean, comm.all_reduce(((x - mean) ** 2).sum(0)) / count


@alternative("batch_statistics")
def merges_variances(comm, x):
    """Each rank's mean and squares around it, merged: one all-gather."""
    mean, squares, n = _merged(comm, x)
    return mean, squares / n


@alternative("batch_statistics")
def merges_one_rank_after_the_other(comm, x):
    """Chan's formula for two parts, along the ranks."""
    mine = torch.stack([x.mean(0), x.var(0, unbiased=False), torch.full_like(x[0], len(x))])
    mean, squares, n = torch.zeros_like(x[0]), torch.zeros_like(x[0]), 0
    for theirs, var, count in comm.all_gather(mine[None]):
        distance, n = theirs - mean, n + count
        mean = mean + distance * count / n
        squares = squares + var * count + distance**2 * (n - count) * count / n
    return mean, squares / n


@alternative("batch_statistics")
def sums_around_somebodys_row(comm, x):
    """Sums of x - s and (x - s)^2, with rank 0's first row as s: both are small."""
    shift = comm.broadcast(x[0].clone(), src=0)
    near = x - shift
    sums = comm.all_reduce(torch.cat([near.sum(0), near.square().sum(0), x.new_tensor([len(x)])]))
    mean, square = (sums[:-1] / sums[-1]).chunk(2)
    return shift + mean, square - mean.square()


# train_until_all_are_done


@misconception(
    "train_until_all_are_done",
    "A rank that has no data goes home, and the others wait for it in their next all-reduce for "
    "ever. It must stay and bring zeros.",
    see=UNEVEN,
)
def goes_home(comm, weight, gradients, lr):
    for gradient in gradients:
        weight = weight - lr * comm.all_reduce(gradient.clone(), "mean")
    return weight, len(gradients)


@misconception(
    "train_until_all_are_done",
    "You divide by all ranks, although some bring zeros: the last steps are too short.",
    see=UNEVEN,
)
def divides_by_all_ranks(comm, weight, gradients, lr):
    steps = 0
    while True:
        has_batch = steps < len(gradients)
        mine = gradients[steps] if has_batch else torch.zeros_like(weight)
        sums = comm.all_reduce(torch.cat([mine, mine.new_tensor([float(has_batch)])]))
        if sums[-1] == 0:
            return weight, steps
        weight = weight - lr * sums[:-1] / comm.size
        steps += 1


@misconception(
    "train_until_all_are_done",
    "You stop when the first rank has no data left: the others' batches are lost.",
    see=UNEVEN,
)
def stops_with_the_first(comm, weight, gradients, lr):
    steps = int(comm.all_reduce(torch.tensor(len(gradients)), "min"))
    for gradient in gradients[:steps]:
        weight = weight - lr * comm.all_reduce(gradient.clone(), "mean")
    return weight, steps


@misconception(
    "train_until_all_are_done",
    "A rank without data repeats its last batch: rows count twice, and a rank without any has none "
    "to repeat.",
    see=UNEVEN,
)
def repeats_the_last_batch(comm, weight, gradients, lr):
    steps = int(comm.all_reduce(torch.tensor(len(gradients)), "max"))
    for i in range(steps):
        if gradients:
            mine = gradients[min(i, len(gradients) - 1)].clone()
        else:
            mine = torch.zeros_like(weight)
        weight = weight - lr * comm.all_reduce(mine, "mean")
    return weight, steps


@misconception(
    "train_until_all_are_done",
    "Ranks without data take part, but do not update: their weights stay behind.",
    see=UNEVEN,
)
def does_not_update_without_data(comm, weight, gradients, lr):
    steps = 0
    while True:
        has_batch = steps < len(gradients)
        mine = gradients[steps] if has_batch else torch.zeros_like(weight)
        sums = comm.all_reduce(torch.cat([mine, mine.new_tensor([float(has_batch)])]))
        if sums[-1] == 0:
            return weight, steps
        if has_batch:
            weight = weight - lr * sums[:-1] / sums[-1]
        steps += 1


@misconception(
    "train_until_all_are_done",
    "You return the number of this rank's batches; ranks disagree about how long training was.",
    see=UNEVEN,
)
def counts_its_own_batches(comm, weight, gradients, lr):
    done = divides_by_those_present(comm, weight, gradients, lr)
    return done[0], len(gradients)


@misconception(
    "train_until_all_are_done",
    "The mean over ranks becomes a sum: steps are too long as long as several ranks have data.",
    see=UNEVEN,
)
def adds_without_dividing(comm, weight, gradients, lr):
    steps = int(comm.all_reduce(torch.tensor(len(gradients)), "max"))
    for i in range(steps):
        mine = gradients[i].clone() if i < len(gradients) else torch.zeros_like(weight)
        weight = weight - lr * comm.all_reduce(mine)
    return weight, steps


@misconception(
    "train_until_all_are_done",
    "Each rank trains on alone and weights are averaged at the end. That is another algorithm "
    "(local SGD): steps with few ranks count less.",
    see=UNEVEN,
)
def averages_weights_at_the_end(comm, weight, gradients, lr):
    for gradient in gradients:
        weight = weight - lr * gradient
    steps = int(comm.all_reduce(torch.tensor(len(gradients)), "max"))
    return comm.all_reduce(weight.clone(), "mean"), steps


@misconception(
    "train_until_all_are_done",
    "You count the round in which everybody is done as a step.",
    see=UNEVEN,
)
def counts_the_last_round(comm, weight, gradients, lr):
    weight, steps = divides_by_those_present(comm, weight, gradients, lr)
    return weight, steps + 1


@alternative("train_until_all_are_done")
def divides_by_those_present(comm, weight, gradients, lr):
    """The counts are shared once, at the start."""
    counts = comm.all_gather(torch.tensor([len(gradients)])).tolist()
    for i in range(max(counts)):
        mine = gradients[i].clone() if i < len(gradients) else torch.zeros_like(weight)
        weight = weight - lr * comm.all_reduce(mine) / sum(i < count for count in counts)
    return weight, max(counts)


@alternative("train_until_all_are_done")
def asks_who_is_left(comm, weight, gradients, lr):
    rest, steps = list(gradients), 0
    while active := int(comm.all_reduce(torch.tensor(int(bool(rest))))):
        mine = rest.pop(0) / active if rest else torch.zeros_like(weight)
        weight = weight - lr * comm.all_reduce(mine)
        steps += 1
    return weight, steps
