"""Grades chapter 14: context parallelism. Oracles: one rank with the whole text, autograd, counting
by hand, and the ledgers of the simulated machine: traffic, memory, time."""

import math

import torch
import torch.nn.functional as F

from autograder import exercise, expect, points
from reference.parallel.ranks import CLASSROOM


def _normal(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=dtype)


def _fixed():
    """For checks of bytes and time, which values do not change: the same inputs each time."""
    return torch.Generator().manual_seed(0)


def _whole(rng, low, high):
    return int(torch.randint(low, high, (), generator=rng))


def _held(layout, seq_len, rank, num_ranks):
    """The positions of a rank, by asking each position."""
    part = seq_len // (2 * num_ranks)
    owner = {
        "contiguous": lambda p: p * num_ranks // seq_len,
        "striped": lambda p: p % num_ranks,
        "zigzag": lambda p: min(p // part, 2 * num_ranks - 1 - p // part),
    }[layout]
    return [p for p in range(seq_len) if owner(p) == rank]


@exercise(
    "ulysses_attention",
    kind="build",
    minutes=25,
    difficulty=2,
    see="3. A transpose between ranks",
    through="run_ulysses_attention",
    on_ranks=True,
    hints=(
        "Write the text as a table, ranks down, heads across. What does each rank have before, and "
        "what does it need to attend?",
        "Right on one rank only: parts must lie along dimension 0 before the all-to-all, sorted by "
        "receiver; what comes is sorted by sender. Right for many key/value heads only: a rank "
        "whose query heads use head j must get head j.",
        "k, v: repeat each head N / K times where K < N\nx (t, H, d) -> (N, t, H/N, d) -> "
        "all_to_all -> (T, H/N, d)\nattend, causal\n(T, H/N, d) -> (N, t, H/N, d) -> all_to_all -> "
        "(t, N, H/N, d) -> (t, H, d)",
    ),
)
class TestUlyssesAttention:
    def _grade(self, student, rng, n, heads, kv_heads, part=2, d=3):
        q = _normal(rng, n * part, heads, d)
        k, v = _normal(rng, 2, n * part, kv_heads, d)
        got = student.run_ulysses_attention(q, k, v, n)
        per_head = (x.transpose(0, 1)[None] for x in (q, k, v))
        truth = F.scaled_dot_product_attention(*per_head, is_causal=True, enable_gqa=True)
        truth = truth[0].transpose(0, 1)
        for rank, ours in enumerate(got["outputs"]):
            what = f"the output on rank {rank} of {n}, {heads} heads, {kv_heads} for keys"
            expect.close(ours, truth.chunk(n)[rank].clone(), what)
        return got

    def test_one_rank(self, student, rng):
        """is attention on one rank"""
        self._grade(student, rng, 1, 2, 1, part=4)

    @points(2)
    def test_heads(self, student, rng):
        """divides heads, and puts them back"""
        self._grade(student, rng, 2, 4, 4, part=3)
        self._grade(student, rng, 3, 6, 3)

    @points(2)
    def test_fewer_kv_heads(self, student, rng):
        """key/value heads fewer than ranks"""
        self._grade(student, rng, 4, 8, 2)

    @points(2)
    def test_traffic(self, student, rng):
        """sends each number that others need, once"""
        for n, heads, kv_heads in ((4, 8, 2), (2, 4, 2), (4, 8, 8)):
            got = self._grade(student, rng, n, heads, kv_heads, part=2, d=3)
            most = 2 * 3 * 2 * (heads + max(kv_heads, n)) * (n - 1) / n
            for rank, sent in enumerate(got["sent"]):
                expect.true(
                    sent <= most + 1e-6,
                    f"rank {rank} of {n} sent {sent:g} numbers; q, k, v and the output, with "
                    f"{heads} and {kv_heads} heads, need {most:g}",
                )


@exercise(
    "ring_attention",
    kind="build",
    minutes=30,
    difficulty=3,
    see="4. Keys go round",
    through="run_ring_attention",
    is_measured=True,
    hints=(
        "What must a rank remember of the keys that it has seen, so that they may leave?",
        "Right for equal parts only: an output weighs as much as its keys' exponentials, all "
        "relative to one maximum. Too slow: start the messages before attending, wait after. Too "
        "much memory: drop what you have passed on, its handles too.",
        "out, lse = 0, -inf; here = k and v\nfor each step: isend here, irecv arriving (but for "
        "the last)\n    part, part_lse of here\n    total = logaddexp(lse, part_lse)\n    out = "
        "out exp(lse - total) + part exp(part_lse - total); lse = total\n    wait; here = arriving",
    ),
)
class TestRingAttention:
    def _run(self, student, rng, n, part=3, d=4, scale=1.0, dtype=torch.float64):
        q, k, v = _normal(rng, 3, n * part, d, dtype=dtype)
        # Keys of other ranks have other sizes, so that their parts weigh differently.
        k = k * (1 + torch.arange(n, dtype=dtype).repeat_interleave(part)[:, None]) * scale
        got = student.run_ring_attention(q, k, v, n)
        scores = q.double() @ k.double().T / math.sqrt(d)
        return got, scores.softmax(1) @ v.double(), scores.logsumexp(1), v

    def _grade(self, student, rng, n, scale=1.0):
        got, out, lse, _ = self._run(student, rng, n, scale=scale)
        for rank in range(n):
            where = f"on rank {rank} of {n}"
            expect.close(got["outputs"][rank], out.chunk(n)[rank].clone(), f"out {where}")
            expect.close(got["lses"][rank], lse.chunk(n)[rank].clone(), f"lse {where}")

    def test_one_rank(self, student, rng):
        """is attention on one rank"""
        self._grade(student, rng, 1)

    @points(3)
    def test_values(self, student, rng):
        """joins parts by what their keys weigh"""
        self._grade(student, rng, 2)
        self._grade(student, rng, 3)

    @points(1)
    def test_large_scores(self, student, rng):
        """does not overflow, nor underflow"""
        self._grade(student, rng, 2, scale=500.0)

    @points(2)
    def test_traffic(self, student, rng):
        """passes keys and values on, in messages, N - 1 times"""
        got, _, _, v = self._run(student, _fixed(), 3)
        most = 2 * 2 * v.nbytes / 3
        expect.true(got["collectives"] == [0] * 3, "expected isend and irecv alone")
        for rank, sent in enumerate(got["sent"]):
            expect.true(
                sent <= most,
                f"rank {rank} sent {sent:g} bytes; keys and values, twice, are {most:g}",
            )

    @points(2)
    def test_memory(self, student, rng):
        """holds a few ranks' keys, not all"""
        n, part, d = 6, 2, 32
        got, *_ = self._run(student, _fixed(), n, part, d)
        visitor = 2 * part * d * 8
        for rank, peak in enumerate(got["peak"]):
            expect.true(
                peak <= 6 * visitor,
                f"rank {rank} held {peak / visitor:.1f} times a rank's keys and values, of {n}; "
                "two, and some room to compute, are enough",
            )

    @points(2)
    def test_overlap(self, student, rng):
        """attends while the next keys travel"""
        n, part, d = 3, 320, 32
        got, *_ = self._run(student, _fixed(), n, part, d, dtype=torch.float32)
        attend = 4 * part**2 * d / CLASSROOM.flops_per_second
        link = CLASSROOM.intra
        message = link.latency_seconds + 2 * part * d * 4 / link.bytes_per_second
        took = max(got["seconds"])
        expect.true(
            took <= 1.02 * n * attend,
            f"took {took * 1e6:.1f} microseconds: {n} parts take {n * attend * 1e6:.1f} to attend "
            f"to, and the {n - 1} messages, of {message * 1e6:.1f} each, can hide behind that",
        )


@exercise(
    "zigzag_batch",
    kind="repair",
    minutes=12,
    difficulty=2,
    see="6. Through the whole model",
    hints=(
        "Write down tokens 0 to 8 for two ranks. Which token follows the last one of a part, and "
        "who has it?",
        "Targets: the next in the text is not the next in the rank's tensor where a part ends. "
        "Positions: RoPE measures distances between all ranks' tokens.",
        "positions of parts rank and 2 N - 1 - rank, of 0 ... T - 1\ntokens at them, tokens at "
        "them + 1",
    ),
)
class TestZigzagBatch:
    def _grade(self, student, rng, n, which, part=2):
        seq_len = 2 * n * part
        tokens = torch.randperm(3 * (seq_len + 1), generator=rng).view(3, -1)
        names = ("inputs", "targets", "positions")
        for rank in range(n):
            got = student.zigzag_batch(tokens.clone(), rank, n)
            place = torch.tensor(_held("zigzag", seq_len, rank, n))
            truth = tokens[:, place], tokens[:, place + 1], place
            i = names.index(which)
            expect.true(isinstance(got, tuple) and len(got) == 3, "expected three tensors")
            expect.equal(got[i].tolist(), truth[i].tolist(), f"the {which} of rank {rank} of {n}")

    def test_inputs(self, student, rng):
        """takes an early and a late part"""
        self._grade(student, rng, 2, "inputs")
        self._grade(student, rng, 3, "inputs")

    @points(2)
    def test_targets(self, student, rng):
        """predicts what follows in the text"""
        for n in (1, 2, 3):
            self._grade(student, rng, n, "targets")

    @points(2)
    def test_positions(self, student, rng):
        """turns by the place in the text"""
        for n in (1, 2, 4):
            self._grade(student, rng, n, "positions", part=3)


@exercise(
    "context_mean",
    kind="repair",
    minutes=12,
    difficulty=2,
    see="6. Through the whole model",
    through="run_context_mean",
    on_ranks=True,
    hints=(
        "One rank counts a single token, with a loss of 4, another three, each of 0. What is the "
        "mean?",
        "Right where ranks count equally many: a mean of means weighs tokens of a rank with few "
        "more. Not a number: a rank that counts none divides by zero.",
        "[sum of counted losses, number of counted], all-reduced\nmean = one by the other, the "
        "number at least 1\nweights = counted / number",
    ),
)
class TestContextMean:
    def _grade(self, student, rng, counts, size=4):
        n = len(counts)
        losses = _normal(rng, n * size) ** 2
        counted = torch.zeros(n, size, dtype=torch.bool)
        for rank, count in enumerate(counts):
            counted[rank, torch.randperm(size, generator=rng)[:count]] = True
        counted = counted.flatten()
        got = student.run_context_mean(losses, counted, n)
        leaf = losses.clone().requires_grad_()
        mean = (leaf * counted).sum() / max(1, sum(counts))
        mean.backward()
        for rank in range(n):
            where = f"on rank {rank}, where ranks count {counts} tokens"
            expect.close(got["means"][rank], mean.detach(), f"the mean {where}")
            expect.close(got["weights"][rank], leaf.grad.chunk(n)[rank].clone(), f"weights {where}")

    def test_equal(self, student, rng):
        """ranks with equally many tokens"""
        self._grade(student, rng, [4])
        self._grade(student, rng, [3, 3])

    @points(2)
    def test_unequal(self, student, rng):
        """ranks with different numbers of tokens"""
        self._grade(student, rng, [1, 4, 2])

    @points(1)
    def test_none_on_a_rank(self, student, rng):
        """a rank without any"""
        self._grade(student, rng, [0, 3])

    @points(1)
    def test_none(self, student, rng):
        """no token at all"""
        self._grade(student, rng, [0, 0])


@exercise(
    "usp_place",
    kind="derive",
    minutes=12,
    difficulty=2,
    see="7. Ulysses x Ring",
    hints=(
        "Draw 2 x 2 ranks and 8 positions. Which ranks exchange positions for heads, and what do "
        "they have afterwards?",
        "Rows and columns: neighbours in rank order are one row. Inside attention a rank has the "
        "positions of its row, and 1/num_ulysses of the heads, whatever the ring's size.",
        "row, column = divmod(rank, num_ulysses)\nbefore: part `rank` of num_ring num_ulysses\n"
        "inside: part `row` of num_ring\nqueries: part `column` of num_ulysses; kv: q // (H / K)",
    ),
)
class TestUspPlace:
    def _grade(self, student, rng, r, u, heads, kv_heads):
        seq_len = r * u * _whole(rng, 2, 4)
        for rank in range(r * u):
            row, column = rank // u, rank % u
            queries = [h for h in range(heads) if h * u // heads == column]
            expected = (
                [p for p in range(seq_len) if p * r * u // seq_len == rank],
                [p for p in range(seq_len) if p * r // seq_len == row],
                queries,
                sorted({h * kv_heads // heads for h in queries}),
            )
            got = student.usp_place(rank, r, u, seq_len, heads, kv_heads)
            expect.true(
                isinstance(got, tuple | list) and len(got) == 4,
                f"expected four lists (before, inside, query_heads, kv_heads), got {got!r}",
            )
            names = ("positions before", "positions inside", "query heads", "key/value heads")
            for name, ours, theirs in zip(names, got, expected, strict=True):
                expect.equal(
                    list(ours), theirs,
                    f"the {name} of rank {rank}, {r} x {u}, H = {heads}, K = {kv_heads}",
                )  # fmt: skip

    def test_ring_alone(self, student, rng):
        """a ring alone: all heads, its own positions"""
        self._grade(student, rng, 3, 1, 4, 2)

    def test_ulysses_alone(self, student, rng):
        """Ulysses alone: some heads, all positions"""
        self._grade(student, rng, 1, 4, 8, 4)

    @points(2)
    def test_both(self, student, rng):
        """both, with enough key/value heads"""
        self._grade(student, rng, 2, 2, 8, 4)
        self._grade(student, rng, 3, 2, 4, 2)

    @points(2)
    def test_few_kv_heads(self, student, rng):
        """both, with fewer key/value heads than ranks of a row"""
        self._grade(student, rng, 2, 4, 16, 2)


@exercise(
    "causal_work",
    kind="estimate",
    minutes=10,
    difficulty=1,
    see="5. A fair share",
    hints=(
        "Query p sees p + 1 keys, whoever holds them. Which queries does the rank have?",
        "Equal for all ranks: only zigzag is. Too small: keys of other ranks count as well, and a "
        "query sees itself.",
        "the sum of p + 1 over the rank's positions p",
    ),
)
class TestCausalWork:
    def _grade(self, student, rng, layout):
        for n in (1, 2, 4):
            seq_len = 2 * n * _whole(rng, 2, 6)
            for rank in range(n):
                expected = sum(p + 1 for p in _held(layout, seq_len, rank, n))
                what = f"pairs of rank {rank} of {n}, T = {seq_len}, {layout}"
                expect.number(student.causal_work(layout, seq_len, rank, n), expected, what=what)

    @points(2)
    def test_contiguous(self, student, rng):
        """contiguous: the last rank has most"""
        self._grade(student, rng, "contiguous")

    @points(1)
    def test_zigzag(self, student, rng):
        """zigzag: the same for all"""
        self._grade(student, rng, "zigzag")

    @points(1)
    def test_striped(self, student, rng):
        """striped: nearly the same"""
        self._grade(student, rng, "striped")


@exercise(
    "context_bytes",
    kind="estimate",
    minutes=10,
    difficulty=2,
    see="8. Limits",
    hints=(
        "For each method: which tensors leave the rank, and how much of each stays?",
        "Ulysses sends a part of a part: T / N positions, of which (N - 1)/N leave. A ring sends "
        "the same part N - 1 times. Keys and values are two, and narrower than queries.",
        "p = 2 bytes T/N (N - 1)\nulysses: p (2 dim + 2 kv_dim) / N\nring, gathered: p 2 kv_dim\n"
        "tensor: p 2 dim",
    ),
)
class TestContextBytes:
    def _grade(self, student, rng, method, n=None):
        n = n or 2 ** _whole(rng, 2, 5)
        seq_len, kv_dim = n * _whole(rng, 20, 90), 64 * n
        dim = kv_dim * _whole(rng, 2, 6)
        sent = 2 * seq_len * (n - 1) / n
        expected = {
            "ulysses": sent * (2 * dim + 2 * kv_dim) / n,
            "ring": sent * 2 * kv_dim,
            "gathered": sent * 2 * kv_dim,
            "tensor": sent * 2 * dim,
        }[method]
        got = student.context_bytes(method, seq_len, dim, kv_dim, n)
        expect.number(got, expected, what=f"bytes of {method} on {n} ranks")

    @points(2)
    def test_ulysses(self, student, rng):
        """Ulysses: falls with the number of ranks"""
        self._grade(student, rng, "ulysses")
        self._grade(student, rng, "ulysses", 1)

    @points(2)
    def test_ring(self, student, rng):
        """a ring, and gathered keys: the same, and no fall"""
        self._grade(student, rng, "ring")
        self._grade(student, rng, "gathered")

    def test_tensor(self, student, rng):
        """Megatron, for comparison"""
        self._grade(student, rng, "tensor")


@exercise(
    "held_by_rank",
    kind="estimate",
    minutes=8,
    difficulty=1,
    see="9. Not sequence parallelism",
    hints=(
        "Which methods cut matrices, and which cut the text?",
        "Context parallelism copies parameters and cuts all activations. Sequence parallelism is "
        "an addition to tensor parallelism: it cuts what that leaves whole.",
        "tensor: P / N, inside / N + outside\nand sequence: P / N, (inside + outside) / N\n"
        "context: P, (inside + outside) / N",
    ),
)
class TestHeldByRank:
    def _grade(self, student, rng, method):
        p, i, o, n = _whole(rng, 9, 99), _whole(rng, 9, 99), _whole(rng, 9, 99), _whole(rng, 2, 9)
        expected = {
            "tensor": (p / n, i / n + o),
            "tensor and sequence": (p / n, (i + o) / n),
            "context": (float(p), (i + o) / n),
        }[method]
        got = student.held_by_rank(method, p, i, o, n)
        expect.true(
            isinstance(got, tuple | list) and len(got) == 2,
            f"expected two numbers (parameters, activations), got {got!r}",
        )
        for name, ours, theirs in zip(("parameters", "activations"), got, expected, strict=True):
            expect.number(ours, theirs, what=f"{name} under {method} on {n} ranks")

    def test_tensor(self, student, rng):
        """tensor parallelism"""
        self._grade(student, rng, "tensor")

    def test_sequence(self, student, rng):
        """with sequence parallelism"""
        self._grade(student, rng, "tensor and sequence")

    @points(2)
    def test_context(self, student, rng):
        """context parallelism"""
        self._grade(student, rng, "context")


@exercise(
    "ring_attention_backward",
    kind="challenge",
    minutes=40,
    difficulty=3,
    see="4. Keys go round",
    through="run_ring_attention_backward",
    is_measured=True,
    hints=(
        "The gradient of a key is a sum over all ranks' queries. Where are the key's values when "
        "each summand is found?",
        "dk and dv of another rank: gradients travel with their keys, one step more than keys do, "
        "until they are home. Wrong dq: it stays and is a sum over steps.",
        "here = k, v\nfor each step: pass here on (but for the last)\n    dq += ...; own = dk, dv "
        "of here\n    own += gradients that arrive (but in the first step)\n    pass own on\n    "
        "wait for the next keys\nwait: the last gradients that arrive are yours",
    ),
)
class TestRingAttentionBackward:
    def _run(self, student, rng, n, part=3, d=4):
        q, k, v, grad = _normal(rng, 4, n * part, d)
        got = student.run_ring_attention_backward(q, k, v, grad, n)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        scores = leaves[0] @ leaves[1].T / math.sqrt(d)
        (scores.softmax(1) @ leaves[2]).backward(grad)
        return got, [leaf.grad for leaf in leaves], v

    def _grade(self, student, rng, n, names):
        got, truth, _ = self._run(student, rng, n)
        for name, whole in zip(("dq", "dk", "dv"), truth, strict=True):
            if name in names:
                for rank in range(n):
                    what = f"{name} on rank {rank} of {n}"
                    expect.close(got[name][rank], whole.chunk(n)[rank].clone(), what)

    def test_one_rank(self, student, rng):
        """is attention's backward on one rank"""
        self._grade(student, rng, 1, ("dq", "dk", "dv"))

    @points(2)
    def test_queries(self, student, rng):
        """sums queries' gradients over all keys"""
        self._grade(student, rng, 3, ("dq",))

    @points(3)
    def test_keys(self, student, rng):
        """brings keys' and values' gradients home"""
        self._grade(student, rng, 2, ("dk", "dv"))
        self._grade(student, rng, 3, ("dk", "dv"))

    @points(2)
    def test_traffic(self, student, rng):
        """sends keys N - 1 times, gradients N times, in messages"""
        got, _, v = self._run(student, _fixed(), 3)
        most = 5 * 2 * v.nbytes / 3
        expect.true(got["collectives"] == [0] * 3, "expected isend and irecv alone")
        for rank, sent in enumerate(got["sent"]):
            expect.true(
                sent <= most,
                f"rank {rank} sent {sent:g} bytes; keys and values, five times, are {most:g}",
            )

    @points(2)
    def test_memory(self, student, rng):
        """holds a few ranks' keys and gradients, not all"""
        n, part, d = 6, 2, 32
        got, *_ = self._run(student, _fixed(), n, part, d)
        visitor = 2 * part * d * 8
        for rank, peak in enumerate(got["peak"]):
            expect.true(
                peak <= 11 * visitor,
                f"rank {rank} held {peak / visitor:.1f} times a rank's keys and values, of {n}; "
                "two of keys, three of gradients, and some room to compute, are enough",
            )
