"""Grades chapter 15: pipelines, recomputation and 3D parallelism. Oracles: one rank with all
layers, closed forms, and the ledgers of the simulated machine."""

import torch

from autograder import exercise, expect, points
from reference.parallel.ranks import CLASSROOM


def _normal(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=dtype)


def _whole(rng, low, high):
    return int(torch.randint(low, high, (), generator=rng))


@exercise(
    "one_f_one_b_order",
    kind="build",
    minutes=15,
    difficulty=2,
    see="4. 1F1B",
    hints=(
        "The last stage can turn a micro-batch round at once. How many others come in before the "
        "first returns to the stage before it?",
        "Too many alive: the warm-up is the number of stages after this one, without it. After the "
        "warm-up a forward comes before each backward.",
        "warm_up = min(p - 1 - rank, m)\nF 0 ... warm_up - 1\nthen F warm_up + i, B i in turns\n"
        "then the B that are left",
    ),
)
class TestOneFOneBOrder:
    def _expected(self, rank, p, m):
        warm_up = min(p - 1 - rank, m)
        order, back = [("F", i) for i in range(warm_up)], 0
        for i in range(warm_up, m):
            order += [("F", i), ("B", back)]
            back += 1
        return order + [("B", i) for i in range(back, m)]

    def _grade(self, student, rank, p, m):
        got = [tuple(step) for step in student.one_f_one_b_order(rank, p, m)]
        expect.equal(got, self._expected(rank, p, m), f"the order of rank {rank} of {p}, m = {m}")

    def test_complete(self, student, rng):
        """each micro-batch once forward, then once backward"""
        p, m = _whole(rng, 2, 6), _whole(rng, 6, 10)
        got = [tuple(step) for step in student.one_f_one_b_order(1, p, m)]
        wanted = sorted((kind, i) for kind in "FB" for i in range(m))
        expect.equal(sorted(got), wanted, "what is done")
        for i in range(m):
            expect.true(got.index(("F", i)) < got.index(("B", i)), f"B{i} comes before F{i}: {got}")

    @points(2)
    def test_last_stage(self, student, rng):
        """the last stage turns each micro-batch round"""
        p = _whole(rng, 2, 6)
        self._grade(student, p - 1, p, _whole(rng, 3, 9))

    @points(2)
    def test_other_stages(self, student, rng):
        """the others warm up first"""
        for rank in range(3):
            self._grade(student, rank, 4, _whole(rng, 5, 9))

    def test_few_micro_batches(self, student, rng):
        """fewer micro-batches than stages"""
        self._grade(student, 0, 6, 3)
        self._grade(student, 3, 6, 1)


@exercise(
    "bubble_fraction",
    kind="derive",
    minutes=10,
    difficulty=2,
    see="3. The bubble",
    hints=(
        "Draw p = 3, m = 4. How long does the last rank wait at the start, and the first at the "
        "end?",
        "Divided by the wrong time: the fraction asked for is of the time in which a rank "
        "computes, m micro-batches, not of the whole step.",
        "(p - 1) / m for GPipe and 1F1B alike; interleaved has stages of 1/v: divide by v",
    ),
)
class TestBubbleFraction:
    def _grade(self, student, schedule, p, m, v=1):
        got = student.bubble_fraction(schedule, p, m, v)
        expected = (p - 1) / (m * (v if schedule == "interleaved" else 1))
        expect.number(got, expected, what=f"the bubble of {schedule}, p = {p}, m = {m}, v = {v}")

    @points(2)
    def test_gpipe(self, student, rng):
        """GPipe"""
        p = _whole(rng, 2, 9)
        self._grade(student, "GPipe", p, p * _whole(rng, 2, 6))

    @points(2)
    def test_one_f_one_b(self, student, rng):
        """1F1B"""
        p = _whole(rng, 2, 9)
        self._grade(student, "1F1B", p, p * _whole(rng, 2, 6))

    @points(2)
    def test_interleaved(self, student, rng):
        """interleaved stages"""
        p = _whole(rng, 2, 9)
        self._grade(student, "interleaved", p, p * _whole(rng, 2, 6), _whole(rng, 2, 5))

    def test_one_rank(self, student, rng):
        """a pipeline of one rank never waits"""
        self._grade(student, "1F1B", 1, 4)


@exercise(
    "live_micro_batches",
    kind="estimate",
    minutes=8,
    difficulty=1,
    see="4. 1F1B",
    hints=(
        "When does GPipe free the first activations? When does 1F1B?",
        "Right on the first rank only, or on the last: it depends on how many stages come after.",
        "GPipe: m\n1F1B: min(m, p - rank)",
    ),
)
class TestLiveMicroBatches:
    def _grade(self, student, schedule, rank, p, m):
        expected = m if schedule == "GPipe" else min(m, p - rank)
        got = student.live_micro_batches(schedule, rank, p, m)
        expect.number(got, expected, what=f"{schedule} on rank {rank} of {p}, m = {m}")

    def test_gpipe(self, student, rng):
        """GPipe keeps all"""
        self._grade(student, "GPipe", _whole(rng, 0, 4), 4, _whole(rng, 5, 20))

    @points(3)
    def test_one_f_one_b(self, student, rng):
        """1F1B: by the place in the pipeline"""
        p = _whole(rng, 4, 9)
        for rank in (0, 1, p - 1):
            self._grade(student, "1F1B", rank, p, p + _whole(rng, 2, 20))

    def test_few_micro_batches(self, student, rng):
        """no more than there are"""
        self._grade(student, "1F1B", 0, 8, 3)
        self._grade(student, "GPipe", 0, 8, 3)


@exercise(
    "pipelined_gradient",
    kind="build",
    minutes=30,
    difficulty=3,
    see="2. Stages and micro-batches",
    through="run_pipelined_gradient",
    on_ranks=True,
    is_measured=True,
    hints=(
        "What does a stage need for its backward that its forward knew? Keep that, for each "
        "micro-batch.",
        "m times too large: the loss is a mean over all micro-batches. A deadlock: both sides "
        "send, or both receive. NaN: a rank has used inputs or targets that are another's.",
        "for i: x = inputs[i] or received; keep x, y = x W^T; send y on\nfor i: grad = 2 (y - "
        "target) / (elements of a micro-batch * m) or received\n    grad_weight += grad^T x; send "
        "grad W back",
    ),
)
class TestPipelinedGradient:
    def _run(self, student, rng, p, m, rows=2, dim=3, dtype=torch.float64):
        weights = [_normal(rng, dim, dim, dtype=dtype) / dim**0.5 for _ in range(p)]
        inputs = [_normal(rng, rows, dim, dtype=dtype) for _ in range(m)]
        targets = [_normal(rng, rows, dim, dtype=dtype) for _ in range(m)]
        got = student.run_pipelined_gradient(weights, inputs, targets)
        leaves = [w.double().clone().requires_grad_() for w in weights]
        y = torch.cat(inputs).double()
        for leaf in leaves:
            y = y @ leaf.T
        (y - torch.cat(targets).double()).square().mean().backward()
        return got, [leaf.grad for leaf in leaves]

    def test_one_rank(self, student, rng):
        """is plain accumulation on one rank"""
        got, truth = self._run(student, rng, 1, 3)
        expect.close(got["gradients"][0], truth[0], "the gradient")

    @points(3)
    def test_gradients(self, student, rng):
        """gives each stage the gradient of the whole batch's loss"""
        for p, m in ((2, 1), (3, 4)):
            got, truth = self._run(student, rng, p, m)
            for rank in range(p):
                what = f"the gradient on rank {rank} of {p}, m = {m}"
                expect.close(got["gradients"][rank], truth[rank], what)

    @points(2)
    def test_traffic(self, student, rng):
        """sends activations on and gradients back, to neighbours"""
        p, m, size = 3, 4, 2 * 3 * 8
        got, _ = self._run(student, rng, p, m)
        most = [m * size, 2 * m * size, m * size]
        expect.true(
            all(sent <= limit for sent, limit in zip(got["sent"], most, strict=True)),
            f"bytes sent by rank: {got['sent']}; activations and gradients are {most}",
        )

    @points(2)
    def test_ranks_work_at_the_same_time(self, student, rng):
        """lets micro-batches follow each other"""
        p, m, rows, dim = 3, 4, 512, 64
        got, _ = self._run(student, rng, p, m, rows, dim, torch.float32)
        product = 2 * rows * dim * dim / CLASSROOM.flops_per_second
        link = CLASSROOM.intra
        message = link.latency_seconds + rows * dim * 4 / link.bytes_per_second
        # One after the other, without any overlap of micro-batches.
        alone = m * (p * 3 * product - product + 2 * (p - 1) * message)
        expect.true(
            got["seconds"] < 0.85 * alone,
            f"took {got['seconds'] * 1e6:.0f} microseconds; {m} micro-batches one after the other "
            f"take {alone * 1e6:.0f}: a stage should begin the next while others have the last",
        )


@exercise(
    "recomputed_gradient",
    kind="repair",
    minutes=12,
    difficulty=2,
    see="6. Recomputation",
    hints=(
        "The layer runs twice. What is different the second time?",
        "Gradients where y is zero: another mask was drawn. Put the generator back to where the "
        "first forward began, and in the end to where it had ended.",
        "before = generator.get_state()\ny = layer(x, generator), no_grad\nafter = get_state()\n"
        "set_state(before); run again with a graph, backward\nset_state(after)",
    ),
)
class TestRecomputedGradient:
    def _layer(self, x, generator):
        keep = torch.rand(x.shape, generator=generator, dtype=x.dtype) > 0.4
        return torch.tanh(x) * keep / 0.6

    def _run(self, student, rng):
        seed = _whole(rng, 0, 10_000)
        x, grad = _normal(rng, 4, 6), _normal(rng, 4, 6)
        ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
        graphs = []

        def layer(x, generator):
            graphs.append(torch.is_grad_enabled())
            return self._layer(x, generator)

        got = student.recomputed_gradient(layer, x, grad, ours)
        leaf = x.clone().requires_grad_()
        y = self._layer(leaf, theirs)
        y.backward(grad)
        return got, (y.detach(), leaf.grad), (ours, theirs), graphs

    def test_output(self, student, rng):
        """gives the first forward's output"""
        got, truth, _, _ = self._run(student, rng)
        expect.close(got[0], truth[0], "y")

    @points(3)
    def test_gradient(self, student, rng):
        """gives that forward's gradient, with its mask"""
        got, truth, _, _ = self._run(student, rng)
        expect.close(got[1], truth[1], "the gradient of x")

    def test_generator(self, student, rng):
        """leaves the generator where one forward does"""
        _, _, (ours, theirs), _ = self._run(student, rng)
        expect.true(
            torch.equal(ours.get_state(), theirs.get_state()),
            "the generator's state afterwards is not that after one forward",
        )

    def test_forgets(self, student, rng):
        """runs without a graph first, then again with one"""
        *_, graphs = self._run(student, rng)
        expect.true(
            graphs == [False, True],
            f"the layer ran with gradients enabled: {graphs}; expected [False, True]",
        )


@exercise(
    "parallel_groups",
    kind="derive",
    minutes=15,
    difficulty=2,
    see="7. Three dimensions",
    hints=(
        "Lay the ranks out in a box of pp x dp x tp, the last side running fastest. A group is a "
        "line along one side.",
        "Neighbours are a tensor group, not a data group. Stages are world_size / pp apart.",
        "grid = arange(world_size).view(pp, dp, tp)\ntp: rows of the last axis; dp: columns within "
        "a stage; pp: rank, rank + world_size / pp, ...",
    ),
)
class TestParallelGroups:
    def _expected(self, n, tp, pp):
        dp = n // (tp * pp)
        stage = n // pp
        return {
            "tp": [list(range(i, i + tp)) for i in range(0, n, tp)],
            "dp": [[s + t + tp * d for d in range(dp)] for s in range(0, n, stage)
                   for t in range(tp)],
            "pp": [[i + stage * s for s in range(pp)] for i in range(stage)],
        }  # fmt: skip

    def _grade(self, student, n, tp, pp, axes=("tp", "dp", "pp")):
        got, expected = student.parallel_groups(n, tp, pp), self._expected(n, tp, pp)
        expect.true(
            isinstance(got, dict) and set(got) == {"tp", "dp", "pp"},
            f"expected a dict with tp, dp and pp, got {got!r}",
        )
        for axis in axes:
            ours = [[int(rank) for rank in group] for group in got[axis]]
            what = f"the {axis} groups of {n} ranks, tp = {tp}, pp = {pp}"
            expect.equal(ours, expected[axis], what)

    @points(2)
    def test_tensor(self, student, rng):
        """tensor groups are neighbours"""
        self._grade(student, 24, _whole(rng, 2, 4), 2, ("tp",))

    @points(2)
    def test_pipeline(self, student, rng):
        """pipelines are as far apart as possible"""
        self._grade(student, 24, 2, _whole(rng, 3, 5), ("pp",))

    @points(2)
    def test_data(self, student, rng):
        """data groups have the same part of the model"""
        self._grade(student, 16, 2, 4)
        self._grade(student, 24, 2, 3, ("dp",))

    def test_ones(self, student, rng):
        """sizes of one"""
        self._grade(student, 4, 1, 1)
        self._grade(student, 4, 4, 1)
        self._grade(student, 6, 2, 3)


@exercise(
    "best_num_micro",
    kind="estimate",
    minutes=10,
    difficulty=2,
    see="5. How many micro-batches",
    hints=(
        "How many micro-batch times pass until the last one has left the last stage?",
        "Always the largest: then a micro-batch costs nothing beside its share. Always the "
        "smallest: then there is no bubble.",
        "step(m) = (m + p - 1) * (compute / m + overhead); the m with the least",
    ),
)
class TestBestNumMicro:
    CANDIDATES = (1, 2, 4, 8, 16, 32, 64, 128)

    def _grade(self, student, p, compute, overhead, candidates=None):
        candidates = list(candidates or self.CANDIDATES)
        expected = min(candidates, key=lambda m: (m + p - 1) * (compute / m + overhead))
        got = student.best_num_micro(p, compute, overhead, candidates)
        what = f"the number of micro-batches for p = {p}, {compute} s and {overhead} s each"
        expect.equal(got, expected, what)

    @points(2)
    def test_balance(self, student, rng):
        """bubble against overhead"""
        for overhead in (0.1, 0.01, 0.001):
            self._grade(student, 4 * _whole(rng, 1, 4), 1.0, overhead)

    @points(2)
    def test_free_micro_batches(self, student, rng):
        """many, where they cost nothing"""
        self._grade(student, 8, 1.0, 0.0)
        self._grade(student, 8, 1.0, 1e-4)

    def test_one_stage(self, student, rng):
        """one, where there is no bubble"""
        self._grade(student, 1, 1.0, 0.01)

    def test_order(self, student, rng):
        """whatever the order of the candidates"""
        self._grade(student, 8, 1.0, 0.02, (64, 1, 16, 8, 2))


def _model(num_layers=8, dim=4096, seq_len=2048, **more):
    return {"num_layers": num_layers, "dim": dim, "seq_len": seq_len,
            "layer_parameters": 12 * dim * dim, **more}  # fmt: skip


def _plan(**changes):
    whole = {"tp": 1, "pp": 1, "dp": 1, "zero_stage": 0, "num_micro": 1, "recompute": "none"}
    return whole | changes


@exercise(
    "first_rank_bytes",
    kind="estimate",
    minutes=15,
    difficulty=2,
    see="10. Planning",
    hints=(
        "Count the rank's parameters first, then who divides what: tensor ranks everything, ZeRO "
        "one kind of state after the other.",
        "Too large: do the tensor ranks divide activations as well? Too small: 1F1B's first stage "
        "waits for its first backward with p micro-batches in flight, or m where there are fewer.",
        "held = layers / pp * layer_parameters + embedding\n"
        "states = held / tp * (2 / n3 + 2 / n2 + 12 / n1), n = dp from that stage on\n"
        "kept = min(pp, m) * layers / pp * (34 or 2) * s * h / tp\nfull: + 32 s h / tp",
    ),
)
class TestFirstRankBytes:
    def _grade(self, student, rng, **plan):
        model = _model(
            24 * _whole(rng, 1, 4), 256 * _whole(rng, 4, 20), embedding_parameters=128_256 * 1024
        )
        layers = model["num_layers"] // plan.get("pp", 1)
        chosen = _plan(**plan)
        expected = self._states(model, chosen, layers) + self._kept(model, chosen, layers)
        got = student.first_rank_bytes(dict(model), dict(chosen))
        expect.number(got, expected, rel=1e-9, what=f"bytes of {chosen}, {model}")

    def _states(self, model, plan, layers):
        held = (layers * model["layer_parameters"] + model["embedding_parameters"]) / plan["tp"]
        whole = {0: 16, 1: 4, 2: 2, 3: 0}[plan["zero_stage"]]
        return held * (whole + (16 - whole) / plan["dp"])

    def _kept(self, model, plan, layers):
        stream = model["seq_len"] * model["dim"] / plan["tp"]
        units = min(plan["pp"], plan["num_micro"]) * layers
        return stream * (34 * units if plan["recompute"] == "none" else 2 * units + 32)

    def test_one_gpu(self, student, rng):
        """one GPU has everything"""
        self._grade(student, rng)

    @points(2)
    def test_zero(self, student, rng):
        """ZeRO divides one state after the other"""
        for stage in (1, 2, 3):
            self._grade(student, rng, dp=8, zero_stage=stage, num_micro=2)

    @points(2)
    def test_pipeline(self, student, rng):
        """the micro-batches in flight on the first stage"""
        self._grade(student, rng, pp=4, num_micro=16)
        self._grade(student, rng, pp=8, num_micro=3)

    @points(2)
    def test_three_dimensions(self, student, rng):
        """tensor, pipeline and data parallelism together"""
        self._grade(student, rng, tp=8, pp=4, dp=16, zero_stage=1, num_micro=16)
        self._grade(student, rng, tp=2, pp=6, dp=4, zero_stage=3, num_micro=8)

    def test_recomputation(self, student, rng):
        """full recomputation keeps each layer's input, and one layer in whole"""
        self._grade(student, rng, pp=4, num_micro=8, recompute="full")
        self._grade(student, rng, tp=4, num_micro=1, recompute="full")


@exercise(
    "fastest_plan",
    kind="challenge",
    minutes=40,
    difficulty=3,
    see="10. Planning",
    hints=(
        "Write the weight of one layout first: bytes, then seconds. The search around it is three "
        "loops, or two and a division.",
        "A plan that is too fast: does its tensor group leave the node? Is the bubble in, and the "
        "gradients' sum? One that is too slow: you may refuse layouts that fit.",
        "for tp, pp with tp pp | gpus: dp = gpus / (tp pp), check the three divisors\n"
        "skip it where 4 P + 12 P / dp + 34 s h / tp * layers * min(pp, m) > memory\n"
        "micro = 6 P s / flops + layers * 4 * all_reduce(2 s h, tp)\n"
        "step = (m + pp - 1) * micro + all_reduce(2 P, dp)\n"
        "keep the least; ValueError where there is none",
    ),
)
class TestFastestPlan:
    def _cluster(self, rng, num_gpus, memory_bytes, inter=25e9, **changes):
        speed = 0.5 + float(torch.rand((), generator=rng))  # of everything: the choice is the same
        found = {"num_gpus": num_gpus, "ranks_per_node": 8, "memory_bytes": memory_bytes,
                 "flops_per_second": 200e12, "intra": 240e9, "inter": inter} | changes  # fmt: skip
        for name in ("flops_per_second", "intra", "inter"):
            found[name] *= speed
        return found

    def _grade(self, student, model, cluster, num_sequences):
        found = _all_layouts(model, cluster, num_sequences)
        (seconds, layout) = min((s, layout) for layout, (b, s) in found.items()
                                if b <= cluster["memory_bytes"])  # fmt: skip
        got = student.fastest_plan(dict(model), dict(cluster), num_sequences)
        case = f"{model}, {cluster} and {num_sequences} sequences"
        chosen = tuple(got[0])
        if [type(n) for n in chosen] == [int] * 3:
            why = self._why_not(found, chosen, cluster["memory_bytes"], seconds)
            words = f"(tp, pp, dp): expected {layout}, got {chosen}, {why}. This is for {case}."
            expect.true(chosen == layout, words)
        expect.equal(chosen, layout, f"(tp, pp, dp) for {case}")
        expect.number(got[1], seconds, rel=1e-9, what=f"seconds of {layout}")

    def _why_not(self, found, chosen, memory_bytes, seconds):
        if chosen not in found:
            return "which is none to try: see the product and the three divisors"
        num_bytes, its_seconds = found[chosen]
        if num_bytes > memory_bytes:
            return f"which holds {num_bytes:,.0f} bytes and does not fit"
        return f"which fits but takes {its_seconds:.6g} s instead of {seconds:.6g} s"

    def test_small(self, student, rng):
        """a model that fits everywhere"""
        self._grade(student, _model(8, 1024), self._cluster(rng, 8, 80e9), 16)

    @points(2)
    def test_memory(self, student, rng):
        """a model that no GPU holds by itself"""
        small_nodes = self._cluster(rng, 8, 5e9, inter=100e9, ranks_per_node=4)
        self._grade(student, _model(24, 2048), small_nodes, 32)
        self._grade(student, _model(48, 4096), self._cluster(rng, 16, 40e9), 128)
        self._grade(student, _model(48, 8192, 4096), self._cluster(rng, 64, 30e9), 64)
        full = self._cluster(rng, 8, 1_124_073_472)  # the best layout fills it to the last byte
        self._grade(student, _model(8, 1024), full, 16)

    @points(2)
    def test_network(self, student, rng):
        """many nodes, and a slow network between them"""
        small_nodes = self._cluster(rng, 24, 25.5e9, inter=100e9, ranks_per_node=4)
        self._grade(student, _model(12, 12288), small_nodes, 12)  # tp = 8: two nodes
        self._grade(student, _model(32, 8192), self._cluster(rng, 64, 40e9, inter=2e9), 64)
        self._grade(student, _model(12, 12288), self._cluster(rng, 32, 80e9, inter=1e9), 32)

    @points(2)
    def test_few_sequences(self, student, rng):
        """few sequences: data parallelism has no work to divide, pipelines have bubbles"""
        self._grade(student, _model(16, 4096), self._cluster(rng, 8, 60e9, ranks_per_node=4), 1)
        tight = self._cluster(rng, 24, 9.8e9, inter=100e9, ranks_per_node=4)
        self._grade(student, _model(48, 4096), tight, 4)  # m = 4, and pp = 6
        self._grade(student, _model(16, 4096), self._cluster(rng, 32, 60e9), 4)
        self._grade(student, _model(40, 5120, 4096), self._cluster(rng, 16, 24e9), 8)

    def test_divisors(self, student, rng):
        """layers, widths and sequences that do not divide by everything"""
        small_nodes = self._cluster(rng, 24, 2.9e9, inter=100e9, ranks_per_node=6)
        self._grade(student, _model(6, 6144, 4096), small_nodes, 3)  # tp = 12
        self._grade(student, _model(9, 3 * 1024), self._cluster(rng, 24, 20e9), 12)
        self._grade(student, _model(9, 3 * 1024), self._cluster(rng, 8, 80e9), 7)

    def test_nothing_fits(self, student, rng):
        """a ValueError where nothing fits"""
        cluster = self._cluster(rng, 8, 1e9)
        expect.raises(ValueError, lambda: student.fastest_plan(_model(96, 12288), cluster, 8))


def _all_layouts(model, cluster, num_sequences):
    """(bytes, seconds) by (tp, pp, dp)."""
    gpus, node, found = cluster["num_gpus"], cluster["ranks_per_node"], {}
    for tp in (t for t in range(1, gpus + 1) if gpus % t == 0 and model["dim"] % t == 0):
        for pp in (p for p in range(1, gpus // tp + 1) if gpus // tp % p == 0):
            dp = gpus // tp // pp
            if model["num_layers"] % pp or num_sequences % dp:
                continue
            m, layers = num_sequences // dp, model["num_layers"] // pp
            tokens, stream = model["seq_len"], model["seq_len"] * model["dim"]
            own = layers * model["layer_parameters"] / tp
            near = cluster["intra"] if tp <= node else cluster["inter"]
            far = cluster["intra"] if tp * dp <= node else cluster["inter"]
            one = 6 * own * tokens / cluster["flops_per_second"]
            one += 16 * (1 - 1 / tp) * stream * layers / near
            gradients = 4 * (1 - 1 / dp) * own / far
            num_bytes = (4 + 12 / dp) * own + 34 * stream * layers * min(pp, m) / tp
            found[tp, pp, dp] = num_bytes, (m + pp - 1) * one + gradients
    return found
