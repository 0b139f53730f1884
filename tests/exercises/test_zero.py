"""Grades chapter 12: ZeRO and FSDP. Oracles: one rank with all rows, closed forms, and the three
ledgers of the simulated machine: values, traffic, memory."""

import math

import torch

from autograder import exercise, expect, points


def _normal(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=dtype)


def _whole(rng, low, high):
    return int(torch.randint(low, high, (), generator=rng))


@exercise(
    "zero_memory",
    kind="derive",
    minutes=8,
    difficulty=1,
    see="2. What each stage keeps",
    hints=(
        "Write down three numbers for stage 0, then ask of each stage which one it divides by N.",
        "Right at stages 0 and 3 but not between: stage 1 shards what the optimizer keeps, stage 2 "
        "gradients as well, stage 3 parameters as well.",
        "parameters 2 P, / N from stage 3 on\ngradients 2 P, / N from stage 2 on\n"
        "states K P, / N from stage 1 on",
    ),
)
class TestZeroMemory:
    def _grade(self, student, p, n, stage, k):
        got = student.zero_memory(p, n, stage, k)
        sizes = zip((2, 2, k), (3, 2, 1), strict=True)
        expected = tuple(p * size / (n if stage >= first else 1) for size, first in sizes)
        expect.true(
            isinstance(got, tuple | list) and len(got) == 3,
            f"expected three numbers (parameters, gradients, states), got {got!r}",
        )
        for name, ours, theirs in zip(
            ("parameters", "gradients", "states"), got, expected, strict=True
        ):
            expect.number(ours, theirs, what=f"bytes of {name} at stage {stage}")

    def test_stage_0(self, student, rng):
        """plain data parallelism keeps everything everywhere"""
        self._grade(student, _whole(rng, 10, 99), _whole(rng, 2, 9), 0, 12)

    @points(2)
    def test_stages(self, student, rng):
        """each stage shards one thing more"""
        p, n = _whole(rng, 10, 99), _whole(rng, 2, 9)
        for stage in (1, 2, 3):
            self._grade(student, p, n, stage, 12)

    def test_other_optimizers(self, student, rng):
        """takes the optimizer's bytes from its argument"""
        for stage in (0, 1, 3):
            self._grade(student, _whole(rng, 10, 99), 4, stage, _whole(rng, 1, 9))


@exercise(
    "elements_per_step",
    kind="estimate",
    minutes=12,
    difficulty=2,
    see="10. What it costs in traffic",
    hints=(
        "Count passes of the ring: one for an all-gather or a reduce-scatter, two for an "
        "all-reduce. Which of them happen once a step, which for each micro-batch?",
        "Right for one micro-batch only: a rank that keeps a part of the gradients cannot "
        "accumulate the whole at home, and a rank without parameters needs them each time.",
        "passes: stages 0 and 1: 2; stage 2: m + 1; stage 3: 3 m\npasses * P * (N - 1) / N",
    ),
)
class TestElementsPerStep:
    def _grade(self, student, p, n, stage, m):
        passes = {0: 2, 1: 2, 2: m + 1, 3: 3 * m}[stage]
        got = student.elements_per_step(p, n, stage, m)
        expect.number(got, passes * p * (n - 1) / n, what=f"elements at stage {stage}, m = {m}")

    @points(2)
    def test_one_micro_batch(self, student, rng):
        """2, 2, 2 and 3 passes without accumulation"""
        p, n = _whole(rng, 100, 999), _whole(rng, 2, 9)
        for stage in range(4):
            self._grade(student, p, n, stage, 1)

    @points(2)
    def test_accumulation(self, student, rng):
        """knows what each micro-batch costs"""
        p, n, m = _whole(rng, 100, 999), _whole(rng, 2, 9), _whole(rng, 2, 7)
        for stage in range(4):
            self._grade(student, p, n, stage, m)

    def test_one_rank(self, student, rng):
        """sends nothing alone"""
        for stage in range(4):
            self._grade(student, 100, 1, stage, 2)


@exercise(
    "zero1_step",
    kind="build",
    minutes=20,
    difficulty=2,
    see="3. Stage 1: update a part",
    through="run_zero1_step",
    on_ranks=True,
    hints=(
        "Which elements of the mean gradient does this rank need? There is an operation that gives "
        "it those and no others.",
        "Right values but too much traffic: an all-reduce gives everyone everything, and all but a "
        "part is thrown away. Right on one part only: the others' new elements must come back.",
        "g = comm.reduce_scatter(gradient, 'mean')\nmomentum.mul_(beta).add_(g)\n"
        "mine = parameter[rank * n : (rank + 1) * n] - lr * momentum\nreturn comm.all_gather(mine)",
    ),
)
class TestZero1Step:
    def _run(self, student, rng, num_ranks, n=3, lr=0.3, beta=0.8):
        size = num_ranks * n
        parameter, momentum = _normal(rng, size), _normal(rng, size)
        gradients = [_normal(rng, size) for _ in range(num_ranks)]
        got = student.run_zero1_step(parameter, gradients, momentum, lr, beta)
        momentum = beta * momentum + torch.stack(gradients).mean(0)
        return got, parameter - lr * momentum, momentum.chunk(num_ranks), size

    @points(2)
    def test_parameters(self, student, rng):
        """gives every rank what one rank would have with all rows"""
        for num_ranks in (2, 3):
            got, parameter, _, _ = self._run(student, rng, num_ranks)
            for rank, ours in enumerate(got["parameters"]):
                expect.close(ours, parameter, f"the parameter on rank {rank} of {num_ranks}")

    def test_momentum(self, student, rng):
        """keeps the momentum of its own part, in place"""
        got, _, momenta, _ = self._run(student, rng, 3)
        for rank, (ours, theirs) in enumerate(zip(got["momenta"], momenta, strict=True)):
            expect.close(ours, theirs, f"the momentum on rank {rank}")

    @points(2)
    def test_traffic(self, student, rng):
        """sends two passes of the ring"""
        for num_ranks in (2, 4):
            got, _, _, size = self._run(student, rng, num_ranks)
            limit = 2 * size * (num_ranks - 1) / num_ranks
            expect.true(
                max(got["sent"]) <= limit,
                f"a rank sent {max(got['sent']):g} elements; {limit:g} are enough: one pass "
                "brings each rank its part of the gradient, one brings back the new parameters",
            )

    def test_one_rank(self, student, rng):
        """works alone"""
        got, parameter, _, _ = self._run(student, rng, 1)
        expect.close(got["parameters"][0], parameter, "the parameter")


@exercise(
    "ShardedLinear",
    kind="build",
    minutes=30,
    difficulty=3,
    see="5. Stage 3: borrow, compute, forget",
    through="run_sharded_linear",
    is_measured=True,
    hints=(
        "What may ctx.save_for_backward keep, if no rank may hold W until backward?",
        "Held bytes above 0: W, or a view of it, is still referenced by ctx. Right values and too "
        "much traffic: one operation reduces and leaves each rank its part.",
        "forward: save x and shard; return x @ comm.all_gather(shard).T\n"
        "backward: W = comm.all_gather(shard); grad_x = grad_y @ W\n"
        "grad_shard = comm.reduce_scatter(grad_y.T @ x, 'mean')",
    ),
)
class TestShardedLinear:
    def _run(self, student, rng, num_ranks, rows=2, d=3, f=2):
        weight = _normal(rng, num_ranks * f, d)
        xs = [_normal(rng, rows, d) for _ in range(num_ranks)]
        grads = [_normal(rng, rows, num_ranks * f) for _ in range(num_ranks)]
        return student.run_sharded_linear(xs, weight, grads), xs, weight, grads

    def test_forward(self, student, rng):
        """computes each rank's rows with the whole weight"""
        got, xs, weight, _ = self._run(student, rng, 2)
        for rank, x in enumerate(xs):
            expect.close(got["outputs"][rank], x @ weight.T, f"the output on rank {rank}")

    @points(2)
    def test_gradients(self, student, rng):
        """gives the input its gradient, and each shard its part of the mean"""
        for num_ranks in (2, 3):
            got, xs, weight, grads = self._run(student, rng, num_ranks)
            mean = torch.stack([g.T @ x for x, g in zip(xs, grads, strict=True)]).mean(0)
            for rank, part in enumerate(mean.chunk(num_ranks)):
                expect.close(got["grad_x"][rank], grads[rank] @ weight, f"dx on rank {rank}")
                expect.close(got["grad_shard"][rank], part, f"the shard's gradient on rank {rank}")

    @points(2)
    def test_memory(self, student, rng):
        """holds no weight between forward and backward"""
        got, _, weight, _ = self._run(student, rng, 2)
        held = max(got["held_bytes"])
        expect.true(
            held == 0,
            f"{held:g} bytes beside x, the shard and the output are held between forward and "
            f"backward; the whole weight has {weight.nbytes}",
        )

    @points(2)
    def test_traffic(self, student, rng):
        """gathers twice, reduces and scatters once"""
        num_ranks = 3
        got, _, weight, _ = self._run(student, rng, num_ranks)
        one_pass = weight.numel() * (num_ranks - 1) / num_ranks
        gathered, reduced = max(got["gathered"]), max(got["reduced"])
        expect.number(gathered, 2 * one_pass, what="elements sent by all-gathers")
        expect.true(
            reduced <= one_pass,
            f"a rank sent {reduced:g} elements of gradient; {one_pass:g} are enough",
        )


@exercise(
    "prefetched_forward",
    kind="challenge",
    minutes=25,
    difficulty=3,
    see="6. Prefetch",
    through="run_prefetched_forward",
    is_measured=True,
    hints=(
        "The network is busy while the layer computes only if its work was started before.",
        "Too slow: look where start and wait stand, relative to the product. Too many weights: a "
        "handle holds its result, a name holds its weight.",
        "handle = start(0)\nfor each layer: W = handle.wait(); handle = start(next); x = x @ W.T; "
        "del W",
    ),
)
class TestPrefetchedForward:
    DIM, ROWS, LAYERS, RANKS = 64, 224, 4, 2

    def _run(self, student, rng, rows=None, layers=None, ranks=None, dim=None):
        ranks, dim = ranks or self.RANKS, dim or self.DIM
        shape = (rows or self.ROWS, dim)
        weights = [
            _normal(rng, dim, dim, dtype=torch.float32) / 8 for _ in range(layers or self.LAYERS)
        ]
        xs = [_normal(rng, *shape, dtype=torch.float32) for _ in range(ranks)]
        return student.run_prefetched_forward(xs, weights), xs, weights

    @points(2)
    def test_values(self, student, rng):
        """computes the chain"""
        got, xs, weights = self._run(student, rng, rows=3, dim=12, ranks=3)
        for rank, x in enumerate(xs):
            for weight in weights:
                x = x.double() @ weight.double().T
            expect.close(got["outputs"][rank], x.float(), f"the output on rank {rank}", rtol=1e-4)

    @points(2)
    def test_time(self, student, rng):
        """hides every gather but the first"""
        got, _, weights = self._run(student, rng)
        gather = 1e-6 + weights[0].nbytes / self.RANKS / 10e9
        product = 2 * self.ROWS * self.DIM**2 / 1e12
        limit = gather + (self.LAYERS - 1) * max(gather, product) + product
        seconds = max(got["seconds"])
        expect.true(
            seconds <= limit * 1.001,
            f"takes {seconds * 1e6:.2f} us on the virtual clock; {limit * 1e6:.2f} us are enough, "
            f"when a gather of {gather * 1e6:.2f} us runs beside a product of "
            f"{product * 1e6:.2f} us",
        )

    @points(2)
    def test_memory(self, student, rng):
        """holds two whole weights at most"""
        got, _, _ = self._run(student, rng, layers=5, rows=3, dim=12)
        held = max(got["weights_held"])
        expect.true(held <= 2, f"{held:g} whole weights were held at once; 2 are enough")

    def test_one_layer(self, student, rng):
        """takes a single layer"""
        got, xs, weights = self._run(student, rng, layers=1, rows=3, dim=12)
        expected = (xs[0].double() @ weights[0].double().T).float()
        expect.close(got["outputs"][0], expected, "the output", rtol=1e-4)


@exercise(
    "clip_sharded",
    kind="repair",
    minutes=10,
    difficulty=2,
    see="7. The norm of what nobody holds",
    through="run_clip_sharded",
    on_ranks=True,
    hints=(
        "Clip the gradient (3, 4) on one rank, and with 3 and 4 on two ranks. Which factors?",
        "Norms as large as the sum of all ranks': square first, reduce, then take the root. "
        "Growing gradients: the factor is at most 1.",
        "squares = sum of squares here; norm = sqrt(all_reduce(squares))\n"
        "factor = min(1, max_norm / norm)",
    ),
)
class TestClipSharded:
    def _run(self, student, rng, share, shapes=((2, 3), (4,)), num_ranks=2):
        parts = [[_normal(rng, *s) * (1 + r) for s in shapes] for r in range(num_ranks)]
        flat = torch.cat([part.flatten() for rank in parts for part in rank])
        norm = flat.norm()
        max_norm = float(norm) * share
        return student.run_clip_sharded(parts, max_norm), parts, norm, max_norm

    @points(2)
    def test_norm(self, student, rng):
        """returns the norm of the whole gradient on every rank"""
        for num_ranks in (2, 3):
            got, _, norm, _ = self._run(student, rng, 0.5, num_ranks=num_ranks)
            for rank, ours in enumerate(got["norms"]):
                expect.close(ours, norm, f"the norm on rank {rank}")

    @points(2)
    def test_clipping(self, student, rng):
        """scales every part by the same factor"""
        got, parts, norm, max_norm = self._run(student, rng, 0.3)
        for rank, (ours, given) in enumerate(zip(got["clipped"], parts, strict=True)):
            expected = [part * (max_norm / norm) for part in given]
            expect.close(ours, expected, f"the clipped parts on rank {rank}")

    def test_small_gradients(self, student, rng):
        """leaves a gradient below the limit alone"""
        got, parts, _, _ = self._run(student, rng, 1.6)
        for rank, (ours, given) in enumerate(zip(got["clipped"], parts, strict=True)):
            expect.close(ours, given, f"the parts on rank {rank}")


@exercise(
    "hybrid_reduce",
    kind="build",
    minutes=15,
    difficulty=2,
    see="8. Hybrid sharding",
    through="run_hybrid_reduce",
    on_ranks=True,
    hints=(
        "Two groups, two operations. Which order sends less between nodes?",
        "Right values but too much traffic between nodes: reduce within the node first; then only "
        "a part is left to send. Twice too large: a mean of means is the mean of all.",
        "part = shards.reduce_scatter(gradient, 'mean')\nreturn replicas.all_reduce(part, 'mean')",
    ),
)
class TestHybridReduce:
    def _run(self, student, rng, nodes, per_node, n=2):
        size = per_node * n
        gradients = [_normal(rng, size) for _ in range(nodes * per_node)]
        got = student.run_hybrid_reduce(gradients, per_node)
        return got, torch.stack(gradients).mean(0), size

    @points(2)
    def test_values(self, student, rng):
        """gives each rank its part of the mean over all ranks"""
        for nodes, per_node in ((2, 3), (3, 2)):
            got, mean, _ = self._run(student, rng, nodes, per_node)
            for rank, ours in enumerate(got["parts"]):
                expected = mean.chunk(per_node)[rank % per_node]
                expect.close(ours, expected, f"the part on rank {rank} of {nodes} x {per_node}")

    @points(2)
    def test_traffic(self, student, rng):
        """sends a part between nodes, and reduces within them once"""
        nodes, per_node = 2, 3
        got, _, size = self._run(student, rng, nodes, per_node)
        between = 2 * (nodes - 1) / nodes * size / per_node
        within = (per_node - 1) / per_node * size
        for name, limit in (("between", between), ("within", within)):
            expect.true(
                max(got[name]) <= limit * (1 + 1e-12),
                f"a rank sent {max(got[name]):g} elements {name} nodes; {limit:g} are enough",
            )

    def test_one_node(self, student, rng):
        """is a reduce-scatter on a single node"""
        got, mean, _ = self._run(student, rng, 1, 2)
        expect.close(got["parts"], list(mean.chunk(2)), "the parts")


@exercise(
    "reshard",
    kind="build",
    minutes=12,
    difficulty=2,
    see="9. Another number of ranks",
    hints=(
        "Between the old parts and the new ones stands one vector. Which elements does it have?",
        "Zeros in the middle, or parts that are too long: the padding of N ranks is not that of M. "
        "Cut it off before you pad again.",
        "flat = cat(parts)[:numel]; length = ceil(numel / M)\npad flat to M * length; split",
    ),
)
class TestReshard:
    def _parts(self, vector, num_ranks):
        length = math.ceil(vector.numel() / num_ranks)
        padded = torch.cat([vector, vector.new_zeros(length * num_ranks - vector.numel())])
        return list(padded.split(length))

    def _grade(self, student, rng, numel, before, after, dtype=torch.float32):
        vector = _normal(rng, numel, dtype=dtype) + 5
        got = student.reshard(self._parts(vector, before), numel, after)
        expect.equal(got, self._parts(vector, after), f"{before} parts of {numel} for {after}")

    @points(2)
    def test_fewer_and_more(self, student, rng):
        """cuts for fewer ranks, and for more"""
        self._grade(student, rng, 12, 4, 3)
        self._grade(student, rng, 12, 3, 6)

    @points(2)
    def test_padding(self, student, rng):
        """drops the old padding, and pads anew"""
        self._grade(student, rng, 5, 4, 3)
        self._grade(student, rng, 7, 2, 3)
        self._grade(student, rng, 9, 4, 5)

    def test_more_ranks_than_elements(self, student, rng):
        """gives ranks without elements zeros"""
        self._grade(student, rng, 3, 2, 5, torch.bfloat16)


@exercise(
    "choose_stage",
    kind="estimate",
    minutes=10,
    difficulty=2,
    see="11. Which stage",
    hints=(
        "Try stages from 0 on. What is the same at each of them?",
        "Too low a stage for large batches: ZeRO shards the model's states. Each rank has its own "
        "rows, and their activations whole.",
        "for stage in 0 .. 3: if sum(states at stage) + activations <= budget: return stage\n"
        "raise ValueError",
    ),
)
class TestChooseStage:
    def _states(self, p, n):
        return [p * (16, 4 + 12 / n, 2 + 14 / n, 16 / n)[stage] for stage in range(4)]

    def _grade(self, student, p, activations, n, budget):
        stages = enumerate(self._states(p, n))
        fitting = [stage for stage, states in stages if states + activations <= budget]
        what = f"the stage for P = {p}, activations {activations}, N = {n}, budget {budget:g}"
        if not fitting:
            expect.raises(ValueError, lambda: student.choose_stage(p, activations, n, budget), what)
            return
        expect.number(student.choose_stage(p, activations, n, budget), fitting[0], what=what)

    @points(2)
    def test_model_states(self, student, rng):
        """takes the lowest stage that fits"""
        p, n = 16 * _whole(rng, 10, 60), 8
        states = self._states(p, n)
        for stage in range(4):
            self._grade(student, p, 0, n, states[stage] * 1.01)

    @points(2)
    def test_activations(self, student, rng):
        """leaves room for activations, whole"""
        p, n = 16 * _whole(rng, 10, 60), 8
        activations = 3 * p
        for states in self._states(p, n):
            self._grade(student, p, activations, n, states + activations * 0.9)
            self._grade(student, p, activations, n, states + activations * 1.01)

    def test_last_byte(self, student, rng):
        """fills the budget to the last byte"""
        p, n = 16 * _whole(rng, 10, 60), 8
        for states in self._states(p, n):
            self._grade(student, p, 64, n, states + 64)

    def test_does_not_fit(self, student, rng):
        """says so when nothing fits"""
        self._grade(student, 1600, 100, 8, 3000)
