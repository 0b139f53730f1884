# Exercise f0d294506781: write your answers below, and leave this line as it is.
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
    raise NotImplementedError("one_f_one_b_order: not written yet")


def bubble_fraction(schedule, num_ranks, num_micro, num_chunks=1):
    """Time in which a rank waits, as a fraction of the time in which it computes.

    schedule: "GPipe", "1F1B" or "interleaved", which has num_chunks smaller stages on each rank
    num_ranks: p    num_micro: m, at least p. All stages take the same time; messages take none.
    returns a number

    Source: Narayanan et al., arXiv 2104.04473, sec. 2.2.
    """
    raise NotImplementedError("bubble_fraction: not written yet")


def live_micro_batches(schedule, rank, num_ranks, num_micro):
    """Of how many micro-batches a rank keeps activations at most, at the same time.

    schedule: "GPipe" or "1F1B"    rank: its stage, 0 to num_ranks - 1
    A micro-batch's activations are kept from the beginning of its forward to the end of its
    backward on this rank.
    returns an integer
    """
    raise NotImplementedError("live_micro_batches: not written yet")


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
    raise NotImplementedError("pipelined_gradient: not written yet")


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
    with torch.no_grad():
        y = layer(x, generator)
    leaf = x.detach().clone().requires_grad_()
    layer(leaf, generator).backward(grad)
    return y, leaf.grad


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
    raise NotImplementedError("parallel_groups: not written yet")


def best_num_micro(num_ranks, compute_seconds, overhead_seconds, candidates):
    """Into how many micro-batches a batch should be cut.

    num_ranks: p    compute_seconds: forward and backward of the whole batch on one stage
    overhead_seconds: what each micro-batch costs on a stage beside its share of that (launching,
    small matrices)    candidates: a list of possible numbers of micro-batches
    returns the one with the shortest step

    The first micro-batch has to get through all p stages, the others follow one behind the other.
    """

    raise NotImplementedError("best_num_micro: not written yet")


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
    raise NotImplementedError("first_rank_bytes: not written yet")


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

    raise NotImplementedError("fastest_plan: not written yet")
