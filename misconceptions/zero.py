"""Chapter 12: wrong answers that people give, and right ones in another form."""

import math

import torch

from autograder import alternative, misconception

KEEPS = "2. What each stage keeps"
STAGE_1 = "3. Stage 1: update a part"
FSDP = "5. Stage 3: borrow, compute, forget"
PREFETCH = "6. Prefetch"
NORM = "7. The norm of what nobody holds"
HYBRID = "8. Hybrid sharding"
RESHARD = "9. Another number of ranks"
TRAFFIC = "10. What it costs in traffic"
WHICH = "11. Which stage"


# zero_memory


def _memory(p, n, stage, k, first=(3, 2, 1), sizes=(2, 2)):
    return tuple(
        p * size / (n if stage >= s else 1) for size, s in zip((*sizes, k), first, strict=True)
    )


@misconception(
    "zero_memory",
    "You shard the parameters at stage 2. It shards optimizer states and gradients; every rank "
    "still computes with whole parameters, which are sharded at stage 3.",
    see=KEEPS,
)
def shards_parameters_at_stage_2(num_parameters, world_size, stage, optimizer_bytes=12):
    return _memory(num_parameters, world_size, stage, optimizer_bytes, first=(2, 2, 1))


@misconception(
    "zero_memory",
    "You shard the gradients at stage 1. Stage 1 shards what the optimizer keeps, nothing else; "
    "gradients follow at stage 2.",
    see=KEEPS,
)
def shards_gradients_at_stage_1(num_parameters, world_size, stage, optimizer_bytes=12):
    return _memory(num_parameters, world_size, stage, optimizer_bytes, first=(3, 1, 1))


@misconception(
    "zero_memory",
    "Your order is turned round: you shard parameters first and optimizer states last. ZeRO begins "
    "with what is largest and needed least often, the optimizer's states.",
    see=KEEPS,
)
def shards_parameters_first(num_parameters, world_size, stage, optimizer_bytes=12):
    return _memory(num_parameters, world_size, stage, optimizer_bytes, first=(1, 2, 3))


@misconception(
    "zero_memory",
    "You leave out the float32 master weights: 8 of the optimizer's 12 bytes are momentum and "
    "variance, 4 are the copy that the update is added to. Take the bytes from the argument.",
    see=KEEPS,
)
def leaves_out_the_master_weights(num_parameters, world_size, stage, optimizer_bytes=12):
    return _memory(num_parameters, world_size, stage, optimizer_bytes - 4)


@misconception(
    "zero_memory",
    "You count gradients in float32. In mixed precision backward makes them in 16 bits: 2 bytes "
    "each.",
    see=KEEPS,
)
def counts_gradients_in_float32(num_parameters, world_size, stage, optimizer_bytes=12):
    return _memory(num_parameters, world_size, stage, optimizer_bytes, sizes=(2, 4))


@misconception(
    "zero_memory",
    "You shard everything from stage 1 on. The stages exist because each costs something: stage 1 "
    "shards optimizer states alone.",
    see=KEEPS,
)
def shards_everything_from_stage_1(num_parameters, world_size, stage, optimizer_bytes=12):
    return _memory(num_parameters, world_size, stage, optimizer_bytes, first=(1, 1, 1))


@alternative("zero_memory")
def looks_stages_up(num_parameters, world_size, stage, optimizer_bytes=12):
    p, part = num_parameters, num_parameters / world_size
    k = optimizer_bytes
    return [
        (2 * p, 2 * p, k * p),
        (2 * p, 2 * p, k * part),
        (2 * p, 2 * part, k * part),
        (2 * part, 2 * part, k * part),
    ][stage]


@alternative("zero_memory")
def returns_a_list(num_parameters, world_size, stage, optimizer_bytes=12):
    sizes = [2 * num_parameters, 2 * num_parameters, optimizer_bytes * num_parameters]
    for i in range(stage):
        sizes[2 - i] /= world_size
    return sizes


# elements_per_step


def _elements(p, n, passes):
    return passes * p * (n - 1) / n


@misconception(
    "elements_per_step",
    "Your FSDP sends less than data parallelism. It saves memory, not traffic: parameters are "
    "gathered for forward and for backward, and gradients reduced and scattered: three passes.",
    see=TRAFFIC,
)
def believes_that_fsdp_saves_traffic(num_parameters, world_size, stage, num_micro_batches=1):
    m = num_micro_batches
    return _elements(num_parameters, world_size, {0: 2, 1: 2, 2: m + 1, 3: m}[stage])


@misconception(
    "elements_per_step",
    "At stage 3 you gather the parameters once for forward and backward together. They were freed "
    "after forward, so backward gathers them again.",
    see=TRAFFIC,
)
def gathers_once_for_both_passes(num_parameters, world_size, stage, num_micro_batches=1):
    m = num_micro_batches
    return _elements(num_parameters, world_size, {0: 2, 1: 2, 2: m + 1, 3: 2 * m}[stage])


@misconception(
    "elements_per_step",
    "You count one micro-batch. A rank that holds a part of the gradients cannot accumulate the "
    "whole: at stages 2 and 3 each micro-batch communicates.",
    see=TRAFFIC,
)
def forgets_accumulation(num_parameters, world_size, stage, num_micro_batches=1):
    return _elements(num_parameters, world_size, 3 if stage == 3 else 2)


@misconception(
    "elements_per_step",
    "You let every stage communicate for each micro-batch. Stages 0 and 1 keep whole gradients: "
    "they add them up at home and reduce once.",
    see=TRAFFIC,
)
def communicates_for_each_micro_batch(num_parameters, world_size, stage, num_micro_batches=1):
    m = num_micro_batches
    return _elements(num_parameters, world_size, {0: 2 * m, 1: m + 1, 2: m + 1, 3: 3 * m}[stage])


@misconception(
    "elements_per_step",
    "You leave out (N - 1)/N: in a ring each rank keeps its own part, and alone it sends nothing.",
    see=TRAFFIC,
)
def leaves_out_the_ring_factor(num_parameters, world_size, stage, num_micro_batches=1):
    m = num_micro_batches
    return float({0: 2, 1: 2, 2: m + 1, 3: 3 * m}[stage] * num_parameters)


@misconception(
    "elements_per_step",
    "You let stages 1 and 2 all-reduce gradients, as DDP does, and gather parameters on top. "
    "A rank needs its part of the gradient alone: a reduce-scatter, half of an all-reduce.",
    see=TRAFFIC,
)
def all_reduces_at_stages_1_and_2(num_parameters, world_size, stage, num_micro_batches=1):
    m = num_micro_batches
    return _elements(num_parameters, world_size, {0: 2, 1: 3, 2: 2 * m + 1, 3: 3 * m}[stage])


@alternative("elements_per_step")
def counts_operations(num_parameters, world_size, stage, num_micro_batches=1):
    one_pass = num_parameters - num_parameters / world_size
    reductions = 1 if stage < 2 else num_micro_batches
    gathers = 1 if stage < 3 else 2 * num_micro_batches
    return (reductions + gathers) * one_pass


@alternative("elements_per_step")
def adds_up_micro_batches(num_parameters, world_size, stage, num_micro_batches=1):
    each = num_parameters * (world_size - 1) / world_size
    if stage < 2:
        return 2 * each
    total = each if stage == 2 else 0.0
    for _ in range(num_micro_batches):
        total += each if stage == 2 else 3 * each
    return total


# zero1_step


def _part(comm, vector):
    return vector.chunk(comm.size)[comm.rank]


@misconception(
    "zero1_step",
    "Right values, but you all-reduce the gradient and throw most of it away. A reduce-scatter "
    "brings each rank its part for half the traffic.",
    see=STAGE_1,
)
def all_reduces_and_discards(comm, parameter, gradient, momentum, lr, beta=0.9):
    comm.all_reduce(gradient, "mean")
    momentum.mul_(beta).add_(_part(comm, gradient))
    return comm.all_gather(_part(comm, parameter) - lr * momentum)


@misconception(
    "zero1_step",
    "You sum the gradients over ranks. Each is a mean over its own rows, so the mean over all rows "
    "is their mean: the step is N times too large.",
    see=STAGE_1,
)
def sums_gradients(comm, parameter, gradient, momentum, lr, beta=0.9):
    momentum.mul_(beta).add_(comm.reduce_scatter(gradient))
    return comm.all_gather(_part(comm, parameter) - lr * momentum)


@misconception(
    "zero1_step",
    "You update from this rank's own gradient. Ranks then train on their own rows alone: reduce "
    "first.",
    see=STAGE_1,
)
def uses_its_own_gradient(comm, parameter, gradient, momentum, lr, beta=0.9):
    momentum.mul_(beta).add_(_part(comm, gradient))
    return comm.all_gather(_part(comm, parameter) - lr * momentum)


@misconception(
    "zero1_step",
    "Only your own part of the parameter is new: the others' updates never arrive. An all-gather "
    "brings them.",
    see=STAGE_1,
)
def forgets_to_gather(comm, parameter, gradient, momentum, lr, beta=0.9):
    momentum.mul_(beta).add_(comm.reduce_scatter(gradient, "mean"))
    new = parameter.clone()
    _part(comm, new).sub_(lr * momentum)
    return new


@misconception(
    "zero1_step",
    "Your momentum stays as it was: `momentum = ...` names a new tensor. Write into the old one: "
    "momentum.mul_(beta).add_(...).",
    see=STAGE_1,
)
def loses_the_momentum(comm, parameter, gradient, momentum, lr, beta=0.9):
    momentum = beta * momentum + comm.reduce_scatter(gradient, "mean")
    return comm.all_gather(_part(comm, parameter) - lr * momentum)


@misconception(
    "zero1_step",
    "You return this rank's part. Every rank computes with whole parameters at stage 1: gather "
    "them.",
    see=STAGE_1,
)
def returns_its_part(comm, parameter, gradient, momentum, lr, beta=0.9):
    momentum.mul_(beta).add_(comm.reduce_scatter(gradient, "mean"))
    return _part(comm, parameter) - lr * momentum


@alternative("zero1_step")
def divides_after_the_sum(comm, parameter, gradient, momentum, lr, beta=0.9):
    mean = comm.reduce_scatter(gradient) / comm.size
    momentum.copy_(beta * momentum + mean)
    return comm.all_gather(parameter.view(comm.size, -1)[comm.rank] - lr * momentum)


@alternative("zero1_step")
def gathers_into_a_copy(comm, parameter, gradient, momentum, lr, beta=0.9):
    new = parameter.clone()
    momentum.mul_(beta).add_(comm.reduce_scatter(gradient / comm.size))
    return comm.all_gather(_part(comm, parameter).sub(momentum, alpha=lr), out=new)


@alternative("zero1_step")
def gathers_the_momentum_as_the_update(comm, parameter, gradient, momentum, lr, beta=0.9):
    momentum.mul_(beta).add_(comm.reduce_scatter(gradient, "mean"))
    return parameter - lr * comm.all_gather(momentum)


# ShardedLinear


class _ShardedLinear(torch.autograd.Function):
    """A right one, of which a misconception bends one half."""

    @staticmethod
    def forward(ctx, x, shard, comm):
        ctx.comm = comm
        ctx.save_for_backward(x, shard)
        return x @ comm.all_gather(shard).T

    @staticmethod
    def backward(ctx, grad_y):
        x, shard = ctx.saved_tensors
        grad_x = grad_y @ ctx.comm.all_gather(shard)
        return grad_x, ctx.comm.reduce_scatter(grad_y.T @ x, "mean"), None


@misconception(
    "ShardedLinear",
    "You keep the whole weight for backward: an unsharded FSDP saves nothing where it counts. "
    "Save the shard, and gather again.",
    see=FSDP,
)
class keeps_the_whole_weight(_ShardedLinear):
    @staticmethod
    def forward(ctx, x, shard, comm):
        ctx.comm, weight = comm, comm.all_gather(shard)
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        return grad_y @ weight, ctx.comm.reduce_scatter(grad_y.T @ x, "mean"), None


@misconception(
    "ShardedLinear",
    "You gather again in backward, and yet ctx still holds the weight of the forward pass: freeing "
    "was forgotten. Memory is free when nobody refers to it.",
    see=FSDP,
)
class forgets_to_free_the_weight(_ShardedLinear):
    @staticmethod
    def forward(ctx, x, shard, comm):
        ctx.comm, ctx.weight = comm, comm.all_gather(shard)
        ctx.save_for_backward(x, shard)
        return x @ ctx.weight.T


@misconception(
    "ShardedLinear",
    "You all-reduce the whole gradient and cut your part out. A reduce-scatter gives the same "
    "part for half the traffic, and no rank holds the rest.",
    see=FSDP,
)
class all_reduces_and_cuts(_ShardedLinear):
    @staticmethod
    def backward(ctx, grad_y):
        x, shard = ctx.saved_tensors
        comm = ctx.comm
        mean = comm.all_reduce(grad_y.T @ x, "mean")
        return grad_y @ comm.all_gather(shard), mean.chunk(comm.size)[comm.rank], None


@misconception(
    "ShardedLinear",
    "You sum the gradients over ranks. Each rank's is of its own mean loss: take the mean.",
    see=FSDP,
)
class sums_over_ranks(_ShardedLinear):
    @staticmethod
    def backward(ctx, grad_y):
        x, shard = ctx.saved_tensors
        return grad_y @ ctx.comm.all_gather(shard), ctx.comm.reduce_scatter(grad_y.T @ x), None


@misconception(
    "ShardedLinear",
    "Your shard's gradient comes from this rank's rows alone: without a reduction, parts of one "
    "matrix are trained on different data.",
    see=FSDP,
)
class forgets_to_reduce(_ShardedLinear):
    @staticmethod
    def backward(ctx, grad_y):
        x, shard = ctx.saved_tensors
        comm = ctx.comm
        mine = (grad_y.T @ x).chunk(comm.size)[comm.rank]
        return grad_y @ comm.all_gather(shard), mine, None


@misconception(
    "ShardedLinear",
    "That is tensor parallelism: you multiply by your rows of W and gather outputs. In FSDP each "
    "rank has rows of the batch of its own: parameters travel, activations stay.",
    see=FSDP,
)
class splits_the_product(_ShardedLinear):
    @staticmethod
    def forward(ctx, x, shard, comm):
        ctx.comm = comm
        ctx.save_for_backward(x, shard)
        return comm.all_gather((x @ shard.T).T.contiguous()).T


@misconception(
    "ShardedLinear",
    "You average the input's gradient over ranks as well. The input is this rank's own rows: its "
    "gradient concerns nobody else.",
    see=FSDP,
)
class averages_the_input_gradient(_ShardedLinear):
    @staticmethod
    def backward(ctx, grad_y):
        grad_x, grad_shard, _ = _ShardedLinear.backward(ctx, grad_y)
        return ctx.comm.all_reduce(grad_x.clone(), "mean"), grad_shard, None


@alternative("ShardedLinear")
class transposes_the_gradient(_ShardedLinear):
    @staticmethod
    def backward(ctx, grad_y):
        x, shard = ctx.saved_tensors
        reduced = ctx.comm.reduce_scatter((x.T @ grad_y).T.contiguous() / ctx.comm.size)
        return torch.einsum("bf,fd->bd", grad_y, ctx.comm.all_gather(shard)), reduced, None


@alternative("ShardedLinear")
class gathers_beside_the_reduction(_ShardedLinear):
    @staticmethod
    def backward(ctx, grad_y):
        x, shard = ctx.saved_tensors
        handle = ctx.comm.all_gather(shard, async_op=True)
        mean = ctx.comm.reduce_scatter(grad_y.T @ x, "mean", async_op=True)
        return grad_y @ handle.wait(), mean.wait(), None


# prefetched_forward


@misconception(
    "prefetched_forward",
    "You gather a layer's weight when it is needed: the network is idle while you compute, and you "
    "while it works. Start the next gather before the product.",
    see=PREFETCH,
)
def gathers_when_needed(comm, x, shards):
    for shard in shards:
        x = x @ comm.all_gather(shard).T
    return x


@misconception(
    "prefetched_forward",
    "There is nothing between the next gather's start and its wait: asynchronous in name only. The "
    "product belongs between them.",
    see=PREFETCH,
)
def computes_outside_of_start_and_wait(comm, x, shards):
    weight = comm.all_gather(shards[0])
    for i in range(len(shards)):
        following = None
        if i + 1 < len(shards):
            following = comm.all_gather(shards[i + 1], async_op=True).wait()
        x = x @ weight.T
        weight = following
    return x


@misconception(
    "prefetched_forward",
    "All weights are in memory at once: all gathers were started together, or a list of handles is "
    "kept (a handle holds its result). One layer ahead is enough; drop each after use.",
    see=PREFETCH,
)
def holds_all_weights(comm, x, shards):
    handles = [comm.all_gather(shards[0], async_op=True)]
    for i in range(len(shards)):
        weight = handles[i].wait()
        if i + 1 < len(shards):
            handles.append(comm.all_gather(shards[i + 1], async_op=True))
        x = x @ weight.T
    return x


@misconception(
    "prefetched_forward",
    "You multiply by W where the layer multiplies by its transpose: rows of W are outputs, "
    "y = x W^T.",
    see=PREFETCH,
)
def multiplies_by_the_weight_itself(comm, x, shards):
    following = comm.all_gather(shards[0], async_op=True)
    for i in range(len(shards)):
        weight = following.wait()
        if i + 1 < len(shards):
            following = comm.all_gather(shards[i + 1], async_op=True)
        x = x @ weight
        del weight
    return x


@misconception(
    "prefetched_forward",
    "You start two layers ahead: three weights at once. One ahead hides as much, where a gather is "
    "as long as a product.",
    see=PREFETCH,
)
def runs_two_layers_ahead(comm, x, shards):
    handles = [comm.all_gather(shard, async_op=True) for shard in shards[:2]]
    for i in range(len(shards)):
        weight = handles.pop(0).wait()
        if i + 2 < len(shards):
            handles.append(comm.all_gather(shards[i + 2], async_op=True))
        x = x @ weight.T
        del weight
    return x


@alternative("prefetched_forward")
def starts_before_it_waits(comm, x, shards):
    following = comm.all_gather(shards[0], async_op=True)
    for shard in [*shards[1:], None]:
        current, following = following, None
        if shard is not None:
            following = comm.all_gather(shard, async_op=True)
        x = x @ current.wait().T
        del current
    return x


@alternative("prefetched_forward")
def uses_two_buffers(comm, x, shards):
    with comm.memory.category("communication_buffers"):
        rows = shards[0].shape[0] * comm.size
        buffers = [x.new_empty(rows, shards[0].shape[1]) for _ in range(2)]
    handle = comm.all_gather(shards[0], out=buffers[0], async_op=True)
    for i in range(len(shards)):
        weight = handle.wait()
        if i + 1 < len(shards):
            handle = comm.all_gather(shards[i + 1], out=buffers[(i + 1) % 2], async_op=True)
        x = torch.nn.functional.linear(x, weight)
    return x


# clip_sharded


def _squares(parts):
    return torch.stack([part.square().sum() for part in parts]).sum()


def _clipped(parts, norm, max_norm):
    factor = (max_norm / norm).clamp(max=1.0)
    return [part * factor for part in parts], norm


@misconception(
    "clip_sharded",
    "Each rank takes the norm of what it holds: ranks then clip by different factors, and the "
    "gradient changes its direction.",
    see=NORM,
    is_starter=True,
)
def clips_by_its_own_norm(comm, parts, max_norm):
    return _clipped(parts, _squares(parts).sqrt(), max_norm)


@misconception(
    "clip_sharded",
    "You add up norms. (3) and (4) make (3, 4), whose norm is 5, not 7: squares add up.",
    see=NORM,
)
def adds_up_norms(comm, parts, max_norm):
    return _clipped(parts, comm.all_reduce(_squares(parts).sqrt()), max_norm)


@misconception(
    "clip_sharded",
    "You average squares over ranks. Each rank holds other elements, so the squares add up: the "
    "norm comes out too small by the root of N.",
    see=NORM,
)
def averages_squares(comm, parts, max_norm):
    return _clipped(parts, comm.all_reduce(_squares(parts), "mean").sqrt(), max_norm)


@misconception(
    "clip_sharded",
    "You take the largest of the ranks' norms. All have the same factor now, and it is too large: "
    "the whole is longer than each of its parts.",
    see=NORM,
)
def takes_the_largest_norm(comm, parts, max_norm):
    return _clipped(parts, comm.all_reduce(_squares(parts).sqrt(), "max"), max_norm)


@misconception(
    "clip_sharded",
    "Your factor may exceed 1: a small gradient is blown up to max_norm. Clipping only shortens.",
    see=NORM,
)
def lengthens_small_gradients(comm, parts, max_norm):
    norm = comm.all_reduce(_squares(parts)).sqrt()
    return [part * (max_norm / norm) for part in parts], norm


@misconception(
    "clip_sharded",
    "You clip each tensor by its own norm. The limit is on all tensors together.",
    see=NORM,
)
def clips_each_tensor(comm, parts, max_norm):
    norm = comm.all_reduce(_squares(parts)).sqrt()
    return [p * (max_norm / p.norm()).clamp(max=1.0) for p in parts], norm


@misconception(
    "clip_sharded",
    "The root is missing: you return and clip by the sum of squares.",
    see=NORM,
)
def forgets_the_root(comm, parts, max_norm):
    return _clipped(parts, comm.all_reduce(_squares(parts)), max_norm)


@alternative("clip_sharded")
def gathers_the_norms(comm, parts, max_norm):
    norms = comm.all_gather(_squares(parts).sqrt().view(1))
    return _clipped(parts, norms.norm(), max_norm)


@alternative("clip_sharded")
def flattens_first(comm, parts, max_norm):
    flat = torch.cat([part.reshape(-1) for part in parts])
    norm = comm.all_reduce(flat @ flat).sqrt()
    return [part / max(1.0, norm.item() / max_norm) for part in parts], norm


# hybrid_reduce


@misconception(
    "hybrid_reduce",
    "Right values, but you all-reduce whole gradients between nodes, on the slow network. Reduce "
    "within the node first: then a part is left to send.",
    see=HYBRID,
)
def averages_between_nodes_first(shards, replicas, gradient):
    return shards.reduce_scatter(replicas.all_reduce(gradient, "mean"), "mean")


@misconception(
    "hybrid_reduce",
    "Nodes never hear of each other: copies of the model drift apart. After the reduce-scatter the "
    "parts of all nodes must be averaged.",
    see=HYBRID,
)
def forgets_the_replicas(shards, replicas, gradient):
    return shards.reduce_scatter(gradient, "mean")


@misconception(
    "hybrid_reduce",
    "You sum over the replicas. Each node's part is a mean already: average them.",
    see=HYBRID,
)
def sums_over_replicas(shards, replicas, gradient):
    return replicas.all_reduce(shards.reduce_scatter(gradient, "mean"))


@misconception(
    "hybrid_reduce",
    "You sum within the node. The loss is a mean over all rows: divide by the ranks of the node as "
    "well.",
    see=HYBRID,
)
def sums_over_shards(shards, replicas, gradient):
    return replicas.all_reduce(shards.reduce_scatter(gradient), "mean")


@misconception(
    "hybrid_reduce",
    "You all-reduce within the node and cut your part out: twice the traffic of a reduce-scatter, "
    "for the same part.",
    see=HYBRID,
)
def all_reduces_within_the_node(shards, replicas, gradient):
    whole = shards.all_reduce(gradient, "mean")
    return replicas.all_reduce(whole.chunk(shards.size)[shards.rank].clone(), "mean")


@misconception(
    "hybrid_reduce",
    "You return the whole gradient. This rank owns a part of the parameters, and needs its alone.",
    see=HYBRID,
)
def returns_the_whole_gradient(shards, replicas, gradient):
    return replicas.all_reduce(shards.all_reduce(gradient, "mean"), "mean")


@alternative("hybrid_reduce")
def divides_at_the_end(shards, replicas, gradient):
    part = replicas.all_reduce(shards.reduce_scatter(gradient))
    return part / (shards.size * replicas.size)


@alternative("hybrid_reduce")
def all_reduces_by_its_two_halves(shards, replicas, gradient):
    part = shards.reduce_scatter(gradient / shards.size)
    if part.numel() % replicas.size:
        return replicas.all_reduce(part / replicas.size)
    return replicas.all_gather(replicas.reduce_scatter(part, "mean"))


# reshard


def _padded(flat, world_size):
    length = math.ceil(flat.numel() / world_size)
    return torch.cat([flat, flat.new_zeros(length * world_size - flat.numel())]), length


@misconception(
    "reshard",
    "The old padding is still there: it belongs to N ranks. Cut the vector to its `numel` elements "
    "before you pad for M.",
    see=RESHARD,
)
def keeps_the_old_padding(parts, numel, world_size):
    flat, length = _padded(torch.cat(parts), world_size)
    return list(flat.split(length))


@misconception(
    "reshard",
    "You cut without padding: parts differ in length, and collectives want them equal.",
    see=RESHARD,
)
def cuts_without_padding(parts, numel, world_size):
    return list(torch.cat(parts)[:numel].tensor_split(world_size))


@misconception(
    "reshard",
    "You round the length down and lose the last elements: round up, and pad.",
    see=RESHARD,
)
def rounds_down(parts, numel, world_size):
    length = numel // world_size
    flat = torch.cat(parts)[:numel]
    return [flat[r * length : (r + 1) * length] for r in range(world_size)]


@misconception(
    "reshard",
    "You deal elements out in turn, one to each rank. Parts are contiguous: rank r has elements "
    "from r n on.",
    see=RESHARD,
)
def deals_elements_in_turn(parts, numel, world_size):
    flat, _ = _padded(torch.cat(parts)[:numel], world_size)
    return [flat[rank::world_size].clone() for rank in range(world_size)]


@misconception(
    "reshard",
    "You pad in front. Zeros come at the end of the vector, so that the elements' places do not "
    "depend on the number of ranks.",
    see=RESHARD,
)
def pads_in_front(parts, numel, world_size):
    flat = torch.cat(parts)[:numel]
    padded, length = _padded(flat, world_size)
    return list(torch.cat([padded[numel:], flat]).split(length))


@misconception(
    "reshard",
    "You cut each old part into M and join the pieces: a new part then has pieces from everywhere. "
    "Join the parts first.",
    see=RESHARD,
)
def cuts_each_old_part(parts, numel, world_size):
    pieces = [_padded(part, world_size) for part in parts]
    return [torch.cat([flat[r * n : (r + 1) * n] for flat, n in pieces]) for r in range(world_size)]


@alternative("reshard")
def fills_a_matrix(parts, numel, world_size):
    length = (numel + world_size - 1) // world_size
    table = parts[0].new_zeros(world_size, length)
    table.view(-1)[:numel] = torch.cat(parts)[:numel]
    return list(table.unbind())


@alternative("reshard")
def reads_what_each_rank_needs(parts, numel, world_size):
    old, new = parts[0].numel(), math.ceil(numel / world_size)
    found = []
    for rank in range(world_size):
        part = parts[0].new_zeros(new)
        for i in range(rank * new, min((rank + 1) * new, numel)):
            part[i - rank * new] = parts[i // old][i % old]
        found.append(part)
    return found


# choose_stage


def _states(p, n):
    return [16 * p, 4 * p + 12 * p / n, 2 * p + 14 * p / n, 16 * p / n]


def _first(states, budget):
    for stage, held in enumerate(states):
        if held <= budget:
            return stage
    raise ValueError("budget_bytes: not enough at any stage")


@misconception(
    "choose_stage",
    "You divide activations by N at stage 3. ZeRO shards the model's states; each rank's rows are "
    "its own, and their activations stay whole at every stage.",
    see=WHICH,
)
def shards_activations_at_stage_3(num_parameters, activation_bytes, world_size, budget_bytes):
    held = [states + activation_bytes for states in _states(num_parameters, world_size)]
    held[3] = (16 * num_parameters + activation_bytes) / world_size
    return _first(held, budget_bytes)


@misconception(
    "choose_stage",
    "You leave activations out: what remains beside the states must hold them.",
    see=WHICH,
)
def leaves_activations_out(num_parameters, activation_bytes, world_size, budget_bytes):
    return _first(_states(num_parameters, world_size), budget_bytes)


@misconception(
    "choose_stage",
    "You take the highest stage that fits. Stage 3 fits best, and costs half as much traffic "
    "again: take the lowest.",
    see=WHICH,
)
def takes_the_highest_stage(num_parameters, activation_bytes, world_size, budget_bytes):
    held = [states + activation_bytes for states in _states(num_parameters, world_size)]
    return 3 - _first(held[::-1], budget_bytes)


@misconception(
    "choose_stage",
    "You shard the parameters at stage 2 already: they stay whole until stage 3.",
    see=WHICH,
)
def shards_parameters_before_stage_3(num_parameters, activation_bytes, world_size, budget_bytes):
    states = _states(num_parameters, world_size)
    states[2] = states[3]
    return _first([held + activation_bytes for held in states], budget_bytes)


@misconception(
    "choose_stage",
    "You leave out the float32 master weights: the optimizer has 12 bytes a parameter, not 8.",
    see=WHICH,
)
def forgets_master_weights(num_parameters, activation_bytes, world_size, budget_bytes):
    p, n = num_parameters, world_size
    states = [12 * p, 4 * p + 8 * p / n, 2 * p + 10 * p / n, 12 * p / n]
    return _first([held + activation_bytes for held in states], budget_bytes)


@misconception(
    "choose_stage",
    "You give up a budget that is filled exactly: 'to the last byte' is enough.",
    see=WHICH,
)
def wants_a_byte_to_spare(num_parameters, activation_bytes, world_size, budget_bytes):
    held = [states + activation_bytes for states in _states(num_parameters, world_size)]
    return _first(held, budget_bytes - 0.5)


@alternative("choose_stage")
def subtracts_activations_first(num_parameters, activation_bytes, world_size, budget_bytes):
    return _first(_states(num_parameters, world_size), budget_bytes - activation_bytes)


@alternative("choose_stage")
def goes_through_sizes(num_parameters, activation_bytes, world_size, budget_bytes):
    whole, sharded = [2, 2, 12], 0.0
    for stage in range(4):
        if stage:
            sharded += whole.pop() / world_size
        if num_parameters * (sum(whole) + sharded) + activation_bytes <= budget_bytes:
            return stage
    raise ValueError("budget_bytes: not enough at any stage")
