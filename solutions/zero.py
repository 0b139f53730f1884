"""Chapter 12: ZeRO and FSDP."""

import torch

from reference.parallel.ranks import CLASSROOM, run


def zero_memory(num_parameters, world_size, stage, optimizer_bytes=12):
    """Bytes that one rank keeps from step to step, in mixed precision, at each stage of ZeRO.

    num_parameters: P    world_size: N    stage: 0 (plain data parallel), 1, 2 or 3
    returns a tuple of three numbers: bytes of parameters, of gradients, of optimizer states

    A parameter and a gradient have 2 bytes each; the optimizer keeps `optimizer_bytes` for each
    parameter (Adam: 12, the float32 master weight, momentum and variance). What a stage shards is
    divided by N exactly, without padding.

    Source: ZeRO, arXiv 1910.02054, fig. 1.
    """
    # BEGIN SOLUTION
    parameters, gradients, states = (
        size * num_parameters / (world_size if stage >= first else 1)
        for size, first in ((2, 3), (2, 2), (optimizer_bytes, 1))
    )
    return parameters, gradients, states
    # END SOLUTION


def elements_per_step(num_parameters, world_size, stage, num_micro_batches=1):
    """Elements that one rank sends in an optimizer step of several accumulated micro-batches.

    num_parameters: P    world_size: N    stage: 0, 1, 2 or 3    num_micro_batches: m
    returns a number

    All collectives are rings: an all-gather or a reduce-scatter of P elements sends P (N-1)/N, an
    all-reduce twice that. Stages 0 and 1 keep whole gradients, so they accumulate them at home and
    communicate once. Stage 2 holds a part of the gradients only, so each micro-batch's must leave.
    Stage 3 gathers parameters for each forward and again for each backward pass, and its gradients
    leave as in stage 2.

    Source: ZeRO, arXiv 1910.02054, sec. 7, for m = 1.
    """
    # BEGIN SOLUTION
    m = num_micro_batches
    passes = {0: 2, 1: 2, 2: m + 1, 3: 3 * m}[stage]
    return passes * num_parameters * (world_size - 1) / world_size
    # END SOLUTION


def zero1_step(comm, parameter, gradient, momentum, lr, beta=0.9):
    """One step of SGD with momentum at ZeRO stage 1, on one rank of `comm`.

    parameter: (P,) the same on all ranks; P divides by comm.size
    gradient: (P,) of this rank's rows; the step takes the mean over ranks
    momentum: (P / N,) this rank's part: elements [rank P/N, (rank + 1) P/N). Update it in place.
    returns the new parameter, (P,), the same on all ranks; leaves `parameter` as it is

    For each element, with g its mean gradient:  m <- beta m + g;  p <- p - lr m.

    No rank may send more than two passes of the ring: 2 P (N-1)/N elements in all.

    Source: ZeRO, arXiv 1910.02054, sec. 5.1.
    """
    # BEGIN SOLUTION
    size = momentum.numel()
    mine = parameter[comm.rank * size : (comm.rank + 1) * size]
    momentum.mul_(beta).add_(comm.reduce_scatter(gradient, "mean"))
    return comm.all_gather(mine - lr * momentum)
    # END SOLUTION


def run_zero1_step(parameter, gradients, momentum, lr, beta):
    """Call zero1_step on simulated ranks, one for each of `gradients`. Given: do not change.

    returns a dict: parameters, momenta (lists, one a rank), sent (elements, by rank)
    """

    def program(comm):
        part = momentum.chunk(comm.size)[comm.rank].clone()
        new = zero1_step(comm, parameter.clone(), gradients[comm.rank].clone(), part, lr, beta)
        if new is None:
            raise TypeError("zero1_step: expected the new parameter, got None")
        return new.clone(), part, comm.traffic.total().wire_bytes / parameter.element_size()

    done = run(len(gradients), program, is_measured=False).results
    return {name: [r[i] for r in done] for i, name in enumerate(("parameters", "momenta", "sent"))}


class ShardedLinear(torch.autograd.Function):
    """y = x W^T, of whose W (F, D) each rank of `comm` keeps F / N rows; one layer of FSDP.

    `ShardedLinear.apply(x, shard, comm)`: x (B, D), this rank's rows of the batch; shard (F/N, D),
    this rank's rows of W.

    Forward gathers W, computes, and forgets W: until backward a rank holds x and its shard alone.
    Backward gathers W again for dx = dy W, and returns for the shard the mean over ranks of
    dW = dy^T x, of which it gets its own rows alone, without anybody receiving the rest.

    Source: FSDP, arXiv 2304.11277, sec. 3.
    """

    @staticmethod
    def forward(ctx, x, shard, comm):
        # BEGIN SOLUTION
        ctx.comm = comm
        ctx.save_for_backward(x, shard)
        return x @ comm.all_gather(shard).T
        # END SOLUTION

    @staticmethod
    def backward(ctx, grad_y):
        """Gradients of x and shard, and None for comm."""
        # BEGIN SOLUTION
        x, shard = ctx.saved_tensors
        grad_x = grad_y @ ctx.comm.all_gather(shard)
        grad_shard = ctx.comm.reduce_scatter(grad_y.T @ x, "mean")
        return grad_x, grad_shard, None
        # END SOLUTION


def run_sharded_linear(xs, weight, grads):
    """Call ShardedLinear on simulated ranks, one for each of `xs`. Given: do not change.

    returns a dict of lists, one entry a rank: outputs, grad_x, grad_shard, gathered and reduced
    (elements sent by all-gathers, and by all else), held_bytes (between forward and backward,
    beyond input, shard and output)
    """

    def program(comm):
        x = xs[comm.rank].clone().requires_grad_()
        shard = weight.chunk(comm.size)[comm.rank].clone().requires_grad_()
        comm.memory.label([x, shard], "parameters")
        y = ShardedLinear.apply(x, shard, comm)
        use = comm.memory.use.current
        held = sum(use.values()) - use["parameters"] - y.nbytes
        y.backward(grads[comm.rank])
        size = weight.element_size()
        gathered = comm.traffic.total(operation="all_gather").wire_bytes / size
        rest = comm.traffic.total().wire_bytes / size - gathered
        return y.detach(), x.grad, shard.grad, gathered, rest, float(held)

    names = ("outputs", "grad_x", "grad_shard", "gathered", "reduced", "held_bytes")
    done = run(len(xs), program).results
    return {name: [result[i] for result in done] for i, name in enumerate(names)}


def prefetched_forward(comm, x, shards):
    """A chain of linear layers, the next layer's weight travelling while this one computes.

    x: (B, D), this rank's rows    shards: a list of (D / N, D), this rank's rows of each W (D, D)
    returns (B, D): x, then x W^T for each layer in turn

    comm.all_gather(shard, async_op=True) returns a handle at once; its wait() gives W. Start layer
    i + 1's before layer i computes, and never hold more than two whole weights: a list that keeps
    all handles keeps all weights.

    Source: FSDP, arXiv 2304.11277, sec. 3.3.2.
    """
    # BEGIN SOLUTION
    following = comm.all_gather(shards[0], async_op=True)
    for i in range(len(shards)):
        weight = following.wait()
        if i + 1 < len(shards):
            following = comm.all_gather(shards[i + 1], async_op=True)
        x = x @ weight.T
        del weight
    return x
    # END SOLUTION


def run_prefetched_forward(xs, weights):
    """Call prefetched_forward on simulated ranks, one for each of `xs`. Given: do not change.

    returns a dict: outputs (a list, one a rank), weights_held (the most at once, in whole weights),
    seconds (on the virtual clock), by rank
    """

    def program(comm):
        x = xs[comm.rank].clone()
        shards = [weight.chunk(comm.size)[comm.rank].clone() for weight in weights]
        with torch.no_grad():
            y = prefetched_forward(comm, x, shards)
        if y is None:
            raise TypeError("prefetched_forward: expected the last output, got None")
        held = comm.memory.use.peak["communication_buffers"] / weights[0].nbytes
        return y.clone(), held, comm.now_seconds

    done = run(len(xs), program, hardware=CLASSROOM).results
    names = ("outputs", "weights_held", "seconds")
    return {name: [result[i] for result in done] for i, name in enumerate(names)}


def clip_sharded(comm, parts, max_norm):
    """Clip a gradient of which each rank holds some parts, by the norm of the whole.

    parts: a list of tensors of any shapes, this rank's share; other ranks hold the others
    max_norm: a positive number
    returns (clipped, norm): a list of new tensors, parts * min(1, max_norm / norm), and the norm
    of all elements on all ranks before clipping, a tensor () that is the same on each rank

    Norms do not add up. What does? The program that stands here ran for weeks before somebody
    noticed that ranks clipped by different factors.
    """
    # BEGIN SOLUTION
    squares = sum((part.square().sum() for part in parts), torch.zeros((), dtype=parts[0].dtype))
    norm = comm.all_reduce(squares).sqrt()
    factor = (max_norm / norm).clamp(max=1.0)
    return [part * factor for part in parts], norm
    # STARTER
    # | norm = torch.stack([part.norm() for part in parts]).norm()
    # | factor = (max_norm / norm).clamp(max=1.0)
    # | return [part * factor for part in parts], norm
    # END SOLUTION


def run_clip_sharded(parts_of_ranks, max_norm):
    """Call clip_sharded on simulated ranks, one for each of `parts_of_ranks`. Given: do not change.

    returns a dict of lists, one entry a rank: clipped, norms
    """

    def program(comm):
        given = [part.clone() for part in parts_of_ranks[comm.rank]]
        clipped, norm = clip_sharded(comm, given, max_norm)
        return [part.clone() for part in clipped], norm.clone()

    done = run(len(parts_of_ranks), program, is_measured=False).results
    return {"clipped": [clipped for clipped, _ in done], "norms": [norm for _, norm in done]}


def hybrid_reduce(shards, replicas, gradient):
    """Reduce a gradient in hybrid sharding: parts within a node, copies between nodes.

    shards: the group of this rank's node, whose ranks hold the parts of one copy of the model
    replicas: the group of the ranks, one on each node, that hold the same part as this one
    gradient: (P,) of this rank's rows; P divides by shards.size
    returns (P / shards.size,): this rank's part of the mean gradient over all ranks of all nodes

    Between nodes a rank may send 2 (M-1)/M of its part, for M nodes: not of the whole gradient.

    Source: FSDP, arXiv 2304.11277, sec. 3.2.2.
    """
    # BEGIN SOLUTION
    part = shards.reduce_scatter(gradient, "mean")
    return replicas.all_reduce(part, "mean")
    # END SOLUTION


def run_hybrid_reduce(gradients, ranks_per_node):
    """Call hybrid_reduce on simulated ranks, one for each of `gradients`. Given: do not change.

    returns a dict of lists, one entry a rank: parts, within and between (elements sent)
    """

    def program(comm):
        mesh = comm.mesh(replicas=-1, shards=ranks_per_node)
        part = hybrid_reduce(mesh.shards, mesh.replicas, gradients[comm.rank].clone())
        if part is None:
            raise TypeError("hybrid_reduce: expected this rank's part, got None")
        size = gradients[0].element_size()
        sent = [comm.traffic.total(group=g).wire_bytes / size for g in ("shards", "replicas")]
        return part.clone(), *sent

    done = run(len(gradients), program, is_measured=False).results
    names = ("parts", "within", "between")
    return {name: [result[i] for result in done] for i, name in enumerate(names)}


def reshard(parts, numel, world_size):
    """Cut a flat vector that N ranks saved anew, for another number of ranks.

    parts: a list of N tensors (n,): the vector of `numel` elements in order, then zeros, so that
    all parts are equally long and as short as possible
    numel: how many elements are real    world_size: M
    returns a list of M tensors: the same elements for M ranks, by the same rule
    """
    # BEGIN SOLUTION
    flat = torch.cat(parts)[:numel]
    length = -(-numel // world_size)
    padded = torch.cat([flat, flat.new_zeros(length * world_size - numel)])
    return [part.clone() for part in padded.split(length)] if length else [padded] * world_size
    # END SOLUTION


def choose_stage(num_parameters, activation_bytes, world_size, budget_bytes):
    """The lowest stage of ZeRO at which a rank's memory suffices; lower stages send less.

    num_parameters: P    activation_bytes: of one rank's micro-batch, beside the model's states
    world_size: N    budget_bytes: of one rank, to be filled to the last byte if need be
    returns 0, 1, 2 or 3; raises a ValueError if it does not fit at any stage

    Model states are those of zero_memory with Adam: 2 + 2 + 12 bytes a parameter, sharded as the
    stage has it. What ZeRO does to activations is for you to say.
    """
    # BEGIN SOLUTION
    for stage in range(4):
        if sum(zero_memory(num_parameters, world_size, stage)) + activation_bytes <= budget_bytes:
            return stage
    raise ValueError(f"budget_bytes: {budget_bytes} are not enough at any stage")
    # END SOLUTION
