"""Grades chapter 13: tensor and sequence parallelism. Oracles: one rank with whole matrices, closed
forms, and the ledgers of the simulated machine: values, traffic, time."""

import torch
import torch.nn.functional as F

from autograder import exercise, expect, points
from reference.parallel.ranks import CLASSROOM


def _normal(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=dtype)


def _whole(rng, low, high):
    return int(torch.randint(low, high, (), generator=rng))


@exercise(
    "parallel_mlp",
    kind="build",
    minutes=20,
    difficulty=2,
    see="3. A pair of layers",
    through="run_parallel_mlp",
    on_ranks=True,
    hints=(
        "Which way of cutting the first matrix lets each rank apply relu to what it has, without "
        "asking the others?",
        "Right values with too many collectives: something is made whole in the middle. Wrong dx: "
        "each rank's part says something about all of x, and the sum is missing.",
        "w1 by rows of outputs, w2 by columns of inputs\nhidden = relu(x w1^T), here\n"
        "y = all_reduce(hidden w2^T)\ngrad_hidden = grad_y w2 where hidden > 0\n"
        "grad_x = all_reduce(grad_hidden w1)",
    ),
)
class TestParallelMLP:
    def _run(self, student, rng, num_ranks, batch=3, dim=4, hidden=None):
        hidden = hidden or 3 * num_ranks
        x, grad = _normal(rng, batch, dim), _normal(rng, batch, dim)
        w1, w2 = _normal(rng, hidden, dim), _normal(rng, dim, hidden)
        got = student.run_parallel_mlp(x, w1, w2, grad, num_ranks)
        leaves = [t.clone().requires_grad_() for t in (x, w1, w2)]
        y = (leaves[0] @ leaves[1].T).relu() @ leaves[2].T
        y.backward(grad)
        return got, y.detach(), [leaf.grad for leaf in leaves]

    @points(2)
    def test_output(self, student, rng):
        """gives every rank the whole output"""
        for num_ranks in (1, 3):
            got, y, _ = self._run(student, rng, num_ranks)
            for rank, ours in enumerate(got["outputs"]):
                expect.close(ours, y, f"y on rank {rank} of {num_ranks}")

    @points(2)
    def test_input_gradient(self, student, rng):
        """gives every rank the whole gradient of x"""
        got, _, (grad_x, *_) = self._run(student, rng, 2)
        for rank, ours in enumerate(got["grad_x"]):
            expect.close(ours, grad_x, f"the gradient of x on rank {rank}")

    @points(2)
    def test_weight_gradients(self, student, rng):
        """gives each rank the gradients of its parts"""
        got, _, (_, w1, w2) = self._run(student, rng, 2)
        for rank in range(2):
            expect.close(got["grad_w1"][rank], w1.chunk(2)[rank], f"that of w1 on rank {rank}")
            expect.close(got["grad_w2"][rank], w2.chunk(2, 1)[rank], f"that of w2 on rank {rank}")

    @points(2)
    def test_traffic(self, student, rng):
        """needs two all-reduces of x's size"""
        got, *_ = self._run(student, rng, 2, hidden=16)
        most = 2 * 2 * 1 / 2 * 3 * 4 * 8
        for rank, (calls, sent) in enumerate(zip(got["calls"], got["sent"], strict=True)):
            expect.true(
                calls <= 2 and sent <= most,
                f"rank {rank} made {calls} collectives and sent {sent:g} bytes; two all-reduces of "
                f"(3, 4) float64 send {most:g}",
            )


@exercise(
    "row_parallel_linear",
    kind="repair",
    minutes=6,
    difficulty=1,
    see="3. A pair of layers",
    through="run_row_parallel_linear",
    on_ranks=True,
    hints=(
        "Run it on two ranks in your head, with zeros for x. What comes out?",
        "Off by a multiple of the bias: it is the same on all ranks, and a sum over ranks counts "
        "it once for each.",
        "the sum over ranks of x W^T, and then the bias, once",
    ),
)
class TestRowParallelLinear:
    def _grade(self, student, rng, num_ranks, scale=1.0):
        x, weight = _normal(rng, 3, 2 * num_ranks), _normal(rng, 5, 2 * num_ranks)
        bias = _normal(rng, 5) * scale
        got = student.run_row_parallel_linear(x, weight, bias, num_ranks)
        for rank, ours in enumerate(got):
            expect.close(ours, F.linear(x, weight, bias), f"y on rank {rank} of {num_ranks}")

    def test_one_rank(self, student, rng):
        """is an nn.Linear on one rank"""
        self._grade(student, rng, 1)

    def test_without_bias(self, student, rng):
        """sums the parts, where the bias is zero"""
        self._grade(student, rng, 3, scale=0.0)

    @points(2)
    def test_bias(self, student, rng):
        """adds the bias once"""
        self._grade(student, rng, 2)
        self._grade(student, rng, 4)


@exercise(
    "heads_of_rank",
    kind="derive",
    minutes=12,
    difficulty=2,
    see="4. Attention by heads",
    hints=(
        "Write down 8 query heads and 2 key/value heads for 4 ranks. Which ranks need the second "
        "key/value head?",
        "Right where there are as many key/value heads as ranks or more; with fewer, several "
        "ranks hold the same one. Neighbours share, not every K-th.",
        "queries = rank's H / N in order\nkv = {q // (H / K) for q in queries}, sorted",
    ),
)
class TestHeadsOfRank:
    def _grade(self, student, n, h, k):
        for rank in range(n):
            queries = list(range(rank * h // n, (rank + 1) * h // n))
            expected = queries, sorted({q // (h // k) for q in queries})
            got = student.heads_of_rank(rank, n, h, k)
            expect.true(
                isinstance(got, tuple | list) and len(got) == 2,
                f"expected two lists (query_heads, kv_heads), got {got!r}",
            )
            for name, ours, theirs in zip(("query", "key/value"), got, expected, strict=True):
                expect.equal(
                    list(ours), theirs, f"the {name} heads of rank {rank} of {n}, H = {h}, K = {k}"
                )

    def test_as_many_as_queries(self, student, rng):
        """multi-head attention: as many of both"""
        self._grade(student, 2, 4, 4)

    @points(2)
    def test_more_than_ranks(self, student, rng):
        """as many key/value heads as ranks, or more"""
        n = 2 * _whole(rng, 1, 3)
        self._grade(student, n, 4 * n, 2 * n)
        self._grade(student, n, 4 * n, n)

    @points(2)
    def test_fewer_than_ranks(self, student, rng):
        """fewer key/value heads than ranks: neighbours share"""
        self._grade(student, 8, 16, 2)
        self._grade(student, 4, 8 * _whole(rng, 1, 4), 2)
        self._grade(student, 4, 4, 1)


@exercise(
    "vocab_parallel_loss",
    kind="build",
    minutes=20,
    difficulty=3,
    see="5. The vocabulary",
    through="run_vocab_parallel_loss",
    on_ranks=True,
    hints=(
        "Which three numbers of a row do all ranks together need? One of them is a maximum.",
        "Infinite: shift by the largest logit of all ranks before exp. A wrong target's logit: on "
        "a rank that does not have the target, indexing finds another token's.",
        "highest = all_reduce(max here, 'max')\nhere = targets - rank V/N; inside = 0 <= here < "
        "V/N\nsums = all_reduce([sum of exp(z - highest), z at target if inside, else 0])\n"
        "log(sums[0]) + highest - sums[1]",
    ),
)
class TestVocabParallelLoss:
    def _run(self, student, rng, num_ranks, scale=1.0, batch=5, part=3, shift=0.0):
        logits = _normal(rng, batch, part * num_ranks) * scale + shift
        targets = torch.randint(0, part * num_ranks, (batch,), generator=rng)
        targets[0], targets[1] = 0, part * num_ranks - 1
        got = student.run_vocab_parallel_loss(logits, targets, num_ranks)
        return got, F.cross_entropy(logits, targets, reduction="none")

    def test_one_rank(self, student, rng):
        """is cross-entropy on one rank"""
        got, losses = self._run(student, rng, 1)
        expect.close(got["losses"][0], losses, "the losses")

    @points(2)
    def test_several_ranks(self, student, rng):
        """gives every rank the losses"""
        for num_ranks in (2, 4):
            got, losses = self._run(student, rng, num_ranks)
            for rank, ours in enumerate(got["losses"]):
                expect.close(ours, losses, f"the losses on rank {rank} of {num_ranks}")

    @points(2)
    def test_large_logits(self, student, rng):
        """does not overflow, nor underflow"""
        for shift in (0.0, 3000.0, -3000.0):
            got, losses = self._run(student, rng, 2, scale=400.0, shift=shift)
            expect.close(got["losses"][1], losses, f"the losses of logits around {shift:g}")

    @points(2)
    def test_traffic(self, student, rng):
        """sends three numbers a row, whatever the vocabulary"""
        got, _ = self._run(student, rng, 2, part=20)
        for rank, payload in enumerate(got["payload"]):
            expect.true(
                payload <= 15,
                f"rank {rank} put {payload:g} numbers into collectives for 5 rows; 15 are enough",
            )


@exercise(
    "dropout_seed",
    kind="repair",
    minutes=12,
    difficulty=2,
    see="6. Dropout",
    hints=(
        "Two ranks, one mask: for which activations is that right, and for which does it drop the "
        "same places of different heads?",
        "Equal where it must not be: other rows, other heads, other positions, other regions. Also "
        "by accident: with seed + dp_rank + tp_rank, ranks (0, 1) and (1, 0) meet.",
        "a number for each (dp_rank, part, region), where part is 0 on the stream and tp_rank "
        "elsewhere; no two alike",
    ),
)
class TestDropoutSeed:
    def _seeds(self, student, rng, region, dp=3, tp=4):
        seed = _whole(rng, 0, 10_000)
        found = {}
        for d in range(dp):
            for t in range(tp):
                got = student.dropout_seed(seed, d, t, tp, region)
                expect.true(
                    type(got) is int and got >= 0, f"expected an integer from 0 on, got {got!r}"
                )
                found[d, t] = got
        return found

    @points(2)
    def test_stream(self, student, rng):
        """the stream: alike on ranks with the same rows, and on no others"""
        found = self._seeds(student, rng, "stream")
        for d in range(3):
            mine = {found[d, t] for t in range(4)}
            expect.true(len(mine) == 1, f"dp_rank {d}: ranks that hold the same have seeds {mine}")
        expect.true(len(set(found.values())) == 3, f"ranks with other rows share a mask: {found}")

    @points(2)
    def test_parts(self, student, rng):
        """heads and positions: every rank its own"""
        for region in ("heads", "positions"):
            found = self._seeds(student, rng, region)
            expect.true(
                len(set(found.values())) == 12, f"{region}: (dp, tp) ranks share seeds: {found}"
            )

    def test_regions(self, student, rng):
        """other regions have other masks"""
        seed = _whole(rng, 0, 10_000)
        seeds = [student.dropout_seed(seed, 0, 0, 2, r) for r in ("stream", "heads", "positions")]
        expect.true(len(set(seeds)) == 3, f"three regions have the seeds {seeds}")


@exercise(
    "sequence_parallel_sublayer",
    kind="build",
    minutes=15,
    difficulty=2,
    see="7. Sequence parallelism",
    through="run_sequence_parallel_sublayer",
    on_ranks=True,
    hints=(
        "Which of norm, inner and the residual needs other ranks' positions?",
        "Right values, too many bytes: an all-reduce gives everybody all positions, of which all "
        "but a part are thrown away. Wrong values: inner mixes positions and needs all of them.",
        "h = norm(x), here\nx + reduce_scatter(inner(all_gather(h)))",
    ),
)
class TestSequenceParallelSublayer:
    def _run(self, student, rng, num_ranks, part=2, dim=3):
        x, weight = _normal(rng, part * num_ranks, dim) * 3, _normal(rng, dim)
        mixes = [_normal(rng, len(x), len(x)) for _ in range(num_ranks)]
        got = student.run_sequence_parallel_sublayer(x, weight, mixes)
        return got, x + sum(mixes) @ F.rms_norm(x, (dim,), weight, 1e-6), x

    @points(2)
    def test_output(self, student, rng):
        """gives each rank its positions of the whole"""
        for num_ranks in (1, 2, 3):
            got, y, _ = self._run(student, rng, num_ranks)
            for rank, ours in enumerate(got["outputs"]):
                what = f"y on rank {rank} of {num_ranks}"
                expect.close(ours, y.chunk(num_ranks)[rank].clone(), what)

    def test_norm(self, student, rng):
        """normalizes its own positions alone"""
        got, _, x = self._run(student, rng, 2)
        expect.true(
            all(rows == [len(x) // 2] for rows in got["normed"]),
            f"norm was called with {got['normed']} positions, by rank; each has {len(x) // 2}",
        )

    def test_inner(self, student, rng):
        """calls inner once, with all positions"""
        got, _, x = self._run(student, rng, 2)
        expect.true(
            all(rows == [len(x)] for rows in got["inputs"]),
            f"inner was called with {got['inputs']} rows, by rank; expected {len(x)}, once",
        )

    @points(2)
    def test_traffic(self, student, rng):
        """sends what one all-reduce would"""
        got, _, x = self._run(student, rng, 4)
        most = 2 * 3 / 4 * x.nbytes
        for rank, (calls, sent) in enumerate(zip(got["calls"], got["sent"], strict=True)):
            expect.true(
                calls <= 2 and sent <= most,
                f"rank {rank} made {calls} collectives and sent {sent:g} bytes; a gather and a "
                f"reduce-scatter send {most:g}",
            )


@exercise(
    "tensor_parallel_bytes",
    kind="estimate",
    minutes=8,
    difficulty=1,
    see="8. What it costs",
    hints=(
        "Count the regions of a layer, and how often each is left: on the way forward, and on the "
        "way back.",
        "A factor of 2: backward has its own all-reduces, a ring passes twice, and a number has 2 "
        "bytes. And sequence parallelism cuts each all-reduce in two halves.",
        "4 all-reduces a layer, each 2 (t-1)/t * 2 bytes * b s h, with and without sequence "
        "parallelism",
    ),
)
class TestTensorParallelBytes:
    def _grade(self, student, rng, sequence_parallel, t=None):
        b, s, h, layers = _whole(rng, 1, 9), 128 * _whole(rng, 1, 9), 64 * _whole(rng, 1, 9), 3
        t = t or _whole(rng, 2, 9)
        got = student.tensor_parallel_bytes(b, s, h, layers, t, sequence_parallel)
        expected = layers * 8 * (t - 1) / t * 2 * b * s * h
        what = f"the bytes on {t} ranks" + (" with sequence parallelism" * sequence_parallel)
        expect.number(got, expected, what=what)

    @points(2)
    def test_all_reduces(self, student, rng):
        """four all-reduces a layer"""
        self._grade(student, rng, False)

    @points(2)
    def test_sequence_parallel(self, student, rng):
        """the same bytes with sequence parallelism"""
        self._grade(student, rng, True)

    def test_alone(self, student, rng):
        """nothing on one rank"""
        self._grade(student, rng, False, t=1)


@exercise(
    "matmul_reduce_scatter",
    kind="challenge",
    minutes=30,
    difficulty=3,
    see="9. Computing while gathering",
    through="run_matmul_reduce_scatter",
    on_ranks=True,
    is_measured=True,
    hints=(
        "The part that arrives last must be your own. With which part does the round begin, then?",
        "Too slow: all products before the first message, or a wait before the next product. Start "
        "isend and irecv, compute the product for what is arriving, then wait.",
        "total = product of part rank - 1\nfor step 1 ... N-1:\n    isend total, irecv arriving\n"
        "    own = product of part rank - 1 - step\n    wait; total = arriving + own",
    ),
)
class TestMatmulReduceScatter:
    def _run(self, student, rng, num_ranks, rows=2, dim=3, inner=2, dtype=torch.float64):
        xs = [_normal(rng, rows * num_ranks, inner, dtype=dtype) for _ in range(num_ranks)]
        weights = [_normal(rng, dim, inner, dtype=dtype) for _ in range(num_ranks)]
        got = student.run_matmul_reduce_scatter(xs, weights)
        return got, sum(x.double() @ w.double().T for x, w in zip(xs, weights, strict=True))

    @points(2)
    def test_sums(self, student, rng):
        """gives each rank its positions of the sum"""
        for num_ranks in (1, 2, 4):
            got, y = self._run(student, rng, num_ranks)
            for rank, ours in enumerate(got["outputs"]):
                what = f"the output on rank {rank} of {num_ranks}"
                expect.close(ours, y.chunk(num_ranks)[rank].clone(), what)

    def test_traffic(self, student, rng):
        """sends no more than a reduce-scatter does, in messages"""
        got, y = self._run(student, rng, 4)
        expect.true(got["collectives"] == [0] * 4, "expected isend and irecv alone")
        for rank, sent in enumerate(got["sent"]):
            expect.true(
                sent <= 3 / 4 * y.nbytes,
                f"rank {rank} sent {sent:g} bytes; a reduce-scatter sends {3 / 4 * y.nbytes:g}",
            )

    @points(3)
    def test_overlap(self, student, rng):
        """multiplies while sums travel"""
        rows, dim, inner = 64, 16, 1024
        got, _ = self._run(student, rng, 3, rows, dim, inner, torch.float32)
        product = 2 * rows * dim * inner / CLASSROOM.flops_per_second
        link = CLASSROOM.intra
        message = link.latency_seconds + rows * dim * 4 / link.bytes_per_second
        least = product + 2 * max(product, message)
        took = max(got["seconds"])
        expect.true(
            took <= least * (1 + 1e-9),
            f"took {took * 1e6:.1f} microseconds: three products take {3 * product * 1e6:.1f}, and "
            f"the two messages, of {message * 1e6:.1f} each, can hide behind them",
        )
