"""Chapter 15: pipelines, recomputation and 3D parallelism."""

import torch

from reference.parallel.ranks import CLASSROOM, run


def one_f_one_b_order(rank, num_ranks, num_micro):
    """What one rank of a pipeline does, in order, under 1F1B.

    rank: its stage, 0 to num_ranks - 1    num_micro: m, at least 1
    returns a list of 2 m pairs: ("F", i) or ("B", i), i the micro-batch from 0 on

    The rank begins with as many forwards as there are stages after it (no more than m). Then one
    forward and one backward in turns, and backwards alone at the end. Micro-batches go in order.

    Source: Narayanan et al., arXiv 2104.04473, sec. 2.2.
    """
    # BEGIN SOLUTION
    warm_up = min(num_ranks - 1 - rank, num_micro)
    order = [("F", i) for i in range(warm_up)]
    for i in range(num_micro - warm_up):
        order += [("F", warm_up + i), ("B", i)]
    return order + [("B", i) for i in range(num_micro - warm_up, num_micro)]
    # END SOLUTION


def bubble_fraction(schedule, num_ranks, num_micro, num_chunks=1):
    """Time in which a rank waits, as a fraction of the time in which it computes.

    schedule: "GPipe", "1F1B" or "interleaved", which has num_chunks smaller stages on each rank
    num_ranks: p    num_micro: m, at least p. All stages take the same time; messages take none.
    returns a number

    Source: Narayanan et al., arXiv 2104.04473, sec. 2.2.
    """
    # BEGIN SOLUTION
    chunks = num_chunks if schedule == "interleaved" else 1
    return (num_ranks - 1) / (chunks * num_micro)
    # END SOLUTION


def live_micro_batches(schedule, rank, num_ranks, num_micro):
    """Of how many micro-batches a rank keeps activations at most, at the same time.

    schedule: "GPipe" or "1F1B"    rank: its stage, 0 to num_ranks - 1
    A micro-batch's activations are kept from the beginning of its forward to the end of its
    backward on this rank.
    returns an integer
    """
    # BEGIN SOLUTION
    return num_micro if schedule == "GPipe" else min(num_micro, num_ranks - rank)
    # END SOLUTION


def pipelined_gradient(comm, weight, inputs, targets):
    """One training step of a chain of linear layers, one layer on each rank of `comm`.

    weight: (D, D), this rank's: it computes y = x W^T of what the previous rank has computed
    inputs: a list of m micro-batches (B, D), which only rank 0 may use
    targets: a list of m (B, D), which only the last rank may use
    returns (D, D): the gradient for this rank's weight of the loss, the mean of (y - target)^2
    over all elements of all micro-batches, y the last rank's output

    Activations go to the next rank, gradients come back to the previous one, by comm.send(t, dst)
    and comm.recv(t, src), which fills t. Each micro-batch travels alone; GPipe's order, all
    forwards before all backwards, is good enough.

    Source: GPipe, arXiv 1811.06965.
    """
    # BEGIN SOLUTION
    is_first, is_last = comm.rank == 0, comm.rank == comm.size - 1
    kept, grad_weight = [], torch.zeros_like(weight)
    for i in range(len(inputs)):
        place = torch.empty_like(inputs[i])
        x = inputs[i] if is_first else comm.recv(place, comm.rank - 1)
        y = x @ weight.T
        kept.append((x, y))
        if not is_last:
            comm.send(y, comm.rank + 1)
    for i, (x, y) in enumerate(kept):
        if is_last:
            grad = 2 * (y - targets[i]) / (y.numel() * len(inputs))
        else:
            grad = comm.recv(torch.empty_like(y), comm.rank + 1)
        grad_weight += grad.T @ x
        if not is_first:
            comm.send(grad @ weight, comm.rank - 1)
    return grad_weight
    # END SOLUTION


def run_pipelined_gradient(weights, inputs, targets):
    """Call pipelined_gradient on simulated ranks, one for each of `weights`. Given: do not change.

    returns a dict: gradients, sent (bytes), by rank; seconds (virtual, until all are done)
    """

    def program(comm):
        nothing = [torch.full_like(x, torch.nan) for x in inputs]
        mine = [x.clone() for x in inputs] if comm.rank == 0 else nothing
        wanted = [t.clone() for t in targets] if comm.rank == comm.size - 1 else nothing
        found = pipelined_gradient(comm, weights[comm.rank].clone(), mine, wanted)
        return found.clone(), comm.traffic.total().wire_bytes

    done = run(len(weights), program, hardware=CLASSROOM)
    gradients, sent = zip(*done.results, strict=True)
    return {"gradients": list(gradients), "sent": list(sent), "seconds": done.trace.seconds}


def recomputed_gradient(layer, x, grad, generator):
    """Backward through a layer with dropout whose activations were thrown away.

    layer: layer(x, generator) -> y draws its dropout mask from `generator`
    x: the layer's input, without a graph    grad: of its output
    generator: a torch.Generator
    returns (y, grad_x): the output of one forward, and the gradient of x of that same forward

    First comes a forward under torch.no_grad(), of which only y and what is needed to repeat it may
    be kept. Then the layer runs again, with a graph, and backward. Afterwards `generator` stands
    where a single forward leaves it. The program that stands here trains, somewhat worse.
    """
    # BEGIN SOLUTION
    before = generator.get_state()
    with torch.no_grad():
        y = layer(x, generator)
    after = generator.get_state()
    generator.set_state(before)
    leaf = x.detach().clone().requires_grad_()
    layer(leaf, generator).backward(grad)
    generator.set_state(after)
    return y, leaf.grad
    # STARTER
    # | with torch.no_grad():
    # |     y = layer(x, generator)
    # | leaf = x.detach().clone().requires_grad_()
    # | layer(leaf, generator).backward(grad)
    # | return y, leaf.grad
    # END SOLUTION


def parallel_groups(world_size, tp, pp):
    """The groups of ranks in Megatron's 3D parallelism.

    tp: ranks of a tensor-parallel group, neighbours: they talk most, and share a node
    pp: stages of the pipeline, as far apart as possible
    Data parallelism has the rest: world_size / (tp pp) copies of the model.
    returns a dict {"tp": groups, "dp": groups, "pp": groups}: lists of lists of ranks, each group
    in ascending order, groups in the order of their first rank

    With 16 ranks, tp = 2, pp = 4: [0, 1] is a tensor group, [0, 2] a data group, [0, 4, 8, 12] a
    pipeline.

    Source: the docstring of initialize_model_parallel in Megatron-LM's parallel_state.py.
    """
    # BEGIN SOLUTION
    dp = world_size // (tp * pp)
    grid = torch.arange(world_size).view(pp, dp, tp)
    return {
        "tp": grid.reshape(-1, tp).tolist(),
        "dp": grid.transpose(1, 2).reshape(-1, dp).tolist(),
        "pp": grid.reshape(pp, -1).T.tolist(),
    }
    # END SOLUTION


def best_num_micro(num_ranks, compute_seconds, overhead_seconds, candidates):
    """Into how many micro-batches a batch should be cut.

    num_ranks: p    compute_seconds: forward and backward of the whole batch on one stage
    overhead_seconds: what each micro-batch costs on a stage beside its share of that (launching,
    small matrices)    candidates: a list of possible numbers of micro-batches
    returns the one with the shortest step

    The first micro-batch has to get through all p stages, the others follow one behind the other.
    """

    # BEGIN SOLUTION
    def step(m):
        return (m + num_ranks - 1) * (compute_seconds / m + overhead_seconds)

    return min(candidates, key=step)
    # END SOLUTION


def first_rank_bytes(model, plan):
    """Bytes that the first rank of a pipeline holds at most, in 16 bits with Adam.

    model: a dict: num_layers, layer_parameters (of one layer), embedding_parameters, dim, seq_len
    plan: a dict: tp, pp, dp, zero_stage (0 to 3), num_micro (micro-batches a step, of one sequence
    each), recompute ("none" or "full")

    Parameters take 2 bytes, gradients 2, Adam 12; tensor ranks divide them, and then ZeRO divides
    optimizer states (from stage 1 on), gradients (2), parameters (3) among the dp copies. The rank
    has num_layers / pp layers and the embedding. The schedule is 1F1B. With sequence parallelism
    and fused attention a layer keeps 34 seq_len dim / tp bytes of each micro-batch in flight; under
    full recomputation 2 seq_len dim / tp, and the one layer at work its 34 in place of the 2.
    Buffers and gathered copies do not count.
    returns a number
    """
    # BEGIN SOLUTION
    layers = model["num_layers"] / plan["pp"]
    held = layers * model["layer_parameters"] + model["embedding_parameters"]
    shares = [plan["dp"] if plan["zero_stage"] >= first else 1 for first in (3, 2, 1)]
    states = sum(b * held / plan["tp"] / n for b, n in zip((2, 2, 12), shares, strict=True))
    stream = model["seq_len"] * model["dim"] / plan["tp"]
    in_flight = min(plan["pp"], plan["num_micro"])
    if plan["recompute"] == "full":
        return states + (2 * in_flight * layers + 32) * stream
    return states + 34 * in_flight * layers * stream
    # END SOLUTION


def fastest_plan(model, cluster, num_sequences):
    """The layout with the shortest step among those that fit, and its seconds.

    model: a dict: num_layers, layer_parameters, dim, seq_len
    cluster: a dict: num_gpus, ranks_per_node, memory_bytes, flops_per_second, and in bytes a second
    intra (within a node) and inter (between nodes), for each GPU
    num_sequences: of a step; a micro-batch is one sequence
    returns ((tp, pp, dp), seconds)

    Try all tp pp dp = num_gpus with tp a divisor of dim, pp of num_layers, dp of num_sequences, and
    m = num_sequences / dp. With P the parameters of a rank, num_layers layer_parameters / (tp pp):

        memory    4 P + 12 P / dp (ZeRO-1) + 34 seq_len dim / tp bytes for each of its layers and
                  each micro-batch in flight, min(pp, m); it must not exceed memory_bytes
        micro     6 P seq_len / flops_per_second, and for each of its layers 4 all-reduces of
                  2 seq_len dim bytes among the tp ranks
        step      (m + pp - 1) micro, and the sum of gradients among the dp ranks: one all-reduce of
                  2 P bytes, which nothing hides

    An all-reduce of n bytes among r ranks takes 2 (r - 1) / r n / bandwidth: intra where the group
    fits into a node, inter otherwise. Tensor ranks are neighbours; data ranks stand tp apart, so
    they need tp dp ranks to fit.

    Raises: ValueError where no layout fits.
    """

    # BEGIN SOLUTION
    def all_reduce(num_bytes, ranks, stretch):
        is_near = stretch <= cluster["ranks_per_node"]
        bandwidth = cluster["intra"] if is_near else cluster["inter"]
        return 2 * (ranks - 1) / ranks * num_bytes / bandwidth

    def weigh(tp, pp, dp):
        m, layers = num_sequences // dp, model["num_layers"] // pp
        parameters = layers * model["layer_parameters"] / tp
        stream = model["seq_len"] * model["dim"]
        kept = 34 * stream / tp * layers * min(pp, m)
        if 4 * parameters + 12 * parameters / dp + kept > cluster["memory_bytes"]:
            return None
        micro = 6 * parameters * model["seq_len"] / cluster["flops_per_second"]
        micro += layers * 4 * all_reduce(2 * stream, tp, tp)
        return (m + pp - 1) * micro + all_reduce(2 * parameters, dp, tp * dp)

    gpus, best = cluster["num_gpus"], None
    for tp in range(1, gpus + 1):
        for pp in range(1, gpus // tp + 1):
            dp, left = divmod(gpus, tp * pp)
            if left or model["dim"] % tp or model["num_layers"] % pp or num_sequences % dp:
                continue
            seconds = weigh(tp, pp, dp)
            if seconds is not None and (best is None or seconds < best[1]):
                best = ((tp, pp, dp), seconds)
    if best is None:
        raise ValueError("no layout fits: more GPUs, or more memory")
    return best
    # END SOLUTION
