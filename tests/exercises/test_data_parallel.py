"""Grades chapter 11: collectives and data parallelism. Oracles: one rank with all rows, closed
forms, and the ledgers of the simulated machine: values, traffic, time."""

import math

import torch

from autograder import exercise, expect, points
from reference.parallel.ranks import CLASSROOM


def _normal(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=dtype)


def _whole(rng, low, high):
    return int(torch.randint(low, high, (), generator=rng))


@exercise(
    "ring_all_reduce",
    kind="build",
    minutes=30,
    difficulty=3,
    see="4. All-reduce from messages",
    through="run_ring_all_reduce",
    on_ranks=True,
    hints=(
        "Draw four ranks and four parts. In step 0 rank r sends part r. Which part must it send in "
        "step 1, so that what it has just added goes on?",
        "A deadlock: start the isend before the recv, and wait for it after. Right sums in one "
        "part only: the second round, which copies, is missing. Too many bytes: whole tensors go.",
        "for step in range(2 * (N - 1)):\n    leaving, own = parts[rank - step], parts[rank - step "
        "- 1]   # modulo N\n    isend leaving, recv arriving, wait\n    own += arriving in the "
        "first N - 1 steps, own = arriving in the others",
    ),
)
class TestRingAllReduce:
    def _run(self, student, rng, num_ranks, shapes=None):
        shapes = shapes or [(_whole(rng, 1, 4), _whole(rng, 1, 4)) for _ in range(num_ranks)]
        given = [[_normal(rng, *shape) for shape in shapes] for _ in range(num_ranks)]
        return student.run_ring_all_reduce(given), given

    @points(2)
    def test_sums(self, student, rng):
        """gives every rank the sum of every part"""
        for num_ranks in (2, 4):
            got, given = self._run(student, rng, num_ranks)
            sums = [sum(parts) for parts in zip(*given, strict=True)]
            for rank, ours in enumerate(got["parts"]):
                expect.close(ours, sums, f"the parts on rank {rank} of {num_ranks}")

    def test_alone(self, student, rng):
        """a single rank keeps its part"""
        got, given = self._run(student, rng, 1)
        expect.close(got["parts"][0], given[0], "the part")

    def test_is_built_from_messages(self, student, rng):
        """calls no collective"""
        got, _ = self._run(student, rng, 2)
        expect.true(
            got["collectives"] == [0, 0],
            f"expected isend and recv alone; calls of other operations by rank: "
            f"{got['collectives']}",
        )

    @points(2)
    def test_bytes(self, student, rng):
        """no rank sends more than 2 (N-1)/N of the tensor"""
        got, _ = self._run(student, rng, 4, [(6,)] * 4)
        least = 2 * 3 * 6 * 8
        for rank, sent in enumerate(got["sent"]):
            expect.true(
                sent <= least,
                f"rank {rank} of 4 sent {sent:g} bytes of a tensor of {4 * 6 * 8}; a ring sends "
                f"{least}",
            )

    def test_time(self, student, rng):
        """all ranks send at the same time"""
        got, _ = self._run(student, rng, 3, [(6,)] * 3)
        link = CLASSROOM.intra
        least = 4 * (link.latency_seconds + 48 / link.bytes_per_second)
        expect.true(
            got["seconds"] <= least * (1 + 1e-9),
            f"took {got['seconds'] * 1e6:.2f} microseconds; four steps of the ring take "
            f"{least * 1e6:.2f}",
        )


@exercise(
    "all_reduce_seconds",
    kind="derive",
    minutes=12,
    difficulty=2,
    see="5. What it costs",
    hints=(
        "For each algorithm two questions: how many messages one after the other, and how large is "
        "each?",
        "Every message pays the latency. An all-reduce has two halves, each rank must send what "
        "others lack and receive what it lacks; gossip alone does it in one.",
        "steps * (latency + size / bandwidth)\nstar 2 (N-1), B; tree 2 ceil(log2 N), B; "
        "ring 2 (N-1), B / N; gossip N-1, B",
    ),
)
class TestAllReduceSeconds:
    def _grade(self, student, rng, algorithm, n=None):
        n = n or _whole(rng, 3, 40)
        num_bytes, latency, bandwidth = _whole(rng, 10, 99) * 1000, 1e-6, 1e9
        levels = math.ceil(math.log2(n))
        steps, size = {
            "star": (2 * (n - 1), num_bytes),
            "tree": (2 * levels, num_bytes),
            "ring": (2 * (n - 1), num_bytes / n),
            "gossip": (n - 1, num_bytes),
        }[algorithm]
        got = student.all_reduce_seconds(algorithm, n, num_bytes, latency, bandwidth)
        what = f"the seconds of {algorithm} on {n} ranks"
        expect.number(got, steps * (latency + size / bandwidth), what=what)

    @points(2)
    def test_ring(self, student, rng):
        """ring: many small messages"""
        self._grade(student, rng, "ring")

    @points(2)
    def test_tree(self, student, rng):
        """tree: few large messages, also where N is no power of two"""
        for n in (8, 5, None):
            self._grade(student, rng, "tree", n)

    def test_star_and_gossip(self, student, rng):
        """star and gossip: many large messages"""
        self._grade(student, rng, "star")
        self._grade(student, rng, "gossip")

    def test_alone(self, student, rng):
        """one rank has nothing to do"""
        for algorithm in ("star", "tree", "ring", "gossip"):
            self._grade(student, rng, algorithm, 1)


@exercise(
    "place_of_rank",
    kind="repair",
    minutes=8,
    difficulty=1,
    see="2. Names",
    hints=(
        "Two numbers of a rank are in play: among all, and on its node. Which one does a GPU have, "
        "and which one decides about data?",
        "An invalid device: a node has gpus_per_node GPUs, numbered from 0. Rows seen twice: ranks "
        "of different nodes have the same number on their nodes.",
        "gpu = rank % gpus_per_node\nrows = range(rank, num_rows, world_size)",
    ),
)
class TestPlaceOfRank:
    def _run(self, student, rng):
        nodes, gpus = _whole(rng, 2, 4), _whole(rng, 2, 5)
        n = nodes * gpus
        num_rows = n * _whole(rng, 2, 4) + _whole(rng, 1, n)
        return [student.place_of_rank(r, n, gpus, num_rows) for r in range(n)], n, gpus, num_rows

    @points(2)
    def test_gpu(self, student, rng):
        """names a GPU that the node has"""
        found, n, gpus, _ = self._run(student, rng)
        for rank, place in enumerate(found):
            expect.true(isinstance(place, tuple | list) and len(place) == 2,
                        f"expected (gpu, rows), got {place!r}")  # fmt: skip
            expect.equal(place[0], rank % gpus, f"the GPU of rank {rank} ({gpus} on a node)")

    @points(2)
    def test_rows(self, student, rng):
        """takes each row once, in turns"""
        found, n, _, num_rows = self._run(student, rng)
        for rank, place in enumerate(found):
            expected = list(range(rank, num_rows, n))
            expect.equal(place[1], expected, f"the rows of rank {rank} of {n}")


@exercise(
    "mean_gradient",
    kind="build",
    minutes=15,
    difficulty=2,
    see="6. Data parallelism",
    through="run_mean_gradient",
    on_ranks=True,
    hints=(
        "Which quantity of a rank can simply be added to those of others: its mean, or its sum?",
        "Right with equal batches only: a mean of means weighs rows of small batches more. Wrong "
        "at once: ranks compute with different weights.",
        "weight = broadcast rank 0's\ntotal = 2 rows^T (rows weight - targets)\n"
        "sums = all_reduce(cat([total, number of rows]))\nreturn weight, sums[:-1] / sums[-1]",
    ),
)
class TestMeanGradient:
    def _run(self, student, rng, sizes, d=3, same_start=False):
        weights = [_normal(rng, d) for _ in sizes]
        if same_start:
            weights = [weights[0].clone() for _ in sizes]
        rows, targets = [_normal(rng, b, d) + 1 for b in sizes], [_normal(rng, b) for b in sizes]
        got = student.run_mean_gradient(weights, rows, targets)
        x, y = torch.cat(rows), torch.cat(targets)
        return got, weights[0], 2 * x.T @ (x @ weights[0] - y) / len(x)

    def test_equal_batches(self, student, rng):
        """equals one rank with all rows, from the same start"""
        got, _, gradient = self._run(student, rng, (3, 3), same_start=True)
        for rank, ours in enumerate(got["gradients"]):
            expect.close(ours, gradient, f"the gradient on rank {rank}")

    @points(2)
    def test_start(self, student, rng):
        """computes with rank 0's weight everywhere"""
        got, weight, gradient = self._run(student, rng, (2, 2, 2))
        for rank in range(3):
            expect.close(got["weights"][rank], weight, f"the weight on rank {rank}")
            expect.close(got["gradients"][rank], gradient, f"the gradient on rank {rank}")

    @points(2)
    def test_uneven_batches(self, student, rng):
        """weighs each row alike where batches differ"""
        got, _, gradient = self._run(student, rng, (1, 5, 2), same_start=True)
        for rank, ours in enumerate(got["gradients"]):
            expect.close(ours, gradient, f"the gradient on rank {rank}")

    def test_traffic(self, student, rng):
        """sends one weight and one all-reduce"""
        got, *_ = self._run(student, rng, (2,) * 4, d=16)
        most = 8 * (16 + 2 * 3 / 4 * 17)
        for rank, sent in enumerate(got["sent"]):
            expect.true(
                sent <= most * (1 + 1e-9),
                f"rank {rank} of 4 sent {sent:g} bytes; a broadcast of 16 numbers and an "
                f"all-reduce of 17 send {most:g}",
            )


@exercise(
    "assign_buckets",
    kind="build",
    minutes=12,
    difficulty=2,
    see="8. Buckets",
    hints=(
        "Which parameter's gradient is there first? Begin with it.",
        "Off by one: a bucket takes the parameter that makes it full, and is closed then. The "
        "first bucket has a limit of its own.",
        "for i from the last to the first:\n    open a new bucket if the current has reached its "
        "limit\n    append i, add its bytes",
    ),
)
class TestAssignBuckets:
    def _expected(self, sizes, limit, first):
        buckets, held = [[]], 0
        for i in reversed(range(len(sizes))):
            buckets[-1].append(i)
            held += sizes[i]
            if held >= (first if len(buckets) == 1 else limit):
                buckets.append([])
                held = 0
        return buckets if buckets[-1] else buckets[:-1]

    def _grade(self, student, sizes, limit, first):
        got = student.assign_buckets(list(sizes), limit, first)
        what = f"the buckets of sizes {sizes} with limits {first} and {limit}"
        expect.equal(got, self._expected(sizes, limit, first), what)

    @points(2)
    def test_order(self, student, rng):
        """fills buckets in the order of backward"""
        self._grade(student, [4, 4, 4, 4, 4, 4], 8, 8)

    @points(2)
    def test_limits(self, student, rng):
        """closes a bucket that has reached its limit"""
        sizes = [_whole(rng, 1, 9) for _ in range(14)]
        self._grade(student, sizes, 12, 12)
        self._grade(student, [3, 3, 10, 2, 3], 5, 5)

    def test_first(self, student, rng):
        """lets the first bucket leave early"""
        sizes = [_whole(rng, 1, 9) for _ in range(12)]
        self._grade(student, sizes, 20, 4)

    def test_one_large(self, student, rng):
        """a gradient above the limit is a bucket, and a large limit one bucket"""
        self._grade(student, [9], 4, 2)
        self._grade(student, [1, 2, 3], 100, 100)


@exercise(
    "overlapped_backward",
    kind="challenge",
    minutes=20,
    difficulty=3,
    see="7. Hooks and overlap",
    through="run_overlapped_backward",
    on_ranks=True,
    is_measured=True,
    hints=(
        "The network is idle while you compute, and you are idle while the network works. What has "
        "to happen before the first dx is computed?",
        "Right values, but too slow: a wait right after each start, or all starts at the end. Keep "
        "the handles, and wait when there is nothing left to compute.",
        "for i from the last layer to the first:\n    handles.append(all_reduce(grad^T inputs[i], "
        "'mean', async_op=True))\n    grad = grad weights[i]\nwait for all",
    ),
)
class TestOverlappedBackward:
    DIM, ROWS = 32, 1536  # each matrix product takes longer than a layer's all-reduce

    def _run(self, student, rng, num_ranks, num_layers, dim, rows):
        def draw(*shape):
            return _normal(rng, *shape, dtype=torch.float32) / math.sqrt(dim)

        weights = [draw(dim, dim) for _ in range(num_layers)]
        inputs = [[draw(rows, dim) for _ in weights] for _ in range(num_ranks)]
        grads = [draw(rows, dim) for _ in range(num_ranks)]
        got = student.run_overlapped_backward(weights, inputs, grads)
        expected = []
        for rank in range(num_ranks):
            grad, mine = grads[rank].double(), []
            for i in reversed(range(num_layers)):
                mine.insert(0, grad.T @ inputs[rank][i].double())
                grad = grad @ weights[i].double()
            expected.append(mine)
        means = [torch.stack(layer).mean(0).float() for layer in zip(*expected, strict=True)]
        return got, means

    @points(2)
    def test_gradients(self, student, rng):
        """gives every rank the mean gradient of each layer"""
        got, means = self._run(student, rng, 3, 3, 4, 5)
        for rank, ours in enumerate(got["gradients"]):
            expect.close(ours, means, f"the gradients on rank {rank}")

    def test_calls(self, student, rng):
        """makes one all-reduce a layer"""
        got, _ = self._run(student, rng, 2, 4, 4, 5)
        expect.true(
            got["calls"] == [4, 4], f"expected 4 collectives for 4 layers, got {got['calls']}"
        )

    @points(3)
    def test_overlap(self, student, rng):
        """lets gradients travel while backward goes on"""
        layers, link = 4, CLASSROOM.intra
        got, _ = self._run(student, rng, 2, layers, self.DIM, self.ROWS)
        matmul = 2 * self.ROWS * self.DIM**2 / CLASSROOM.flops_per_second
        travel = 2 * (link.latency_seconds + self.DIM**2 * 4 / 2 / link.bytes_per_second)
        compute = (2 * layers - 1) * matmul
        least = compute + travel
        took = max(got["seconds"])
        expect.true(
            took <= least * (1 + 1e-9),
            f"took {took * 1e6:.1f} microseconds: computing takes {compute * 1e6:.1f}, the last "
            f"all-reduce {travel * 1e6:.1f}, and all others can hide behind backward",
        )


@exercise(
    "accumulated_gradient",
    kind="build",
    minutes=8,
    difficulty=1,
    see="9. Accumulation",
    through="run_accumulated_gradient",
    on_ranks=True,
    hints=(
        "A mean of means of equally many numbers is the mean of all. Where does the network have "
        "to come in, and how often?",
        "Too much traffic: an all-reduce for each micro-batch. Wrong values: divide by the number "
        "of micro-batches as well as by that of ranks.",
        "total = sum of the gradients here\nreturn all_reduce(total / m, 'mean')",
    ),
)
class TestAccumulatedGradient:
    def _run(self, student, rng, num_ranks, m, p=6):
        gradients = [_normal(rng, m, p) for _ in range(num_ranks)]
        return student.run_accumulated_gradient(gradients), torch.stack(gradients).mean((0, 1))

    @points(2)
    def test_mean(self, student, rng):
        """equals the mean over all micro-batches of all ranks"""
        for num_ranks, m in ((2, 3), (3, 1), (1, 4)):
            got, mean = self._run(student, rng, num_ranks, m)
            for rank, ours in enumerate(got["gradients"]):
                expect.close(ours, mean, f"the gradient on rank {rank} of {num_ranks}, m = {m}")

    @points(2)
    def test_traffic(self, student, rng):
        """communicates once"""
        got, _ = self._run(student, rng, 2, 5)
        expect.true(
            got["sent"] == [48, 48],
            f"bytes sent by rank: {got['sent']}; one all-reduce of 6 float64 numbers on 2 ranks "
            "sends 48",
        )


@exercise(
    "batch_statistics",
    kind="repair",
    minutes=15,
    difficulty=2,
    see="11. Buffers and batch normalization",
    through="run_batch_statistics",
    on_ranks=True,
    hints=(
        "Two ranks, one row each: what is the variance on each rank, and what is it of both rows?",
        "Right means, wrong variances: a mean of variances forgets how far the ranks' means lie "
        "apart. Wrong means as well: ranks with few rows count as much as those with many. Wrong "
        "far from zero alone: you subtract two large squares.",
        "gather mean, sum of (x - mean)^2 and number of rows of each rank\nmean = sum of n_r "
        "mean_r / n\nvar = sum of (squares_r + n_r (mean_r - mean)^2) / n\nor in two rounds: "
        "the mean of all first, then the squares around it",
    ),
)
class TestBatchStatistics:
    def _run(self, student, rng, sizes, c=3):
        rows = [_normal(rng, b, c) * 2 + _normal(rng, 1, c) * 3 for b in sizes]
        return student.run_batch_statistics(rows), torch.cat(rows)

    def test_mean(self, student, rng):
        """the mean of all rows, from equal batches"""
        got, x = self._run(student, rng, (4, 4))
        for rank, ours in enumerate(got["means"]):
            expect.close(ours, x.mean(0), f"the mean on rank {rank}")

    @points(2)
    def test_variance(self, student, rng):
        """the variance of all rows, from equal batches"""
        for sizes in ((4, 4), (1, 1)):
            got, x = self._run(student, rng, sizes)
            for rank, ours in enumerate(got["vars"]):
                expect.close(ours, x.var(0, unbiased=False), f"the variance on rank {rank}")

    @points(2)
    def test_uneven_batches(self, student, rng):
        """both, where ranks have different numbers of rows"""
        got, x = self._run(student, rng, (1, 6, 3))
        for rank in range(3):
            expect.close(got["means"][rank], x.mean(0), f"the mean on rank {rank}")
            what = f"the variance on rank {rank}"
            expect.close(got["vars"][rank], x.var(0, unbiased=False), what)

    @points(2)
    def test_far_from_zero(self, student, rng):
        """keeps the digits of the variance where the mean is a hundred or a thousand"""
        for mean, deviation in ((100, 0.01), (1000, 0.1)):
            rows = [(mean + deviation * _normal(rng, b, 3)).float() for b in (4, 7)]
            got = student.run_batch_statistics(rows)
            x = torch.cat(rows).double()
            expected = x.mean(0).float(), x.var(0, unbiased=False).float()
            for rank in range(2):
                expect.close(got["means"][rank], expected[0], f"the mean on rank {rank}", rtol=1e-6)
                what = f"the variance on rank {rank}, of rows near {mean}"
                expect.close(got["vars"][rank], expected[1], what, rtol=1e-2, atol=0)

    def test_traffic(self, student, rng):
        """needs three collectives at most, and sends as much for 40 rows as for two"""
        (few, _), (many, _) = (self._run(student, rng, (b, b)) for b in (2, 40))
        expect.true(
            all(1 <= calls <= 3 for calls in few["calls"]),
            f"expected one to three collectives on each rank, got {few['calls']}",
        )
        expect.true(
            few["sent"] == many["sent"],
            f"With 2 rows each ranks send {few['sent']} bytes, with 40 rows {many['sent']}: rows "
            "travel. Numbers for each channel are enough.",
        )


@exercise(
    "train_until_all_are_done",
    kind="challenge",
    minutes=20,
    difficulty=3,
    see="12. Uneven inputs",
    through="run_train_until_all_are_done",
    on_ranks=True,
    hints=(
        "A rank that has no data left must still be in each all-reduce. What does it bring along, "
        "and how does it learn that everybody is done?",
        "A deadlock: somebody left early. Steps too small in the end: you divide by all ranks, "
        "although some brought zeros only. Data lost: you stop with the first that is done.",
        "loop:\n    sums = all_reduce(cat([gradient or zeros, 1.0 or 0.0]))\n    if the last is 0: "
        "return\n    weight = weight - lr * sums[:-1] / sums[-1]",
    ),
)
class TestTrainUntilAllAreDone:
    def _run(self, student, rng, counts, d=3, lr=0.3):
        weight = _normal(rng, d)
        gradients = [[_normal(rng, d) for _ in range(count)] for count in counts]
        got = student.run_train_until_all_are_done(weight, gradients, lr)
        for i in range(max(counts)):
            there = [mine[i] for mine in gradients if i < len(mine)]
            weight = weight - lr * torch.stack(there).mean(0)
        return got, weight

    def _grade(self, student, rng, counts):
        got, weight = self._run(student, rng, counts)
        for rank, ours in enumerate(got["weights"]):
            expect.close(ours, weight, f"the weight on rank {rank}, batches {counts}")
        expect.equal(got["steps"], [max(counts)] * len(counts), f"the steps, batches {counts}")

    def test_even(self, student, rng):
        """as ever, where all have as many batches"""
        self._grade(student, rng, (3, 3))

    @points(3)
    def test_uneven(self, student, rng):
        """loses no batch and divides by those who have one"""
        self._grade(student, rng, (1, 4, 2))
        self._grade(student, rng, (4, 1))

    def test_a_rank_without_data(self, student, rng):
        """takes ranks along that have nothing"""
        self._grade(student, rng, (2, 0))
        self._grade(student, rng, (0, 0))
