"""Chapter 13: wrong answers that people give, and right ones in another form."""

import torch
import torch.nn.functional as F

from autograder import alternative, misconception

PAIR = "3. A pair of layers"
HEADS = "4. Attention by heads"
VOCABULARY = "5. The vocabulary"
DROPOUT = "6. Dropout"
SEQUENCE = "7. Sequence parallelism"
COST = "8. What it costs"
OVERLAP = "9. Computing while gathering"


# parallel_mlp


def _mlp(comm, x, w1, w2, grad_y, *, sum_y=True, sum_dx=True, share=1):
    w1, w2 = w1.chunk(comm.size)[comm.rank], w2.chunk(comm.size, 1)[comm.rank]
    hidden = (x @ w1.T).relu()
    y = hidden @ w2.T
    y = comm.all_reduce(y) / share if sum_y else y
    grad_hidden = (grad_y @ w2) * (hidden > 0)
    grad_x = grad_hidden @ w1
    grad_x = comm.all_reduce(grad_x) if sum_dx else grad_x
    return y, grad_x, grad_hidden.T @ x, grad_y.T @ hidden


@misconception(
    "parallel_mlp",
    "You cut the first matrix by its inputs. Each rank then has a summand of the hidden layer, and "
    "relu of a summand is not a summand of relu: cut by outputs.",
    see=PAIR,
)
def cuts_the_first_matrix_by_inputs(comm, x, w1, w2, grad_y):
    width = x.shape[1] // comm.size
    mine = slice(comm.rank * width, (comm.rank + 1) * width)
    hidden = (x[:, mine] @ w1[:, mine].T).relu()
    y = comm.all_reduce(hidden @ w2.T)
    grad_hidden = (grad_y @ w2) * (hidden > 0)
    grad_x = comm.all_gather((grad_hidden @ w1[:, mine]).T.contiguous()).T
    own_1 = (grad_hidden.T @ x).chunk(comm.size)[comm.rank]
    return y, grad_x, own_1, (grad_y.T @ hidden).chunk(comm.size, 1)[comm.rank]


@misconception(
    "parallel_mlp",
    "You make the hidden layer whole between the two matrices, and its gradient on the way back: "
    "two collectives too many. What a column-parallel layer makes, a row-parallel one takes.",
    see=PAIR,
)
def makes_the_hidden_layer_whole(comm, x, w1, w2, grad_y):
    first, second = w1.chunk(comm.size)[comm.rank], w2.chunk(comm.size, 1)[comm.rank]
    hidden = (x @ first.T).relu()
    whole = comm.all_gather(hidden.T.contiguous()).T
    y = comm.all_reduce(whole.chunk(comm.size, 1)[comm.rank] @ second.T)
    grad_hidden = (grad_y @ second) * (hidden > 0)
    comm.all_gather(grad_hidden.T.contiguous())
    return y, comm.all_reduce(grad_hidden @ first), grad_hidden.T @ x, grad_y.T @ hidden


@misconception(
    "parallel_mlp",
    "Your y is a summand: each rank has the contribution of its hidden units. The sum over ranks "
    "is missing.",
    see=PAIR,
)
def forgets_the_sum_forward(comm, x, w1, w2, grad_y):
    return _mlp(comm, x, w1, w2, grad_y, sum_y=False)


@misconception(
    "parallel_mlp",
    "Your gradient of x is that of this rank's hidden units. All of x goes into every rank's part, "
    "so backward has a sum as well.",
    see=PAIR,
)
def forgets_the_sum_backward(comm, x, w1, w2, grad_y):
    return _mlp(comm, x, w1, w2, grad_y, sum_dx=False)


@misconception(
    "parallel_mlp",
    "You average over ranks. They have summands of one result, not results of several batches.",
    see=PAIR,
)
def averages_summands(comm, x, w1, w2, grad_y):
    return _mlp(comm, x, w1, w2, grad_y, share=comm.size)


@misconception(
    "parallel_mlp",
    "You sum gradients of weights over ranks, as in data parallelism. Here each rank has other "
    "weights; their gradients have nothing to do with each other.",
    see=PAIR,
)
def sums_weight_gradients(comm, x, w1, w2, grad_y):
    y, grad_x, first, second = _mlp(comm, x, w1, w2, grad_y)
    return y, grad_x, comm.all_reduce(first), comm.all_reduce(second.contiguous())


@misconception(
    "parallel_mlp",
    "You sum before backward what is the same on all ranks: the gradient of y is whole already, "
    "and counts N times then.",
    see=PAIR,
)
def sums_the_gradient_of_y(comm, x, w1, w2, grad_y):
    y, *_ = _mlp(comm, x, w1, w2, grad_y, sum_dx=False)
    _, *grads = _mlp(comm, x, w1, w2, grad_y * comm.size, sum_y=False)
    return y, *grads


@misconception(
    "parallel_mlp",
    "Every rank computes with the whole matrices: right, and nothing is saved. The gradients asked "
    "for are those of this rank's part, from this rank's part.",
    see=PAIR,
)
def computes_everything_everywhere(comm, x, w1, w2, grad_y):
    hidden = (x @ w1.T).relu()
    grad_hidden = (grad_y @ w2) * (hidden > 0)
    return hidden @ w2.T, grad_hidden @ w1, grad_hidden.T @ x, grad_y.T @ hidden


@misconception(
    "parallel_mlp",
    "relu is missing on the way back: where a hidden unit is off, no gradient passes.",
    see=PAIR,
)
def forgets_relu_backward(comm, x, w1, w2, grad_y):
    first, second = w1.chunk(comm.size)[comm.rank], w2.chunk(comm.size, 1)[comm.rank]
    hidden = (x @ first.T).relu()
    grad_hidden = grad_y @ second
    y, grad_x = comm.all_reduce(hidden @ second.T), comm.all_reduce(grad_hidden @ first)
    return y, grad_x, grad_hidden.T @ x, grad_y.T @ hidden


@misconception(
    "parallel_mlp",
    "Your gradients of the weights are transposed: they have the shapes of the weights' parts.",
    see=PAIR,
)
def transposes_weight_gradients(comm, x, w1, w2, grad_y):
    y, grad_x, first, second = _mlp(comm, x, w1, w2, grad_y)
    return y, grad_x, first.T, second.T


@misconception(
    "parallel_mlp",
    "You gather the ranks' outputs one below the other. They are summands of the same rows: sum.",
    see=PAIR,
)
def gathers_the_outputs(comm, x, w1, w2, grad_y):
    y, *grads = _mlp(comm, x, w1, w2, grad_y, sum_y=False)
    return comm.all_gather(y), *grads


@alternative("parallel_mlp")
def by_autograd(comm, x, w1, w2, grad_y):
    first = w1.chunk(comm.size)[comm.rank].clone().requires_grad_()
    second = w2.chunk(comm.size, 1)[comm.rank].clone().requires_grad_()
    x = x.clone().requires_grad_()
    y = F.linear(F.linear(x, first).relu(), second)
    y.backward(grad_y)
    return comm.all_reduce(y.detach().clone()), comm.all_reduce(x.grad), first.grad, second.grad


@alternative("parallel_mlp")
def by_slices(comm, x, w1, w2, grad_y):
    size = len(w1) // comm.size
    mine = slice(comm.rank * size, (comm.rank + 1) * size)
    before = torch.einsum("bd,fd->bf", x, w1[mine])
    hidden = before.clamp(min=0)
    y = comm.all_reduce(torch.einsum("bf,df->bd", hidden, w2[:, mine]))
    grad = torch.where(before > 0, grad_y @ w2[:, mine], 0)
    return (
        y,
        comm.all_reduce(grad @ w1[mine]),
        grad.T @ x,
        torch.einsum("bd,bf->df", grad_y, hidden),
    )


# row_parallel_linear


@misconception(
    "row_parallel_linear",
    "With zeros for x the output is not the bias, as soon as there are two ranks.",
    see=PAIR,
    is_starter=True,
)
def adds_the_bias_on_each_rank(comm, x, weight, bias):
    return comm.all_reduce(x @ weight.T + bias)


@misconception(
    "row_parallel_linear",
    "You take the mean over ranks. Each has a summand: without the factor the output is N times "
    "too small.",
    see=PAIR,
)
def averages_over_ranks(comm, x, weight, bias):
    return comm.all_reduce(x @ weight.T, "mean") + bias


@misconception(
    "row_parallel_linear",
    "You take the mean of summands and bias: the bias is right then, and everything else too "
    "small.",
    see=PAIR,
)
def averages_everything(comm, x, weight, bias):
    return comm.all_reduce(x @ weight.T + bias, "mean")


@misconception(
    "row_parallel_linear",
    "Only rank 0 gets the bias, after the sum: ranks disagree about the output from here on.",
    see=PAIR,
)
def adds_the_bias_after_the_sum_on_rank_0(comm, x, weight, bias):
    y = comm.all_reduce(x @ weight.T)
    return y + bias if comm.rank == 0 else y


@misconception(
    "row_parallel_linear",
    "You leave the bias out.",
    see=PAIR,
)
def leaves_the_bias_out(comm, x, weight, bias):
    return comm.all_reduce(x @ weight.T)


@misconception(
    "row_parallel_linear",
    "Your output is this rank's summand: the sum is missing.",
    see=PAIR,
)
def does_not_sum(comm, x, weight, bias):
    return x @ weight.T + bias


@misconception(
    "row_parallel_linear",
    "You gather the ranks' outputs one below the other. They are summands of the same rows: sum.",
    see=PAIR,
)
def gathers_summands(comm, x, weight, bias):
    return comm.all_gather(x @ weight.T + bias)


@alternative("row_parallel_linear")
def adds_a_share_of_the_bias(comm, x, weight, bias):
    return comm.all_reduce(F.linear(x, weight, bias / comm.size))


@alternative("row_parallel_linear")
def adds_the_bias_on_one_rank_before_the_sum(comm, x, weight, bias):
    return comm.all_reduce(F.linear(x, weight, bias if comm.rank == 0 else None))


# heads_of_rank


def _queries(rank, n, h):
    return list(range(rank * h // n, (rank + 1) * h // n))


@misconception(
    "heads_of_rank",
    "Rank r takes key/value head r modulo K. Neighbouring query heads share a key/value head, so "
    "neighbouring ranks do.",
    see=HEADS,
)
def deals_kv_heads_in_turns(rank, world_size, num_heads, num_kv_heads):
    if num_kv_heads >= world_size:
        return heads_by_division(rank, world_size, num_heads, num_kv_heads)
    return _queries(rank, world_size, num_heads), [rank % num_kv_heads]


@misconception(
    "heads_of_rank",
    "You deal out query heads in turns. Ranks take them in order: a matrix is cut into "
    "neighbouring rows.",
    see=HEADS,
)
def deals_query_heads_in_turns(rank, world_size, num_heads, num_kv_heads):
    queries = list(range(rank, num_heads, world_size))
    return queries, sorted({q * num_kv_heads // num_heads for q in queries})


@misconception(
    "heads_of_rank",
    "Where there are fewer key/value heads than ranks, you give some ranks none. Their queries "
    "need one: it is copied.",
    see=HEADS,
)
def leaves_ranks_without_kv_heads(rank, world_size, num_heads, num_kv_heads):
    low, high = (r * num_kv_heads // world_size for r in (rank, rank + 1))
    return _queries(rank, world_size, num_heads), list(range(low, high))


@misconception(
    "heads_of_rank",
    "Every rank has all key/value heads: right, and the memory that grouping has saved is back.",
    see=HEADS,
)
def copies_all_kv_heads(rank, world_size, num_heads, num_kv_heads):
    return _queries(rank, world_size, num_heads), list(range(num_kv_heads))


@misconception(
    "heads_of_rank",
    "You name a key/value head once for each query head. The rank holds it once.",
    see=HEADS,
)
def repeats_kv_heads(rank, world_size, num_heads, num_kv_heads):
    queries = _queries(rank, world_size, num_heads)
    return queries, [q * num_kv_heads // num_heads for q in queries]


@misconception(
    "heads_of_rank",
    "You give the rank the first of its key/value heads alone. With more of them than ranks it has "
    "several.",
    see=HEADS,
)
def keeps_one_kv_head(rank, world_size, num_heads, num_kv_heads):
    queries = _queries(rank, world_size, num_heads)
    return queries, [queries[0] * num_kv_heads // num_heads]


@misconception(
    "heads_of_rank",
    "You cut the queries by key/value heads, K / N of them for each rank, in units of the group. "
    "With fewer than ranks that gives each rank a whole group.",
    see=HEADS,
)
def gives_whole_groups(rank, world_size, num_heads, num_kv_heads):
    group = num_heads // num_kv_heads
    share = max(1, num_kv_heads // world_size)
    first = rank * share % num_kv_heads
    return list(range(first * group, (first + share) * group)), list(range(first, first + share))


@misconception(
    "heads_of_rank",
    "Query head i does not use key/value head i modulo K: H / K neighbouring heads share one.",
    see=HEADS,
)
def takes_kv_heads_modulo(rank, world_size, num_heads, num_kv_heads):
    queries = _queries(rank, world_size, num_heads)
    return queries, sorted({q % num_kv_heads for q in queries})


@alternative("heads_of_rank")
def heads_by_division(rank, world_size, num_heads, num_kv_heads):
    share = num_heads // world_size
    first, last = rank * share, (rank + 1) * share - 1
    kv = range(first * num_kv_heads // num_heads, last * num_kv_heads // num_heads + 1)
    return list(range(first, last + 1)), list(kv)


@alternative("heads_of_rank")
def heads_by_cases(rank, world_size, num_heads, num_kv_heads):
    queries = _queries(rank, world_size, num_heads)
    if num_kv_heads < world_size:
        return queries, [rank // (world_size // num_kv_heads)]
    share = num_kv_heads // world_size
    return queries, [rank * share + i for i in range(share)]


# vocab_parallel_loss


def _here(comm, logits, targets):
    count = logits.shape[1]
    here = targets - comm.rank * count
    inside = (here >= 0) & (here < count)
    return torch.where(inside, here, 0), inside


def _picked(comm, logits, targets):
    here, inside = _here(comm, logits, targets)
    return logits.gather(1, here[:, None])[:, 0] * inside


@misconception(
    "vocab_parallel_loss",
    "Each rank normalizes over its own part of the vocabulary: that is a softmax of V / N tokens. "
    "Sums of exponentials are added up over ranks.",
    see=VOCABULARY,
)
def normalizes_over_its_own_part(comm, logits, targets):
    return logits.logsumexp(1) - comm.all_reduce(_picked(comm, logits, targets))


@misconception(
    "vocab_parallel_loss",
    "You subtract the largest logit of this rank, and add sums that were shifted by different "
    "numbers. The shift must be the same on all ranks: a max over them.",
    see=VOCABULARY,
)
def shifts_by_its_own_maximum(comm, logits, targets):
    highest = logits.amax(1)
    sums = comm.all_reduce((logits - highest[:, None]).exp().sum(1))
    return sums.log() + highest - comm.all_reduce(_picked(comm, logits, targets))


@misconception(
    "vocab_parallel_loss",
    "exp of the logits overflows: shift them by the largest of all ranks first.",
    see=VOCABULARY,
)
def does_not_shift(comm, logits, targets):
    sums = comm.all_reduce(logits.exp().sum(1))
    return sums.log() - comm.all_reduce(_picked(comm, logits, targets))


@misconception(
    "vocab_parallel_loss",
    "You gather the logits: V numbers a row travel, and every rank has the whole of what was to be "
    "divided. Three numbers a row are enough.",
    see=VOCABULARY,
)
def gathers_the_logits(comm, logits, targets):
    whole = comm.all_gather(logits.T.contiguous()).T
    return F.cross_entropy(whole, targets, reduction="none")


@misconception(
    "vocab_parallel_loss",
    "A rank that does not have the target looks up another token's logit, and adds it. It should "
    "add zero.",
    see=VOCABULARY,
)
def does_not_mask_targets(comm, logits, targets):
    highest = comm.all_reduce(logits.amax(1), "max")
    sums = comm.all_reduce((logits - highest[:, None]).exp().sum(1))
    picked = logits.gather(1, (targets % logits.shape[1])[:, None])[:, 0]
    return sums.log() + highest - comm.all_reduce(picked)


@misconception(
    "vocab_parallel_loss",
    "You take the target's logit before the shift and the logarithm after it: the shift has to be "
    "added back, or taken off both.",
    see=VOCABULARY,
)
def forgets_to_add_the_shift_back(comm, logits, targets):
    highest = comm.all_reduce(logits.amax(1), "max")
    sums = comm.all_reduce((logits - highest[:, None]).exp().sum(1))
    return sums.log() - comm.all_reduce(_picked(comm, logits, targets))


@misconception(
    "vocab_parallel_loss",
    "Only the rank that has the target subtracts its logit; the others' losses are too large. Sum "
    "the picked logit over ranks as well.",
    see=VOCABULARY,
)
def picks_on_one_rank(comm, logits, targets):
    highest = comm.all_reduce(logits.amax(1), "max")
    sums = comm.all_reduce((logits - highest[:, None]).exp().sum(1))
    return sums.log() + highest - _picked(comm, logits, targets)


@misconception(
    "vocab_parallel_loss",
    "You average the ranks' losses. A logarithm of a sum is no mean of logarithms.",
    see=VOCABULARY,
)
def averages_losses(comm, logits, targets):
    return comm.all_reduce(logits.logsumexp(1) - _picked(comm, logits, targets), "mean")


@misconception(
    "vocab_parallel_loss",
    "You take the largest of the ranks' picked logits. Those without the target bring zero, which "
    "is larger than a negative logit: sum.",
    see=VOCABULARY,
)
def takes_the_largest_pick(comm, logits, targets):
    highest = comm.all_reduce(logits.amax(1), "max")
    sums = comm.all_reduce((logits - highest[:, None]).exp().sum(1))
    return sums.log() + highest - comm.all_reduce(_picked(comm, logits, targets), "max")


@misconception(
    "vocab_parallel_loss",
    "You look up the target on each rank, and most do not have it: an index outside of their part. "
    "Where it is another's, look up any and multiply by zero.",
    see=VOCABULARY,
)
def looks_up_what_is_not_there(comm, logits, targets):
    highest = comm.all_reduce(logits.amax(1), "max")
    sums = comm.all_reduce((logits - highest[:, None]).exp().sum(1))
    here = targets - comm.rank * logits.shape[1]
    picked = comm.all_reduce(logits.gather(1, here[:, None])[:, 0])
    return sums.log() + highest - picked


@alternative("vocab_parallel_loss")
def merges_logsumexps(comm, logits, targets):
    own = logits.logsumexp(1)
    highest = comm.all_reduce(own.clone(), "max")
    total = comm.all_reduce((own - highest).exp()).log() + highest
    return total - comm.all_reduce(_picked(comm, logits, targets))


@alternative("vocab_parallel_loss")
def sums_three_times(comm, logits, targets):
    highest = comm.all_reduce(logits.max(1).values, "max")
    shifted = logits - highest[:, None]
    sums = comm.all_reduce(shifted.exp().sum(1))
    return sums.log() - comm.all_reduce(_picked(comm, shifted, targets))


# dropout_seed


def _number(dp_rank, part, tp_size, region):
    kind = ("stream", "heads", "positions").index(region)
    return 1_000_003 * ((dp_rank * tp_size + part) * 3 + kind)


@misconception(
    "dropout_seed",
    "Every rank draws the same mask. For some activations that is right. For which is it not?",
    see=DROPOUT,
    is_starter=True,
)
def the_same_everywhere(seed, dp_rank, tp_rank, tp_size, region):
    return seed


@misconception(
    "dropout_seed",
    "Every rank has its own mask on the stream too. Tensor-parallel ranks hold the same stream: "
    "with other masks they are no longer copies, and each computes another model.",
    see=DROPOUT,
)
def differs_on_the_stream(seed, dp_rank, tp_rank, tp_size, region):
    return seed + _number(dp_rank, tp_rank, tp_size, region)


@misconception(
    "dropout_seed",
    "Tensor-parallel ranks share the mask of attention weights: the same places of different heads "
    "are dropped, and of different positions. What is divided needs masks of its own.",
    see=DROPOUT,
)
def shares_masks_of_parts(seed, dp_rank, tp_rank, tp_size, region):
    return seed + _number(dp_rank, 0, tp_size, region)


@misconception(
    "dropout_seed",
    "Data-parallel ranks share masks: other rows, and the same places dropped in all of them.",
    see=DROPOUT,
)
def forgets_data_parallel_ranks(seed, dp_rank, tp_rank, tp_size, region):
    return seed + _number(0, 0 if region == "stream" else tp_rank, tp_size, region)


@misconception(
    "dropout_seed",
    "You add the ranks up: (0, 1) and (1, 0) have the same seed. Numbers of pairs need a product.",
    see=DROPOUT,
)
def adds_ranks_up(seed, dp_rank, tp_rank, tp_size, region):
    part = 0 if region == "stream" else tp_rank
    kind = ("stream", "heads", "positions").index(region)
    return seed + 1000 * kind + dp_rank + part


@misconception(
    "dropout_seed",
    "Regions share a seed: what is dropped in one is dropped at the same places in the other.",
    see=DROPOUT,
)
def forgets_the_region(seed, dp_rank, tp_rank, tp_size, region):
    part = 0 if region == "stream" else tp_rank
    return seed + _number(dp_rank, part, tp_size, "stream")


@misconception(
    "dropout_seed",
    "Under sequence parallelism you still share the stream's mask. Each rank has its own positions "
    "there.",
    see=DROPOUT,
)
def shares_masks_of_positions(seed, dp_rank, tp_rank, tp_size, region):
    return seed + _number(dp_rank, tp_rank if region == "heads" else 0, tp_size, region)


@alternative("dropout_seed")
def counts_pairs(seed, dp_rank, tp_rank, tp_size, region):
    part = tp_rank + 1 if region == "heads" else 0
    if region == "positions":
        part = tp_size + 1 + tp_rank
    return seed + 100_000 * (dp_rank * (2 * tp_size + 1) + part)


@alternative("dropout_seed")
def offsets_by_megatrons_number(seed, dp_rank, tp_rank, tp_size, region):
    offset = {"stream": 0, "heads": 2718 * (tp_rank + 1), "positions": 31_415 * (tp_rank + 1)}
    return seed + 10_000_000 * dp_rank + offset[region]


# sequence_parallel_sublayer


@misconception(
    "sequence_parallel_sublayer",
    "You call inner with this rank's positions. Attention looks at all of them: Megatron's "
    "sequence parallelism does not divide attention by positions, it divides what stands between "
    "regions.",
    see=SEQUENCE,
)
def divides_inner_by_positions(comm, x, norm, inner):
    comm.barrier()
    return x + inner(norm(x))


@misconception(
    "sequence_parallel_sublayer",
    "You sum by an all-reduce and cut out your positions: half of what travels is thrown away. A "
    "reduce-scatter gives each rank its own.",
    see=SEQUENCE,
)
def sums_everything_everywhere(comm, x, norm, inner):
    whole = comm.all_reduce(inner(comm.all_gather(norm(x))))
    return x + whole.chunk(comm.size)[comm.rank]


@misconception(
    "sequence_parallel_sublayer",
    "You take this rank's positions of its own summand: the sum over ranks is missing.",
    see=SEQUENCE,
)
def does_not_sum_summands(comm, x, norm, inner):
    mine = inner(comm.all_gather(norm(x)))
    return x + mine.chunk(comm.size)[comm.rank]


@misconception(
    "sequence_parallel_sublayer",
    "You add x before the sum: it then counts once for each rank.",
    see=SEQUENCE,
)
def adds_x_before_the_sum(comm, x, norm, inner):
    whole = comm.all_gather(x)
    return comm.reduce_scatter(whole + inner(norm(whole)))


@misconception(
    "sequence_parallel_sublayer",
    "x is missing: y = x + inner(norm(x)).",
    see=SEQUENCE,
)
def forgets_the_residual(comm, x, norm, inner):
    return comm.reduce_scatter(inner(comm.all_gather(norm(x))))


@misconception(
    "sequence_parallel_sublayer",
    "You average summands.",
    see=SEQUENCE,
)
def averages_positions(comm, x, norm, inner):
    return x + comm.reduce_scatter(inner(comm.all_gather(norm(x))), "mean")


@misconception(
    "sequence_parallel_sublayer",
    "You do not normalize.",
    see=SEQUENCE,
)
def forgets_the_norm(comm, x, norm, inner):
    return x + comm.reduce_scatter(inner(comm.all_gather(x)))


@misconception(
    "sequence_parallel_sublayer",
    "You add the normalized x: the residual stream goes by the norm.",
    see=SEQUENCE,
)
def adds_the_normalized_x(comm, x, norm, inner):
    h = norm(x)
    return h + comm.reduce_scatter(inner(comm.all_gather(h)))


@misconception(
    "sequence_parallel_sublayer",
    "Right values, but every rank normalizes all positions, and keeps what backward needs of them: "
    "the work and the memory that were to be divided. Normalize, then gather.",
    see=SEQUENCE,
)
def normalizes_after_gathering(comm, x, norm, inner):
    return x + comm.reduce_scatter(inner(norm(comm.all_gather(x))))


@misconception(
    "sequence_parallel_sublayer",
    "You cut out your positions first and sum then: what is added up are different positions of "
    "different ranks.",
    see=SEQUENCE,
)
def sums_other_positions(comm, x, norm, inner):
    mine = inner(comm.all_gather(norm(x))).chunk(comm.size)[comm.rank]
    return comm.all_reduce(x + mine)


@alternative("sequence_parallel_sublayer")
def in_place(comm, x, norm, inner):
    y = inner(comm.all_gather(norm(x).contiguous()))
    return comm.reduce_scatter(y).add_(x)


@alternative("sequence_parallel_sublayer")
def with_places_for_results(comm, x, norm, inner):
    whole = x.new_empty(len(x) * comm.size, x.shape[1])
    comm.all_gather(norm(x), out=whole)
    y = torch.empty_like(x)
    comm.reduce_scatter(inner(whole), out=y)
    return x + y


# tensor_parallel_bytes


def _bytes(b, s, h, layers, t, passes, size=2):
    return layers * passes * (t - 1) / t * size * b * s * h


@misconception(
    "tensor_parallel_bytes",
    "Half of it. Either you count forward's two all-reduces and not backward's, or numbers where "
    "bytes are asked for: two each.",
    see=COST,
)
def counts_half(b, s, h, layers, t, sequence_parallel):
    return _bytes(b, s, h, layers, t, 4)


@misconception(
    "tensor_parallel_bytes",
    "Twice too much. Either you reduce after each matrix, where a pair needs one sum, or you count "
    "four bytes a number, where activations have 16 bits.",
    see=COST,
)
def counts_twice_too_much(b, s, h, layers, t, sequence_parallel):
    return _bytes(b, s, h, layers, t, 16)


@misconception(
    "tensor_parallel_bytes",
    "An all-reduce passes the ring twice, to sum and to share: 2 (t-1)/t.",
    see=COST,
)
def counts_one_pass(b, s, h, layers, t, sequence_parallel):
    return _bytes(b, s, h, layers, t, 4 if not sequence_parallel else 8)


@misconception(
    "tensor_parallel_bytes",
    "Sequence parallelism does not save traffic: an all-reduce becomes a reduce-scatter and an "
    "all-gather, which are its two halves. It saves memory.",
    see=SEQUENCE,
)
def halves_with_sequence_parallelism(b, s, h, layers, t, sequence_parallel):
    return _bytes(b, s, h, layers, t, 4 if sequence_parallel else 8)


@misconception(
    "tensor_parallel_bytes",
    "Sequence parallelism does not add traffic: gather and scatter stand in place of the all-"
    "reduce, not beside it.",
    see=SEQUENCE,
)
def doubles_with_sequence_parallelism(b, s, h, layers, t, sequence_parallel):
    return _bytes(b, s, h, layers, t, 16 if sequence_parallel else 8)


@misconception(
    "tensor_parallel_bytes",
    "You leave the factor (t-1)/t out: a rank does not send its own part to itself.",
    see=COST,
)
def leaves_out_the_share(b, s, h, layers, t, sequence_parallel):
    return layers * 8 * 2 * b * s * h


@alternative("tensor_parallel_bytes")
def counts_halves(b, s, h, layers, t, sequence_parallel):
    half = (t - 1) * (2 * b * s * h / t)
    return sum(half for _ in range(8)) * layers


@alternative("tensor_parallel_bytes")
def as_the_paper_has_it(b, s, h, layers, t, sequence_parallel):
    return layers * 8 * b * s * h * (t - 1) / t * 2


# matmul_reduce_scatter


def _ring(comm, products, start=-1, direction=1):
    n = comm.size
    total = products[(comm.rank + start) % n]
    for step in range(1, n):
        arriving = torch.empty_like(total)
        handles = [
            comm.isend(total, (comm.rank + direction) % n),
            comm.irecv(arriving, (comm.rank - direction) % n),
        ]
        for handle in handles:
            handle.wait()
        total = arriving + products[(comm.rank + start - direction * step) % n]
    return total


@misconception(
    "matmul_reduce_scatter",
    "Products and messages stand after each other: either all products come first, or you wait for "
    "a message before you compute what is added to it. Compute between start and wait.",
    see=OVERLAP,
)
def does_not_overlap(comm, x, weight):
    return _ring(comm, [part @ weight.T for part in x.chunk(comm.size)])


@misconception(
    "matmul_reduce_scatter",
    "Right values by the collective: it waits for the whole product. Take isend and irecv.",
    see=OVERLAP,
)
def calls_reduce_scatter(comm, x, weight):
    return comm.reduce_scatter(x @ weight.T)


@misconception(
    "matmul_reduce_scatter",
    "The part that arrives last on rank r is part r + 1: you began with your own part, which has "
    "to come last.",
    see=OVERLAP,
)
def begins_with_its_own_part(comm, x, weight):
    n, parts = comm.size, x.chunk(comm.size)
    total = parts[comm.rank] @ weight.T
    for step in range(1, n):
        arriving = torch.empty_like(total)
        handles = [
            comm.isend(total, (comm.rank + 1) % n),
            comm.irecv(arriving, (comm.rank - 1) % n),
        ]
        own = parts[(comm.rank - step) % n] @ weight.T
        for handle in handles:
            handle.wait()
        total = arriving + own
    return total


@misconception(
    "matmul_reduce_scatter",
    "All products come first, and after N - 1 steps of your ring it is part r + 1 that is finished "
    "on rank r. Begin one part earlier, and compute while sums travel.",
    see=OVERLAP,
)
def ends_with_the_next_part(comm, x, weight):
    n = comm.size
    parts = [part @ weight.T for part in x.chunk(n)]
    for step in range(n - 1):
        sending = comm.isend(parts[(comm.rank - step) % n], (comm.rank + 1) % n)
        arriving = comm.recv(torch.empty_like(parts[0]), (comm.rank - 1) % n)
        sending.wait()
        place = (comm.rank - step - 1) % n
        parts[place] = parts[place] + arriving
    return parts[comm.rank]


@misconception(
    "matmul_reduce_scatter",
    "What arrives is kept and your own product is not added: you end with one rank's product.",
    see=OVERLAP,
)
def does_not_add(comm, x, weight):
    n, parts = comm.size, x.chunk(comm.size)
    total = parts[(comm.rank - 1) % n] @ weight.T
    for _ in range(1, n):
        arriving = torch.empty_like(total)
        handles = [
            comm.isend(total, (comm.rank + 1) % n),
            comm.irecv(arriving, (comm.rank - 1) % n),
        ]
        for handle in handles:
            handle.wait()
        total = arriving
    return total


@misconception(
    "matmul_reduce_scatter",
    "Your own part of your own product: nothing is summed over ranks.",
    see=OVERLAP,
)
def keeps_its_own_part(comm, x, weight):
    return x.chunk(comm.size)[comm.rank] @ weight.T


@misconception(
    "matmul_reduce_scatter",
    "You send each rank its part directly and add what comes: right, but what a rank sends has to "
    "wait for its product, and one link carries N - 1 messages.",
    see=OVERLAP,
)
def sends_all_directly(comm, x, weight):
    n, parts = comm.size, [part @ weight.T for part in x.chunk(comm.size)]
    total, handles = parts[comm.rank].clone(), []
    for step in range(1, n):
        handles.append(comm.isend(parts[(comm.rank + step) % n], (comm.rank + step) % n))
    arrived = []
    for step in range(1, n):
        place = torch.empty_like(total)
        handles.append(comm.irecv(place, (comm.rank - step) % n))
        arrived.append(place)
    for handle in handles:
        handle.wait()
    return total + sum(arrived)


@misconception(
    "matmul_reduce_scatter",
    "All ranks send before anybody receives: send waits for the other side. Start both, then wait.",
    see=OVERLAP,
)
def sends_before_receiving(comm, x, weight):
    n, parts = comm.size, x.chunk(comm.size)
    total = parts[(comm.rank - 1) % n] @ weight.T
    for step in range(1, n):
        comm.send(total, (comm.rank + 1) % n)
        arriving = comm.recv(torch.empty_like(total), (comm.rank - 1) % n)
        total = arriving + parts[(comm.rank - 1 - step) % n] @ weight.T
    return total


@alternative("matmul_reduce_scatter")
def round_the_other_way(comm, x, weight):
    n, parts = comm.size, x.chunk(comm.size)
    total = parts[(comm.rank + 1) % n] @ weight.T
    for step in range(1, n):
        arriving = torch.empty_like(total)
        receiving = comm.irecv(arriving, (comm.rank + 1) % n)
        sending = comm.isend(total, (comm.rank - 1) % n)
        own = parts[(comm.rank + 1 + step) % n] @ weight.T
        receiving.wait()
        sending.wait()
        total = own + arriving
    return total


@alternative("matmul_reduce_scatter")
def looks_one_product_ahead(comm, x, weight):
    n, rows = comm.size, len(x) // comm.size
    order = [(comm.rank - 1 - step) % n for step in range(n)]
    product = None
    for step, part in enumerate(order):
        handles = []
        if product is not None:
            arriving = torch.empty_like(product)
            handles = [
                comm.irecv(arriving, (comm.rank - 1) % n),
                comm.isend(product, (comm.rank + 1) % n),
            ]
        own = F.linear(x[part * rows : (part + 1) * rows], weight)
        for handle in handles:
            handle.wait()
        product = own if step == 0 else own + arriving
    return product
