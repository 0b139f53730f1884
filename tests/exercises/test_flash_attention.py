"""Grades chapter 07: FlashAttention. Oracles: torch's softmax and attention in float64, closed
forms; and the largest tensor that an answer allocates."""

import math

import torch
import torch.nn.functional as F

from autograder import exercise, expect, points
from autograder.spies import largest_new_tensor


def _normal(rng, *shape, std=1.0, dtype=torch.float64):
    return (torch.randn(*shape, generator=rng, dtype=torch.float64) * std).to(dtype)


def _attention(q, k, v, hidden=None):
    """Output and log-sum-exp with all scores at once."""
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)


@exercise(
    "streaming_logsumexp",
    kind="build",
    minutes=15,
    difficulty=2,
    see="3. The online softmax",
    hints=(
        "You know the maximum so far and the sum of exp(x - maximum). A block arrives with a "
        "larger value. What must happen to the sum?",
        "inf: exp was taken before the maximum was subtracted. nan: -inf minus -inf; subtract 0 "
        "while nothing has been seen. Too large by a power: the factor is exp(old - new), below 1.",
        "m' = max(m, max of block)\n"
        "l = l * exp(m - m') + sum exp(block - m')\n"
        "at the end m + log l; where m' is -inf subtract 0 instead",
    ),
)
class TestStreamingLogsumexp:
    def _grade(self, student, x, widths, what="the result"):
        got = student.streaming_logsumexp(list(x.split(widths, -1)))
        expect.close(got, x.double().logsumexp(-1).float(), what)

    @points(2)
    def test_matches_torch(self, student, rng):
        """equals torch's logsumexp over blocks of different widths"""
        x = _normal(rng, 3, 12, std=3.0, dtype=torch.float32)
        self._grade(student, x, [5, 1, 4, 2])

    def test_large_values(self, student, rng):
        """does not overflow, wherever the maximum arrives"""
        x = _normal(rng, 4, 9, std=2.0, dtype=torch.float32)
        x[0, 0], x[1, 4], x[2, 8] = 9000.0, 9000.0, 9000.0
        self._grade(student, x, [3, 3, 3])

    def test_hidden_values(self, student, rng):
        """takes -inf, also in a first block and everywhere"""
        x = _normal(rng, 3, 6, dtype=torch.float32)
        x[0, :2], x[1, 3:], x[2] = -torch.inf, -torch.inf, -torch.inf
        self._grade(student, x, [2, 2, 2])

    def test_looks_once(self, student, rng):
        """keeps nothing that grows with the number of blocks"""
        blocks = [torch.zeros(64, 2)] * 20
        with largest_new_tensor() as spy:
            got = student.streaming_logsumexp(blocks)
        expect.close(got, torch.full((64,), math.log(40)), "the result")
        expect.true(
            spy.bytes <= 64 * 2 * 4,
            "a tensor was allocated that holds more than one block: nothing may be collected",
        )


@exercise(
    "merge_partials",
    kind="derive",
    minutes=10,
    difficulty=2,
    see="4. Carrying the output along",
    hints=(
        "exp(lse) is the sum that each part was divided by. Undo the division, add, divide again.",
        "inf or nan for large log-sum-exps: exp(lse) overflows; only differences go into exp. nan "
        "for empty parts: -inf minus -inf.",
        "lse = log(exp(lse_a) + exp(lse_b)), computed safely: torch.logaddexp\n"
        "out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)",
    ),
)
class TestMergePartials:
    def _parts(self, rng, sizes, shift=0.0):
        q, k, v = _normal(rng, 5, 4), _normal(rng, sum(sizes), 4), _normal(rng, sum(sizes), 3)
        scores = q @ k.T * 2 + shift
        parts = []
        for s, values in zip(scores.split(sizes, 1), v.split(sizes), strict=True):
            parts += [s.softmax(1) @ values, s.logsumexp(1)]
        return parts, (scores.softmax(1) @ v, scores.logsumexp(1))

    @points(2)
    def test_equals_the_whole(self, student, rng):
        """equals attention to all keys at once"""
        parts, whole = self._parts(rng, [3, 7])
        expect.close(student.merge_partials(*parts), whole, "output and log-sum-exp")

    def test_large_scores(self, student, rng):
        """does not overflow for log-sum-exps of 5000"""
        parts, whole = self._parts(rng, [4, 4], shift=5000.0)
        got = student.merge_partials(*parts)
        expect.close(got, whole, "output and log-sum-exp", rtol=1e-9, atol=1e-9)

    def test_empty_parts(self, student, rng):
        """ignores a part without keys, and joins two of them to zeros and -inf"""
        out, lse = _normal(rng, 2, 3), _normal(rng, 2)
        nothing = torch.zeros(2, 3, dtype=torch.float64), torch.full((2,), -torch.inf).double()
        expect.close(student.merge_partials(out, lse, *nothing), (out, lse), "part and empty part")
        expect.close(student.merge_partials(*nothing, out, lse), (out, lse), "empty part and part")
        expect.equal(student.merge_partials(*nothing, *nothing), nothing, "two empty parts")


@exercise(
    "tiles",
    kind="build",
    minutes=15,
    difficulty=2,
    see="5. Tiles",
    hints=(
        "A tile is seen in part if its last query sees its first key, and in full if its first "
        "query sees its last key.",
        "Too few tiles where blocks differ in size: compare positions, not block numbers. Shifted: "
        "with a cache, query 0 is not at position 0.",
        "offset = num_keys - num_queries\n"
        "keep (i, j) if first key of j <= offset + last query of i\n"
        "needs_mask if last key of j > offset + first query of i",
    ),
)
class TestTiles:
    def _expected(self, t, s, block_q, block_k):
        seen = torch.arange(s) <= torch.arange(t)[:, None] + s - t
        found = []
        for i, rows in enumerate(seen.split(block_q)):
            for j, tile in enumerate(rows.split(block_k, 1)):
                if tile.any():
                    found.append((i, j, not bool(tile.all())))
        return found

    def _grade(self, student, *case):
        got = student.tiles(*case)
        expect.true(
            isinstance(got, list) and all(isinstance(x, tuple) and len(x) == 3 for x in got),
            "expected a list of (i, j, needs_mask)",
        )
        got = [(int(i), int(j), bool(m)) for i, j, m in got]
        wanted = self._expected(*case)
        skipped = [x[:2] for x in wanted if x[:2] not in {y[:2] for y in got}]
        extra = [x[:2] for x in got if x[:2] not in {y[:2] for y in wanted}]
        expect.true(not skipped, f"tiles{case}: these hold pairs that are seen: {skipped[:4]}")
        expect.true(not extra, f"tiles{case}: no pair of these is seen: {extra[:4]}")
        expect.true(got == wanted, f"tiles{case}: expected {wanted[:6]} ..., got {got[:6]} ...")

    @points(2)
    def test_square(self, student, rng):
        """is right for square tiles that divide the lengths"""
        self._grade(student, 8, 8, 2, 2)

    def test_other_blocks(self, student, rng):
        """is right for blocks of two sizes that divide nothing"""
        self._grade(student, 11, 11, 3, 4)
        self._grade(student, 10, 10, 4, 3)

    def test_with_a_cache(self, student, rng):
        """aligns at the bottom right: the queries are the last ones"""
        self._grade(student, 5, 17, 2, 4)
        self._grade(student, 1, 9, 4, 2)

    def test_more_queries_than_keys(self, student, rng):
        """leaves out tiles of queries that see nothing"""
        self._grade(student, 9, 4, 2, 2)


@exercise(
    "flash_attention",
    kind="build",
    minutes=30,
    difficulty=3,
    see="6. FlashAttention",
    hints=(
        "Three things are kept for a block of queries: m, l and an output that is not yet divided. "
        "All three are corrected when m grows.",
        "Right for one key block and wrong for two: something was not rescaled, or divided too "
        "early. Right without the mask alone: the tile on the diagonal is masked element by "
        "element. A buffer too large: scores of all keys were computed before the loop.",
        "for each query block: m = -inf, l = 0, acc = 0\n"
        "  for each key block that is seen:\n"
        "    s = q k^T / sqrt(d), masked\n"
        "    m' = max(m, rowmax s); p = exp(s - m'); c = exp(m - m')\n"
        "    l = l c + rowsum p; acc = acc c + p v; m = m'\n"
        "  out = acc / l; lse = m + log l",
    ),
)
class TestFlashAttention:
    def _grade(self, student, rng, t, s, block_q, block_k, is_causal=False, std=1.0):
        q, k, v = (
            _normal(rng, 1, 2, t, 4, std=std),
            _normal(rng, 1, 2, s, 4),
            _normal(rng, 1, 2, s, 4),
        )
        hidden = torch.ones(t, s).triu(1).bool() if is_causal else None
        out, lse = _attention(q, k, v, hidden)
        got = student.flash_attention(q, k, v, block_q, block_k, is_causal)
        expect.true(
            isinstance(got, (tuple, list)) and len(got) == 2, "expected (output, log-sum-exp)"
        )
        expect.close(got[0], out, "the output", rtol=1e-9, atol=1e-9)
        expect.close(got[1], lse, "the log-sum-exp", rtol=1e-9, atol=1e-9)

    @points(2)
    def test_matches_torch(self, student, rng):
        """equals attention in one piece"""
        self._grade(student, rng, 12, 12, 4, 4, std=3.0)

    @points(2)
    def test_causal(self, student, rng):
        """is right with a causal mask"""
        self._grade(student, rng, 12, 12, 4, 3, is_causal=True)

    def test_ragged_blocks(self, student, rng):
        """takes blocks that divide nothing, and other numbers of keys than queries"""
        self._grade(student, rng, 7, 13, 3, 5)
        self._grade(student, rng, 10, 10, 4, 7, is_causal=True)

    def test_growing_scores(self, student, rng):
        """is right where every key block brings a new maximum, and scores are large"""
        q = _normal(rng, 1, 1, 4, 4).abs() + 1
        k = torch.ones(1, 1, 9, 4, dtype=torch.float64) * torch.arange(9.0).view(-1, 1) * 100
        v = _normal(rng, 1, 1, 9, 4)
        out, lse = _attention(q, k, v)
        got = student.flash_attention(q, k, v, 2, 3, False)
        expect.close(got, (out, lse), "output and log-sum-exp", rtol=1e-9, atol=1e-9)

    @points(2)
    def test_allocates_no_square(self, student, rng):
        """never holds all scores"""
        q, k, v = (_normal(rng, 1, 1, 128, 4, dtype=torch.float32) for _ in range(3))
        with largest_new_tensor() as spy:
            student.flash_attention(q, k, v, 64, 32, True)
        expect.true(
            spy.bytes <= 128 * 32 * 4,
            f"a tensor of {spy.bytes:,} bytes was allocated; 128 x 128 scores have "
            f"{128 * 128 * 4:,}. Compute scores for one tile at a time",
        )


@exercise(
    "flash_backward",
    kind="derive",
    minutes=25,
    difficulty=3,
    see="7. The backward pass",
    hints=(
        "With P at hand the gradients are the usual ones. P = exp(s - lse) gives it back, block by "
        "block. What does the softmax's gradient subtract?",
        "dv right, dq and dk wrong: dS = P * (dP - D) with D the row sum of grad * out, over all "
        "keys. All off by one factor: s has the scale, so ds has it too, once.",
        "D = rowsum(grad * out)\n"
        "for each key block:\n"
        "  p = exp(q k^T scale - lse);  dv = p^T grad\n"
        "  ds = p * (grad v^T - D) * scale\n"
        "  dq += ds k;  dk = ds^T q",
    ),
)
class TestFlashBackward:
    def _case(self, rng, t, s, std=1.0):
        q, k, v = (_normal(rng, 2, 2, n, 4, std=std).requires_grad_() for n in (t, s, s))
        grad = _normal(rng, 2, 2, t, 4)
        out, lse = _attention(q, k, v)
        expected = torch.autograd.grad(out, (q, k, v), grad)
        return [x.detach() for x in (grad, q, k, v, out, lse)], expected

    @points(2)
    def test_matches_autograd(self, student, rng):
        """equals autograd through attention in one piece"""
        inputs, expected = self._case(rng, 6, 8)
        got = student.flash_backward(*inputs, 4)
        expect.true(isinstance(got, (tuple, list)) and len(got) == 3, "expected (dq, dk, dv)")
        for name, a, b in zip(("dv", "dq", "dk"), (got[2], got[0], got[1]),
                              (expected[2], expected[0], expected[1]), strict=True):  # fmt: skip
            expect.close(a, b, name, rtol=1e-9, atol=1e-9)

    @points(2)
    def test_ragged_blocks(self, student, rng):
        """is right for blocks that do not divide the keys, and for one block"""
        for block_k in (3, 100):
            inputs, expected = self._case(rng, 5, 7, std=1.5)
            got = tuple(student.flash_backward(*inputs, block_k))
            expect.close(got, expected, f"gradients, block_k={block_k}", rtol=1e-9, atol=1e-9)

    @points(2)
    def test_allocates_no_square(self, student, rng):
        """never holds all probabilities"""
        x = [_normal(rng, 1, 1, 128, 4, dtype=torch.float32) for _ in range(5)]
        lse = torch.full((1, 1, 128), math.log(128.0))
        with largest_new_tensor() as spy:
            student.flash_backward(*x, lse, 32)
        expect.true(
            spy.bytes <= 128 * 32 * 4,
            f"a tensor of {spy.bytes:,} bytes was allocated; all of P has {128 * 128 * 4:,}. "
            "P is computed again, block by block",
        )


@exercise(
    "split_decode",
    kind="repair",
    minutes=15,
    difficulty=2,
    see="8. One query, many keys",
    hints=(
        "A part whose keys the query hardly looks at counts as much as one that has all of its "
        "attention. What is the weight of a part?",
        "Right where all keys are alike, wrong elsewhere: the parts are averaged. Each was divided "
        "by its own sum; that sum is lost unless you keep it.",
        "lse of each part beside its output\nweights = softmax of lse over parts\n"
        "sum of weight * out",
    ),
)
class TestSplitDecode:
    def _grade(self, student, rng, num_keys, num_splits, shift=0.0):
        q = _normal(rng, 2, 2, 1, 4, std=2.0)
        k, v = _normal(rng, 2, 2, num_keys, 4), _normal(rng, 2, 2, num_keys, 4)
        q[..., 0] += shift
        k[..., 0] += shift
        expected = F.scaled_dot_product_attention(q, k, v)
        got = student.split_decode(q, k, v, num_splits)
        expect.close(got, expected, rtol=1e-8, atol=1e-8)

    @points(2)
    def test_equals_the_whole(self, student, rng):
        """equals attention to all keys"""
        self._grade(student, rng, 12, 3)

    def test_parts_of_different_sizes(self, student, rng):
        """is right where the parts differ in size, and for one part"""
        self._grade(student, rng, 10, 4)
        self._grade(student, rng, 7, 1)

    def test_large_scores(self, student, rng):
        """does not overflow"""
        self._grade(student, rng, 9, 3, shift=60.0)


@exercise(
    "hbm_bytes",
    kind="estimate",
    minutes=10,
    difficulty=1,
    see="9. What moves between the memories",
    hints=(
        "List the matrices that each kernel reads and writes, with their numbers of elements.",
        "Standard too small: S is written by one kernel and read by the next, and so is P. Flash "
        "too small: q and O make a round trip for every block of keys.",
        "standard: 4 N^2 + 4 N d\nflash: 2 N d + ceil(N / block_k) * 3 N d\ntimes element_bytes",
    ),
)
class TestHbmBytes:
    def _expected(self, n, d, block_k, size):
        passes = -(-n // block_k)
        return {
            "standard": size * (4 * n * n + 4 * n * d),
            "flash": size * n * d * (2 + 3 * passes),
        }

    def _grade(self, student, *case):
        got = student.hbm_bytes(*case)
        for name, value in self._expected(*case).items():
            expect.true(name in got, f'"{name}" is missing in what hbm_bytes returns')
            expect.number(got[name], value, what=f"{name}, {case}")

    @points(2)
    def test_gpt2(self, student, rng):
        """is right for the case of the paper: N = 1024, d = 64, float16"""
        self._grade(student, 1024, 64, 384, 2)

    def test_other_sizes(self, student, rng):
        """is right for other lengths, blocks and element sizes"""
        self._grade(student, 4096, 128, 128, 4)
        self._grade(student, 100, 16, 33, 2)


@exercise(
    "attention_flops",
    kind="estimate",
    minutes=5,
    difficulty=1,
    see="10. FLOPs go up",
    hints=(
        "Each product is N x d by d x N or N x N by N x d. How many FLOPs has it?",
        "Half: a multiplication and an addition are two. A backward pass that is cheaper for "
        "flash: it computes one product more, not fewer.",
        "one product = 2 N^2 d\nforward 2, backward 4, flash backward 5 of them",
    ),
)
class TestAttentionFlops:
    @points(2)
    def test_counts(self, student, rng):
        """counts the products of forward and backward"""
        for n, d in ((1024, 64), (100, 16)):
            got = student.attention_flops(n, d)
            expected = {
                "forward": 4 * n * n * d,
                "backward_standard": 8 * n * n * d,
                "backward_flash": 10 * n * n * d,
            }
            for name, value in expected.items():
                expect.true(name in got, f'"{name}" is missing in what attention_flops returns')
                expect.number(got[name], value, what=f"{name}, N={n}, d={d}")
