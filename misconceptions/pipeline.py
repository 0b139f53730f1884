"""Chapter 15: wrong answers that people give, and right ones in another form."""

import torch

from autograder import alternative, misconception

STAGES = "2. Stages and micro-batches"
BUBBLE = "3. The bubble"
ORDER = "4. 1F1B"
HOW_MANY = "5. How many micro-batches"
RECOMPUTE = "6. Recomputation"
GROUPS = "7. Three dimensions"


# one_f_one_b_order


def _order(warm_up, m, *, is_backward_first=False):
    warm_up = max(0, min(warm_up, m))
    order, back = [("F", i) for i in range(warm_up)], 0
    for i in range(warm_up, m):
        pair = [("F", i), ("B", back)]
        order += pair[::-1] if is_backward_first and warm_up else pair
        back += 1
    return order + [("B", i) for i in range(back, m)]


@misconception(
    "one_f_one_b_order",
    "This is GPipe: all forwards, then all backwards. It keeps the activations of all micro-"
    "batches; 1F1B starts a micro-batch's backward as soon as it can.",
    see=ORDER,
)
def does_all_forwards_first(rank, num_ranks, num_micro):
    return _order(num_micro, num_micro)


@misconception(
    "one_f_one_b_order",
    "Your warm-up counts this stage as well. As many forwards as there are stages after it: the "
    "last stage has none to wait for.",
    see=ORDER,
)
def warms_up_one_too_many(rank, num_ranks, num_micro):
    return _order(num_ranks - rank, num_micro)


@misconception(
    "one_f_one_b_order",
    "Your warm-up grows along the pipeline. It is the first stage that has to wait longest for its "
    "first backward.",
    see=ORDER,
)
def warms_up_by_rank(rank, num_ranks, num_micro):
    return _order(rank, num_micro)


@misconception(
    "one_f_one_b_order",
    "All your stages warm up alike. The last could turn its first micro-batch round at once.",
    see=ORDER,
)
def warms_up_alike(rank, num_ranks, num_micro):
    return _order(num_ranks - 1, num_micro)


@misconception(
    "one_f_one_b_order",
    "No warm-up: forward and backward in turns everywhere. The first stage then waits for each "
    "micro-batch to come back before it starts the next: one rank works at a time.",
    see=ORDER,
)
def does_not_warm_up(rank, num_ranks, num_micro):
    return _order(0, num_micro)


@misconception(
    "one_f_one_b_order",
    "After the warm-up you do a backward before each forward: one micro-batch fewer is under way, "
    "and stages wait.",
    see=ORDER,
)
def does_backward_before_forward(rank, num_ranks, num_micro):
    return _order(num_ranks - 1 - rank, num_micro, is_backward_first=True)


@misconception(
    "one_f_one_b_order",
    "Your backwards run from the last micro-batch to the first. The first one is back first.",
    see=ORDER,
)
def turns_backwards_round(rank, num_ranks, num_micro):
    order = _order(num_ranks - 1 - rank, num_micro)
    return [(kind, num_micro - 1 - i) if kind == "B" else (kind, i) for kind, i in order]


@alternative("one_f_one_b_order")
def by_counting(rank, num_ranks, num_micro):
    order, forward, back = [], 0, 0
    while back < num_micro:
        if forward < num_micro and forward - back < num_ranks - rank:
            order.append(("F", forward))
            forward += 1
        else:
            order.append(("B", back))
            back += 1
    return order


@alternative("one_f_one_b_order")
def by_slices(rank, num_ranks, num_micro):
    forwards, backs = ([(kind, i) for i in range(num_micro)] for kind in "FB")
    warm_up = min(num_ranks - 1 - rank, num_micro)
    pairs = zip(forwards[warm_up:], backs, strict=False)
    return forwards[:warm_up] + [a for pair in pairs for a in pair] + backs[num_micro - warm_up :]


# bubble_fraction


@misconception(
    "bubble_fraction",
    "1F1B has no smaller bubble than GPipe: the first micro-batch must get through, and the last "
    "one back. It keeps fewer activations.",
    see=BUBBLE,
)
def shrinks_with_1f1b(schedule, num_ranks, num_micro, num_chunks=1):
    share = (num_ranks - 1) / num_micro
    return {"GPipe": share, "1F1B": share / 2, "interleaved": share / num_chunks}[schedule]


@misconception(
    "bubble_fraction",
    "You divide by the whole step. The fraction asked for is of the time in which a rank computes.",
    see=BUBBLE,
)
def divides_by_the_step(schedule, num_ranks, num_micro, num_chunks=1):
    v = num_chunks if schedule == "interleaved" else 1
    return (num_ranks - 1) / (v * num_micro + num_ranks - 1)


@misconception(
    "bubble_fraction",
    "p / m: a pipeline of one stage would wait as well. p - 1 micro-batch times are lost.",
    see=BUBBLE,
)
def counts_p(schedule, num_ranks, num_micro, num_chunks=1):
    return num_ranks / (num_micro * (num_chunks if schedule == "interleaved" else 1))


@misconception(
    "bubble_fraction",
    "Interleaving divides the bubble by v: the stages are 1/v as long, so what fills and drains "
    "the pipeline is, too.",
    see=BUBBLE,
)
def forgets_the_chunks(schedule, num_ranks, num_micro, num_chunks=1):
    return (num_ranks - 1) / num_micro


@misconception(
    "bubble_fraction",
    "You take v stages a rank for a longer pipeline, of v p ranks. They are the same ranks, with "
    "smaller stages: the bubble shrinks.",
    see=BUBBLE,
)
def lengthens_with_chunks(schedule, num_ranks, num_micro, num_chunks=1):
    v = num_chunks if schedule == "interleaved" else 1
    return (v * num_ranks - 1) / num_micro


@misconception(
    "bubble_fraction",
    "You count filling and draining apart, twice too much: a rank waits p - 1 micro-batch times in "
    "all, forward and backward together.",
    see=BUBBLE,
)
def counts_twice(schedule, num_ranks, num_micro, num_chunks=1):
    return 2 * (num_ranks - 1) / (num_micro * (num_chunks if schedule == "interleaved" else 1))


@alternative("bubble_fraction")
def by_times(schedule, num_ranks, num_micro, num_chunks=1):
    v = num_chunks if schedule == "interleaved" else 1
    stage = 3.0 / v
    return (num_ranks - 1) * stage / (num_micro * v * stage)


@alternative("bubble_fraction")
def by_cases(schedule, num_ranks, num_micro, num_chunks=1):
    share = (num_ranks - 1) / num_micro
    if schedule == "interleaved":
        share /= num_chunks
    return share


# live_micro_batches


@misconception(
    "live_micro_batches",
    "1F1B keeps as many as GPipe, you say. It is what 1F1B is for: as soon as one comes back, one "
    "goes in.",
    see=ORDER,
)
def keeps_all(schedule, rank, num_ranks, num_micro):
    return num_micro


@misconception(
    "live_micro_batches",
    "p on each rank: that is the first one's. The last turns each round at once and keeps one.",
    see=ORDER,
)
def keeps_p(schedule, rank, num_ranks, num_micro):
    return num_micro if schedule == "GPipe" else min(num_micro, num_ranks)


@misconception(
    "live_micro_batches",
    "Turned round: the first stage waits longest for a micro-batch to come back, and keeps most.",
    see=ORDER,
)
def keeps_most_at_the_end(schedule, rank, num_ranks, num_micro):
    return num_micro if schedule == "GPipe" else min(num_micro, rank + 1)


@misconception(
    "live_micro_batches",
    "One too few: beside those of the warm-up there is the one that is being computed.",
    see=ORDER,
)
def forgets_the_present_one(schedule, rank, num_ranks, num_micro):
    return num_micro if schedule == "GPipe" else min(num_micro, num_ranks - 1 - rank)


@misconception(
    "live_micro_batches",
    "More than there are: with m < p - rank all are under way, and no more.",
    see=ORDER,
)
def keeps_more_than_there_are(schedule, rank, num_ranks, num_micro):
    return num_micro if schedule == "GPipe" else num_ranks - rank


@misconception(
    "live_micro_batches",
    "GPipe frees nothing before its first backward, which comes after the last forward: all m are "
    "alive, not p.",
    see=BUBBLE,
)
def frees_early_in_gpipe(schedule, rank, num_ranks, num_micro):
    return min(num_micro, num_ranks if schedule == "GPipe" else num_ranks - rank)


@alternative("live_micro_batches")
def by_walking(schedule, rank, num_ranks, num_micro):
    warm_up = num_micro if schedule == "GPipe" else min(num_ranks - 1 - rank, num_micro)
    alive = most = warm_up
    for _ in range(num_micro - warm_up):
        alive += 1
        most = max(most, alive)
        alive -= 1
    return most


@alternative("live_micro_batches")
def by_the_order(schedule, rank, num_ranks, num_micro):
    if schedule == "GPipe":
        return num_micro
    order = by_counting(rank, num_ranks, num_micro)
    return max(sum(1 if kind == "F" else -1 for kind, _ in order[: i + 1])
               for i in range(len(order)))  # fmt: skip


# pipelined_gradient


def _pipeline(comm, weight, inputs, targets, *, scale=1.0, keeps_last=False, updates=0.0):
    is_first, is_last = comm.rank == 0, comm.rank == comm.size - 1
    kept, total, m = [], torch.zeros_like(weight), len(inputs)
    for i in range(m):
        x = inputs[i] if is_first else comm.recv(torch.empty_like(inputs[i]), comm.rank - 1)
        y = x @ weight.T
        kept.append((x, y))
        if not is_last:
            comm.send(y, comm.rank + 1)
    for i, (x, y) in enumerate(kept):
        if is_last:
            grad = 2 * (y - targets[i]) / (y.numel() * m) * scale
        else:
            grad = comm.recv(torch.empty_like(y), comm.rank + 1)
        own = grad.T @ x
        total = own if keeps_last else total + own
        if not is_first:
            comm.send(grad @ weight, comm.rank - 1)
        weight = weight - updates * own
    return total


@misconception(
    "pipelined_gradient",
    "Your loss is a sum of the micro-batches' means, m times too large: divide by their number.",
    see=STAGES,
)
def does_not_divide_by_m(comm, weight, inputs, targets):
    return _pipeline(comm, weight, inputs, targets, scale=len(inputs))


@misconception(
    "pipelined_gradient",
    "You keep the last micro-batch's gradient. They add up.",
    see=STAGES,
)
def keeps_the_last_gradient(comm, weight, inputs, targets):
    return _pipeline(comm, weight, inputs, targets, keeps_last=True)


@misconception(
    "pipelined_gradient",
    "You update the weight after each micro-batch. Those that follow then go back through other "
    "weights than they came: one step, one update, after all of them.",
    see=STAGES,
)
def updates_after_each_micro_batch(comm, weight, inputs, targets):
    return _pipeline(comm, weight, inputs, targets, updates=0.1)


@misconception(
    "pipelined_gradient",
    "You sum squares where a mean over elements is asked for.",
    see=STAGES,
)
def sums_squares(comm, weight, inputs, targets):
    scale = inputs[0].numel() * len(inputs)
    return _pipeline(comm, weight, inputs, targets, scale=scale)


@misconception(
    "pipelined_gradient",
    "The factor 2 of the square is missing.",
    see=STAGES,
)
def forgets_the_two(comm, weight, inputs, targets):
    return _pipeline(comm, weight, inputs, targets, scale=0.5)


@misconception(
    "pipelined_gradient",
    "One micro-batch goes through and back before the next one starts: right, and one rank works "
    "at a time. Send all forwards in first.",
    see=BUBBLE,
)
def takes_one_micro_batch_after_the_other(comm, weight, inputs, targets):
    total = torch.zeros_like(weight)
    for x, target in zip(inputs, targets, strict=True):
        total += _pipeline(comm, weight, [x], [target], scale=1 / len(inputs))
    return total


@misconception(
    "pipelined_gradient",
    "You send the gradient of the output back, without passing it through the weight: dx = dy W.",
    see=STAGES,
)
def passes_gradients_on(comm, weight, inputs, targets):
    is_first, is_last = comm.rank == 0, comm.rank == comm.size - 1
    kept, total = [], torch.zeros_like(weight)
    for i in range(len(inputs)):
        x = inputs[i] if is_first else comm.recv(torch.empty_like(inputs[i]), comm.rank - 1)
        kept.append((x, x @ weight.T))
        if not is_last:
            comm.send(kept[-1][1], comm.rank + 1)
    for i, (x, y) in enumerate(kept):
        if is_last:
            grad = 2 * (y - targets[i]) / (y.numel() * len(inputs))
        else:
            grad = comm.recv(torch.empty_like(y), comm.rank + 1)
        total += grad.T @ x
        if not is_first:
            comm.send(grad, comm.rank - 1)
    return total


@misconception(
    "pipelined_gradient",
    "Your gradient is transposed: y = x W^T, so dW = dy^T x.",
    see=STAGES,
)
def transposes_the_gradient(comm, weight, inputs, targets):
    return _pipeline(comm, weight, inputs, targets).T


@misconception(
    "pipelined_gradient",
    "You average gradients over the stages, as in data parallelism. Stages have other weights.",
    see=STAGES,
)
def averages_over_stages(comm, weight, inputs, targets):
    return comm.all_reduce(_pipeline(comm, weight, inputs, targets), "mean")


@alternative("pipelined_gradient")
def by_autograd(comm, weight, inputs, targets):
    weight = weight.clone().requires_grad_()
    is_first, is_last = comm.rank == 0, comm.rank == comm.size - 1
    graphs = []
    for i in range(len(inputs)):
        x = inputs[i] if is_first else comm.recv(torch.empty_like(inputs[i]), comm.rank - 1)
        x = x.clone().requires_grad_()
        y = x @ weight.T
        graphs.append((x, y))
        if not is_last:
            comm.send(y.detach(), comm.rank + 1)
    for i, (x, y) in enumerate(graphs):
        if is_last:
            ((y - targets[i]).square().mean() / len(inputs)).backward()
        else:
            y.backward(comm.recv(torch.empty_like(y), comm.rank + 1))
        if not is_first:
            comm.send(x.grad, comm.rank - 1)
    return weight.grad


@alternative("pipelined_gradient")
def by_one_f_one_b(comm, weight, inputs, targets):
    is_first, is_last = comm.rank == 0, comm.rank == comm.size - 1
    kept, total, sends = {}, torch.zeros_like(weight), []
    for kind, i in by_counting(comm.rank, comm.size, len(inputs)):
        if kind == "F":
            x = inputs[i] if is_first else comm.recv(torch.empty_like(inputs[i]), comm.rank - 1)
            kept[i] = x, x @ weight.T
            if not is_last:
                sends.append(comm.isend(kept[i][1], comm.rank + 1))
        else:
            x, y = kept.pop(i)
            if is_last:
                grad = 2 * (y - targets[i]) / (y.numel() * len(inputs))
            else:
                grad = comm.recv(torch.empty_like(y), comm.rank + 1)
            total += grad.T @ x
            if not is_first:
                sends.append(comm.isend(grad @ weight, comm.rank - 1))
    for handle in sends:
        handle.wait()
    return total


# recomputed_gradient


@misconception(
    "recomputed_gradient",
    "The layer draws twice from its generator. Compare where y is zero with where the gradient is.",
    see=RECOMPUTE,
    is_starter=True,
)
def draws_another_mask(layer, x, grad, generator):
    with torch.no_grad():
        y = layer(x, generator)
    leaf = x.detach().clone().requires_grad_()
    layer(leaf, generator).backward(grad)
    return y, leaf.grad


@misconception(
    "recomputed_gradient",
    "You set the generator to a seed of your own before the second run. It has to go back to where "
    "the first one began.",
    see=RECOMPUTE,
)
def seeds_the_second_run(layer, x, grad, generator):
    with torch.no_grad():
        y = layer(x, generator)
    after = generator.get_state()
    leaf = x.detach().clone().requires_grad_()
    layer(leaf, generator.manual_seed(0)).backward(grad)
    generator.set_state(after)
    return y, leaf.grad


@misconception(
    "recomputed_gradient",
    "You take the state after the first forward for that before it.",
    see=RECOMPUTE,
)
def saves_the_state_too_late(layer, x, grad, generator):
    with torch.no_grad():
        y = layer(x, generator)
    state = generator.get_state()
    leaf = x.detach().clone().requires_grad_()
    layer(leaf, generator).backward(grad)
    generator.set_state(state)
    return y, leaf.grad


@misconception(
    "recomputed_gradient",
    "You put the generator back to the beginning in the end too: the next layer draws this layer's "
    "mask again.",
    see=RECOMPUTE,
)
def leaves_the_generator_at_the_start(layer, x, grad, generator):
    before = generator.get_state()
    with torch.no_grad():
        y = layer(x, generator)
    generator.set_state(before)
    leaf = x.detach().clone().requires_grad_()
    layer(leaf, generator).backward(grad)
    generator.set_state(before)
    return y, leaf.grad


@misconception(
    "recomputed_gradient",
    "You keep the first forward's graph: right, and nothing is saved. Its activations are what was "
    "to be forgotten.",
    see=RECOMPUTE,
)
def keeps_the_graph(layer, x, grad, generator):
    leaf = x.detach().clone().requires_grad_()
    y = layer(leaf, generator)
    y.backward(grad)
    return y.detach(), leaf.grad


@misconception(
    "recomputed_gradient",
    "You return the second run's output with another mask, not the first one's.",
    see=RECOMPUTE,
)
def returns_the_second_output(layer, x, grad, generator):
    with torch.no_grad():
        layer(x, generator)
    leaf = x.detach().clone().requires_grad_()
    y = layer(leaf, generator)
    y.backward(grad)
    return y.detach(), leaf.grad


@alternative("recomputed_gradient")
def with_a_second_generator(layer, x, grad, generator):
    twin = torch.Generator().set_state(generator.get_state())
    with torch.no_grad():
        y = layer(x, generator)
    leaf = x.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(layer(leaf, twin), leaf, grad)
    return y, found


@alternative("recomputed_gradient")
def returns_the_second_runs_output(layer, x, grad, generator):
    before = generator.get_state()
    with torch.no_grad():
        layer(x, generator)
    generator.set_state(before)
    leaf = x.detach().clone().requires_grad_()
    y = layer(leaf, generator)
    y.backward(grad)
    return y.detach(), leaf.grad


# parallel_groups


def _groups(world_size, **sides):
    """Lines along each side of a box, the last side running fastest."""
    box = torch.arange(world_size).view(*sides.values())
    found = {}
    for i, (name, size) in enumerate(sides.items()):
        found[name] = sorted(box.movedim(i, -1).reshape(-1, size).tolist())
    return found


@misconception(
    "parallel_groups",
    "You make neighbours data-parallel peers. Neighbours share a node and its fast links: they are "
    "for tensor parallelism, which talks in each layer.",
    see=GROUPS,
)
def makes_neighbours_data_parallel(world_size, tp, pp):
    return _groups(world_size, pp=pp, tp=tp, dp=world_size // (tp * pp))


@misconception(
    "parallel_groups",
    "Your pipelines are neighbours. They send least, and should be farthest apart.",
    see=GROUPS,
)
def makes_pipelines_neighbours(world_size, tp, pp):
    return _groups(world_size, dp=world_size // (tp * pp), tp=tp, pp=pp)


@misconception(
    "parallel_groups",
    "You put the pipeline between tensor and data parallelism. In Megatron it is outermost: a "
    "stage is a block of neighbouring ranks.",
    see=GROUPS,
)
def puts_the_pipeline_in_between(world_size, tp, pp):
    return _groups(world_size, dp=world_size // (tp * pp), pp=pp, tp=tp)


@misconception(
    "parallel_groups",
    "Your data groups have ranks of different stages or different tensor parts. They average "
    "gradients of the same weights.",
    see=GROUPS,
)
def cuts_data_groups_in_a_row(world_size, tp, pp):
    found = _groups(world_size, pp=pp, dp=world_size // (tp * pp), tp=tp)
    dp = world_size // (tp * pp)
    found["dp"] = [list(range(i, i + dp)) for i in range(0, world_size, dp)]
    return found


@misconception(
    "parallel_groups",
    "tp and pp are exchanged.",
    see=GROUPS,
)
def exchanges_tensor_and_pipeline(world_size, tp, pp):
    found = _groups(world_size, pp=pp, dp=world_size // (tp * pp), tp=tp)
    return {"tp": found["pp"], "dp": found["dp"], "pp": found["tp"]}


@misconception(
    "parallel_groups",
    "You divide the world by tp and pp one after the other, and take what is left for the number "
    "of groups: sizes and numbers of groups are exchanged.",
    see=GROUPS,
)
def exchanges_sizes_and_numbers(world_size, tp, pp):
    found = _groups(world_size, pp=pp, dp=world_size // (tp * pp), tp=tp)
    return {axis: [list(line) for line in zip(*groups, strict=True)]
            for axis, groups in found.items()}  # fmt: skip


@alternative("parallel_groups")
def by_a_box(world_size, tp, pp):
    return _groups(world_size, pp=pp, dp=world_size // (tp * pp), tp=tp)


@alternative("parallel_groups")
def by_ranges(world_size, tp, pp):
    stage = world_size // pp
    return {
        "tp": [list(range(i, i + tp)) for i in range(0, world_size, tp)],
        "dp": [list(range(s + t, s + stage, tp)) for s in range(0, world_size, stage)
               for t in range(tp)],
        "pp": [list(range(i, world_size, stage)) for i in range(stage)],
    }  # fmt: skip


# best_num_micro


def _best(candidates, step):
    return min(candidates, key=step)


@misconception(
    "best_num_micro",
    "The largest number has the smallest bubble, and pays the overhead most often: micro-batches "
    "are not free.",
    see=HOW_MANY,
)
def takes_the_largest(num_ranks, compute_seconds, overhead_seconds, candidates):
    return max(candidates)


@misconception(
    "best_num_micro",
    "You take the smallest number: little overhead, and p - 1 stages that wait. The first micro-"
    "batch has to get through all stages.",
    see=HOW_MANY,
)
def takes_the_smallest(num_ranks, compute_seconds, overhead_seconds, candidates):
    return min(candidates)


@misconception(
    "best_num_micro",
    "You take as many micro-batches as there are stages. That is when the pipeline is just full, "
    "half of the step is bubble, and overhead has no say.",
    see=HOW_MANY,
)
def takes_the_number_of_stages(num_ranks, compute_seconds, overhead_seconds, candidates):
    return min(candidates, key=lambda m: (abs(m - num_ranks), m))


@misconception(
    "best_num_micro",
    "You pay the overhead m times in all. It is paid by each micro-batch that passes, those that "
    "fill the pipeline too: (m + p - 1) times.",
    see=HOW_MANY,
)
def pays_overhead_for_m_only(num_ranks, compute_seconds, overhead_seconds, candidates):
    p = num_ranks
    return _best(candidates, lambda m: (m + p - 1) * compute_seconds / m + m * overhead_seconds * p)


@misconception(
    "best_num_micro",
    "You take the longest step.",
    see=HOW_MANY,
)
def takes_the_longest_step(num_ranks, compute_seconds, overhead_seconds, candidates):
    return max(
        candidates, key=lambda m: (m + num_ranks - 1) * (compute_seconds / m + overhead_seconds)
    )


@alternative("best_num_micro")
def by_a_loop(num_ranks, compute_seconds, overhead_seconds, candidates):
    best, least = None, float("inf")
    for m in candidates:
        step = (m + num_ranks - 1) * (compute_seconds / m + overhead_seconds)
        if step < least:
            best, least = m, step
    return best


@alternative("best_num_micro")
def by_a_sorted_list(num_ranks, compute_seconds, overhead_seconds, candidates):
    p = num_ranks
    steps = [(compute_seconds * (1 + (p - 1) / m) + (m + p - 1) * overhead_seconds, m)
             for m in candidates]  # fmt: skip
    return sorted(steps)[0][1]


PLANNING = "10. Planning"


# first_rank_bytes


def _first_rank(
    model, plan, *, zero_from=(3, 2, 1), ways="dp", optimizer=12, tensor=True, ends=1.0,
    in_flight=None, kept=(34, 2, 32), layers=None, tensor_states=True,
):  # fmt: skip
    mine = model["num_layers"] / plan["pp"]
    held = (mine if layers is None else layers) * model["layer_parameters"]
    held += ends * model["embedding_parameters"]
    held /= plan["tp"] if tensor_states else 1
    n = plan["dp"] if ways == "dp" else plan["dp"] * plan["tp"] * plan["pp"]
    shares = [n if plan["zero_stage"] >= first else 1 for first in zero_from]
    states = sum(b * held / n for b, n in zip((2, 2, optimizer), shares, strict=True))
    stream = model["seq_len"] * model["dim"] / (plan["tp"] if tensor else 1)
    alive = min(plan["pp"], plan["num_micro"]) if in_flight is None else in_flight
    whole, input_alone, at_work = kept
    if plan["recompute"] == "full":
        return states + (input_alone * alive * mine + at_work) * stream
    return states + whole * alive * mine * stream


@misconception(
    "first_rank_bytes",
    "Your ZeRO-2 divides the parameters. Stage 1 divides optimizer states, stage 2 gradients as "
    "well, and parameters only stage 3.",
    see=PLANNING,
)
def zero_2_divides_parameters(model, plan):
    return _first_rank(model, plan, zero_from=(2, 2, 1))


@misconception(
    "first_rank_bytes",
    "Your ZeRO-1 divides the gradients. At stage 1 each rank keeps them whole; it is the optimizer "
    "states that are divided.",
    see=PLANNING,
)
def zero_1_divides_gradients(model, plan):
    return _first_rank(model, plan, zero_from=(3, 1, 1))


@misconception(
    "first_rank_bytes",
    "You let ZeRO divide by all GPUs. Tensor and pipeline ranks hold different parameters already; "
    "only the dp copies have something to share out.",
    see=PLANNING,
)
def zero_divides_by_the_world(model, plan):
    return _first_rank(model, plan, ways="world")


@misconception(
    "first_rank_bytes",
    "Your optimizer has 8 bytes a parameter: momentum and variance. With 16-bit parameters there "
    "is the float32 master weight besides.",
    see=PLANNING,
)
def forgets_the_master_weights(model, plan):
    return _first_rank(model, plan, optimizer=8)


@misconception(
    "first_rank_bytes",
    "The embedding is missing. It stands on the first rank, beside its layers.",
    see=PLANNING,
)
def forgets_the_embedding(model, plan):
    return _first_rank(model, plan, ends=0.0)


@misconception(
    "first_rank_bytes",
    "You keep the activations of one micro-batch. Until its first backward the first stage has "
    "begun p of them: pipelines divide layers, not what is in flight.",
    see=PLANNING,
)
def keeps_one_micro_batch(model, plan):
    return _first_rank(model, plan, in_flight=1)


@misconception(
    "first_rank_bytes",
    "You keep all m micro-batches: that is GPipe. Under 1F1B the first stage has p in flight.",
    see=PLANNING,
)
def keeps_all_micro_batches(model, plan):
    return _first_rank(model, plan, in_flight=plan["num_micro"])


@misconception(
    "first_rank_bytes",
    "You keep p micro-batches even where the step has fewer.",
    see=PLANNING,
)
def keeps_as_many_as_stages(model, plan):
    return _first_rank(model, plan, in_flight=plan["pp"])


@misconception(
    "first_rank_bytes",
    "Your tensor ranks keep whole activations. With sequence parallelism all 34 bytes are divided, "
    "those of norms and residuals as well.",
    see=PLANNING,
)
def tensor_ranks_keep_whole_activations(model, plan):
    return _first_rank(model, plan, tensor=False)


@misconception(
    "first_rank_bytes",
    "Your recomputation keeps nothing. The input of each layer stays, 2 bytes for each element, "
    "and the layer at work has everything.",
    see=PLANNING,
)
def recomputation_keeps_nothing(model, plan):
    return _first_rank(model, plan, kept=(34, 0, 34))


@misconception(
    "first_rank_bytes",
    "Your recomputation forgets the layer at work: while it goes back, its 34 bytes are there.",
    see=PLANNING,
)
def recomputation_forgets_the_layer_at_work(model, plan):
    return _first_rank(model, plan, kept=(34, 2, 0))


@misconception(
    "first_rank_bytes",
    "You gave the rank all layers' parameters. It has num_layers / pp of them.",
    see=PLANNING,
)
def pipeline_ranks_hold_all_layers(model, plan):
    return _first_rank(model, plan, layers=model["num_layers"])


@misconception(
    "first_rank_bytes",
    "Each of your ZeRO stages divides one state and no other. The stages add up: stage 2 divides "
    "gradients and optimizer states, stage 3 all three.",
    see=PLANNING,
)
def zero_stages_do_not_add_up(model, plan):
    stage = plan["zero_stage"]
    return _first_rank(model, plan, zero_from=[s if s == stage else 4 for s in (3, 2, 1)])


@misconception(
    "first_rank_bytes",
    "Each of your tensor ranks has the whole embedding. They divide it as they divide the layers: "
    "each keeps a part of the vocabulary.",
    see=PLANNING,
)
def tensor_ranks_hold_the_whole_embedding(model, plan):
    return _first_rank(model, plan, ends=plan["tp"])


@misconception(
    "first_rank_bytes",
    "The layer at work counts twice in your recomputation. Its input is among its 34 bytes, which "
    "stand in place of the 2: 32 more.",
    see=PLANNING,
)
def recomputation_keeps_an_input_twice(model, plan):
    return _first_rank(model, plan, kept=(34, 2, 34))


@misconception(
    "first_rank_bytes",
    "Your recomputation has a whole layer of each micro-batch in flight. A rank goes back through "
    "one micro-batch at a time; of the others it keeps inputs alone.",
    see=PLANNING,
)
def recomputes_all_micro_batches_at_once(model, plan):
    at_work = 32 * min(plan["pp"], plan["num_micro"])
    return _first_rank(model, plan, kept=(34, 2, at_work))


@alternative("first_rank_bytes")
def by_bytes_a_parameter(model, plan):
    tp, dp, stage = plan["tp"], plan["dp"], plan["zero_stage"]
    layers = model["num_layers"] // plan["pp"]
    divided = (0, 12, 14, 16)[stage]
    parameters = (layers * model["layer_parameters"] + model["embedding_parameters"]) / tp
    total = parameters * (16 - divided + divided / dp)
    units = layers * (plan["num_micro"] if plan["num_micro"] < plan["pp"] else plan["pp"])
    each = model["seq_len"] * model["dim"] / tp
    return total + each * (units * 34 if plan["recompute"] == "none" else units * 2 + 34 - 2)


@alternative("first_rank_bytes")
def with_tensors(model, plan):
    layers = model["num_layers"] // plan["pp"]
    bytes_each = torch.tensor([12.0, 2.0, 2.0], dtype=torch.float64)
    bytes_each[: plan["zero_stage"]] /= plan["dp"]
    held = layers * model["layer_parameters"] + model["embedding_parameters"]
    alive = min(plan["pp"], plan["num_micro"])
    kept = torch.full((layers, alive), 2.0 if plan["recompute"] == "full" else 34.0)
    total = kept.double().sum() + (32 if plan["recompute"] == "full" else 0)
    whole = bytes_each.sum() * held + total * model["seq_len"] * model["dim"]
    return (whole / plan["tp"]).item()


# fastest_plan


def _search(
    model, cluster, num_sequences, *, memory=True, activations=True, in_flight=True, fast=False,
    bubble=-1, exchanges=4, gradients=True, sharded=True, passes=6, one_way=2, near_data=False,
    least=False, micro_batches=True, tensor_divides=True, widest=None, each_micro=False,
):  # fmt: skip
    def all_reduce(num_bytes, ranks, stretch):
        is_near = fast or stretch <= cluster["ranks_per_node"]
        bandwidth = cluster["intra"] if is_near else cluster["inter"]
        return one_way * (ranks - 1) / ranks * num_bytes / bandwidth

    gpus, found = cluster["num_gpus"], []
    for tp in range(1, (widest or gpus) + 1):
        for pp in range(1, gpus // tp + 1):
            dp, left = divmod(gpus, tp * pp)
            if left or model["dim"] % tp or model["num_layers"] % pp or num_sequences % dp:
                continue
            m, layers = num_sequences // dp, model["num_layers"] // pp
            own = layers * model["layer_parameters"] / tp
            stream = model["seq_len"] * model["dim"]
            kept = 34 * stream / (tp if tensor_divides else 1) * layers
            kept *= min(pp, m) if in_flight else 1
            size = 4 * own + 12 * own / (dp if sharded else 1) + (kept if activations else 0)
            micro = passes * own * model["seq_len"] / cluster["flops_per_second"]
            micro += layers * exchanges * all_reduce(2 * stream, tp, tp)
            seconds = (m + (pp + bubble if bubble is not None else 0)) * micro
            if gradients:
                times = m if each_micro else 1
                seconds += times * all_reduce(2 * own, dp, dp if near_data else tp * dp)
            if not memory or size <= cluster["memory_bytes"]:
                found.append((size if least else seconds, (tp, pp, dp), seconds))
    if not found:
        raise ValueError("no layout fits")
    _, layout, seconds = min(found)
    return layout, seconds


@misconception(
    "fastest_plan",
    "You take the fastest layout whether it fits or not. First refuse what exceeds memory_bytes, "
    "then compare seconds.",
    see=PLANNING,
)
def asks_no_memory(model, cluster, num_sequences):
    return _search(model, cluster, num_sequences, memory=False)


@misconception(
    "fastest_plan",
    "Your memory has no activations. For each layer and each micro-batch in flight they are "
    "34 s h / tp bytes, often more than the states.",
    see=PLANNING,
)
def forgets_activations(model, cluster, num_sequences):
    return _search(model, cluster, num_sequences, activations=False)


@misconception(
    "fastest_plan",
    "Your memory has the activations of one micro-batch; 1F1B's first stage has min(pp, m).",
    see=PLANNING,
)
def one_micro_batch_in_flight(model, cluster, num_sequences):
    return _search(model, cluster, num_sequences, in_flight=False)


@misconception(
    "fastest_plan",
    "All your groups communicate at a node's speed. A tensor group of more ranks than a node has "
    "takes the network, a tenth as fast: tensor parallelism across nodes is not free.",
    see=PLANNING,
)
def every_link_is_fast(model, cluster, num_sequences):
    return _search(model, cluster, num_sequences, fast=True)


@misconception(
    "fastest_plan",
    "Your pipelines have no bubble: a step of m micro-batches takes m + pp - 1 of their times.",
    see=PLANNING,
)
def no_bubble(model, cluster, num_sequences):
    return _search(model, cluster, num_sequences, bubble=None)


@misconception(
    "fastest_plan",
    "Your step takes m + pp micro-batch times. The first one needs pp to get through, the other "
    "m - 1 follow: m + pp - 1.",
    see=PLANNING,
)
def bubble_of_p(model, cluster, num_sequences):
    return _search(model, cluster, num_sequences, bubble=0)


@misconception(
    "fastest_plan",
    "You count the two all-reduces of forward. Backward has two as well, for each layer's two "
    "regions.",
    see=PLANNING,
)
def two_sums_a_layer(model, cluster, num_sequences):
    return _search(model, cluster, num_sequences, exchanges=2)


@misconception(
    "fastest_plan",
    "The dp copies' gradients are summed for nothing in your step. With few sequences a step this "
    "is what limits data parallelism.",
    see=PLANNING,
)
def gradients_travel_for_nothing(model, cluster, num_sequences):
    return _search(model, cluster, num_sequences, gradients=False)


@misconception(
    "fastest_plan",
    "Your optimizer states are not divided: ZeRO-1 gives each of the dp copies a part of the 12 "
    "bytes.",
    see=PLANNING,
)
def optimizer_on_every_rank(model, cluster, num_sequences):
    return _search(model, cluster, num_sequences, sharded=False)


@misconception(
    "fastest_plan",
    "Your compute is forward's: 2 FLOPs a parameter and token. Backward has twice as many, 6 in "
    "all.",
    see=PLANNING,
)
def forward_alone(model, cluster, num_sequences):
    return _search(model, cluster, num_sequences, passes=2)


@misconception(
    "fastest_plan",
    "Your all-reduce sends (r - 1) / r of the bytes: that is a reduce-scatter. Gathering the sums "
    "again sends as much.",
    see=PLANNING,
)
def half_of_an_all_reduce(model, cluster, num_sequences):
    return _search(model, cluster, num_sequences, one_way=1)


@misconception(
    "fastest_plan",
    "You place data ranks side by side. Tensor ranks are neighbours; data ranks stand tp apart, so "
    "a group of dp stretches over tp dp ranks.",
    see=PLANNING,
)
def data_ranks_are_neighbours(model, cluster, num_sequences):
    return _search(model, cluster, num_sequences, near_data=True)


@misconception(
    "fastest_plan",
    "You take the layout with the least memory. What fits is good enough; among these the shortest "
    "step wins.",
    see=PLANNING,
)
def prefers_little_memory(model, cluster, num_sequences):
    return _search(model, cluster, num_sequences, least=True)


@misconception(
    "fastest_plan",
    "Your tensor ranks keep whole activations; sequence parallelism divides all 34 s h bytes.",
    see=PLANNING,
)
def tensor_ranks_keep_all_activations(model, cluster, num_sequences):
    return _search(model, cluster, num_sequences, tensor_divides=False)


@misconception(
    "fastest_plan",
    "Your tensor groups never leave a node. That is a good rule where the network is slow; where "
    "it is fast, or memory short, a wider group may win. Let the seconds decide.",
    see=PLANNING,
)
def tensor_groups_stay_in_a_node(model, cluster, num_sequences):
    return _search(model, cluster, num_sequences, widest=cluster["ranks_per_node"])


@misconception(
    "fastest_plan",
    "You sum gradients after each micro-batch. They are accumulated on the rank, and the dp copies "
    "sum them once a step.",
    see=PLANNING,
)
def sums_gradients_each_micro_batch(model, cluster, num_sequences):
    return _search(model, cluster, num_sequences, each_micro=True)


@alternative("fastest_plan")
def with_itertools(model, cluster, num_sequences):
    import itertools

    divisors = [n for n in range(1, cluster["num_gpus"] + 1) if cluster["num_gpus"] % n == 0]
    weighed = []
    for tp, pp in itertools.product(divisors, divisors):
        if cluster["num_gpus"] % (tp * pp):
            continue
        dp = cluster["num_gpus"] // (tp * pp)
        if any((model["dim"] % tp, model["num_layers"] % pp, num_sequences % dp)):
            continue
        m, layers = num_sequences // dp, model["num_layers"] // pp
        p, s, h = layers * model["layer_parameters"] / tp, model["seq_len"], model["dim"]
        if p * (4 + 12 / dp) + 34 * s * h / tp * layers * min(pp, m) > cluster["memory_bytes"]:
            continue
        tensor_link = "intra" if tp <= cluster["ranks_per_node"] else "inter"
        data_link = "intra" if tp * dp <= cluster["ranks_per_node"] else "inter"
        micro = 6 * p * s / cluster["flops_per_second"]
        micro += layers * 16 * (tp - 1) / tp * s * h / cluster[tensor_link]
        step = (m + pp - 1) * micro + 4 * (dp - 1) / dp * p / cluster[data_link]
        weighed.append((step, tp, pp, dp))
    if not weighed:
        raise ValueError("nothing fits")
    step, *layout = min(weighed)
    return tuple(layout), step


@alternative("fastest_plan")
def as_a_list(model, cluster, num_sequences):
    layout, seconds = _search(model, cluster, num_sequences)
    return [list(layout), seconds]
