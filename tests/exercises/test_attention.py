"""Grades chapter 04: attention."""

import functools
import math

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from autograder import exercise, expect, points
from autograder.spies import largest_new_tensor


def randn(*shape, rng, dtype=torch.float32):
    return torch.randn(*shape, generator=rng, dtype=dtype)


@exercise(
    "scaled_dot_product_attention",
    kind="build",
    minutes=8,
    difficulty=1,
    see="2. Scores, softmax, weighted sum",
    hints=(
        "Three lines: the scores, their softmax, the weighted sum. Which dimension of the scores "
        "counts keys?",
        "A shape error in q @ k: transpose the last two dimensions only (k.mT). Values off by a "
        "little: look at the scale, it is the width of q, not its square and not its length. Only "
        "the dropout check fails: dropout comes after the softmax and scales up what it keeps.",
        "scores = q times k transposed, over sqrt(last dimension of q); weights = softmax of "
        "scores along the last dimension; with is_kept: weights = weights * is_kept / (1 - rate); "
        "return weights times v.",
    ),
)
class TestScaledDotProductAttention:
    @points(2)
    def test_matches_torch(self, student, rng):
        """equals F.scaled_dot_product_attention"""
        q, k, v = (randn(2, 3, n, 16, rng=rng) for n in (5, 7, 7))
        out = student.scaled_dot_product_attention(q, k, v)
        expect.close(out, F.scaled_dot_product_attention(q, k, v))

    @points(1)
    def test_square(self, student, rng):
        """is right where queries, keys and width are equal in number"""
        q, k, v = (randn(6, 6, rng=rng) for _ in range(3))
        expected = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        expect.close(student.scaled_dot_product_attention(q, k, v), expected)

    @points(1)
    def test_dtypes_and_length_one(self, student, rng):
        """keeps float64, float16 and bfloat16, and values of another width"""
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            q, k = (randn(1, 2, n, 8, rng=rng).to(dtype) for n in (1, 4))
            v = randn(1, 2, 4, 3, rng=rng).to(dtype)
            out = student.scaled_dot_product_attention(q, k, v)
            expect.close(out, F.scaled_dot_product_attention(q, k, v), f"the {dtype} output")

    @points(2)
    def test_dropout(self, student, rng):
        """drops probabilities and scales up the rest, where is_kept is given"""
        q, k, v = (randn(2, 3, n, 8, rng=rng, dtype=torch.float64) for n in (5, 7, 7))
        is_kept = torch.rand(2, 3, 5, 7, generator=rng) >= 0.3
        uniform = torch.eye(7, dtype=torch.float64).expand(2, 3, 7, 7)
        weights = F.scaled_dot_product_attention(q, k, uniform)  # values that show the weights
        expected = torch.where(is_kept, weights / 0.7, 0.0) @ v
        out = student.scaled_dot_product_attention(q, k, v, is_kept, 0.3)
        expect.close(out, expected, "the output with dropout")
        out = student.scaled_dot_product_attention(q, k, v, None, 0.3)
        expect.close(out, weights @ v, "the output with a rate, but without is_kept")


@exercise(
    "decoder_mask",
    kind="build",
    minutes=6,
    difficulty=1,
    see="4. Masks",
    hints=(
        "Two conditions on a pair (query, key), each simple as booleans of shape (T, S) and "
        "(B, S). Combine them while they are boolean.",
        "RuntimeError 'cannot be converted to type c10::Half without overflow': float16 ends at "
        "65504, use -inf. Right for T = S and wrong otherwise: query t stands at position "
        "S - T + t, not t.",
        "is_past[t, s] = s <= S - T + t; is_seen = is_real[:, None, None, :] & is_past; start from "
        "zeros of the dtype and fill -inf where not is_seen.",
    ),
)
class TestDecoderMask:
    @staticmethod
    def expected(is_real, num_queries, dtype):
        batch, num_keys = is_real.shape
        out = torch.full((batch, 1, num_queries, num_keys), -math.inf, dtype=dtype)
        for b in range(batch):
            for t in range(num_queries):
                for s in range(num_keys - num_queries + t + 1):
                    if is_real[b, s]:
                        out[b, 0, t, s] = 0
        return out

    @points(2)
    def test_right_padding(self, student, rng):
        """masks the future and padding on the right"""
        is_real = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]
        expected = self.expected(is_real, 6, torch.float32)
        expect.equal(student.decoder_mask(is_real, 6, torch.float32), expected, "the mask")

    @points(2)
    def test_cached_keys(self, student, rng):
        """counts positions from the end when earlier keys are cached"""
        is_real = torch.ones(2, 7, dtype=torch.bool)
        expected = self.expected(is_real, 3, torch.float32)
        expect.equal(student.decoder_mask(is_real, 3, torch.float32), expected, "the mask")
        expected = self.expected(is_real, 1, torch.float32)
        expect.equal(student.decoder_mask(is_real, 1, torch.float32), expected, "one query's mask")

    @points(1)
    def test_left_padding(self, student, rng):
        """masks padding on the left, where a row may be empty"""
        is_real = torch.arange(6) >= torch.tensor([0, 2, 5])[:, None]
        expected = self.expected(is_real, 6, torch.float32)
        expect.equal(student.decoder_mask(is_real, 6, torch.float32), expected, "the mask")

    @points(2)
    def test_half_precision(self, student, rng):
        """works in float16, bfloat16 and float64"""
        is_real = torch.arange(4) < torch.tensor([4, 2])[:, None]
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            expected = self.expected(is_real, 4, dtype)
            expect.equal(student.decoder_mask(is_real, 4, dtype), expected, f"the {dtype} mask")


@exercise(
    "masked_softmax",
    kind="build",
    minutes=8,
    difficulty=2,
    see="4. Masks",
    hints=(
        "exp(-inf) is exactly zero: hide keys before the softmax, and it normalises what is left. "
        "Then ask what softmax makes of a row that is -inf throughout.",
        "NaN in the output: a row had nothing to see, and -inf - (-inf) is NaN. NaN in the "
        "gradient alone: it was replaced afterwards, but softmax's backward multiplies by it. A "
        "row of zeros where keys are seen: an unseen score was large, and came before the mask.",
        "is_empty = no True in the row; fill -inf where neither mask nor is_empty; softmax; fill 0 "
        "where is_empty.",
    ),
)
class TestMaskedSoftmax:
    @points(2)
    def test_seen_keys(self, student, rng):
        """normalises over the seen keys and gives zero to the others"""
        scores = randn(2, 3, 5, 7, rng=rng) + 1
        mask = torch.rand(5, 7, generator=rng) < 0.6
        mask[:, 2] = True
        expected = scores.masked_fill(~mask, -math.inf).softmax(-1)
        expect.close(student.masked_softmax(scores, mask), expected, "the probabilities")
        scores = scores.masked_fill(~mask, 300.0)
        out = student.masked_softmax(scores, mask)
        expect.close(out, expected, "the probabilities where unseen scores are 300")

    @points(2)
    def test_empty_rows(self, student, rng):
        """gives zeros in a row that sees nothing"""
        scores = randn(2, 4, 6, rng=rng)
        mask = torch.ones(2, 4, 6, dtype=torch.bool)
        mask[0, 1] = mask[1, 3] = False
        expected = scores.softmax(-1)
        expected[0, 1] = expected[1, 3] = 0
        expect.close(student.masked_softmax(scores, mask), expected, "the probabilities")

    @points(1)
    def test_gradient(self, student, rng):
        """has a gradient without NaN, zero for scores that are not seen"""
        scores = randn(4, 6, rng=rng, dtype=torch.float64).requires_grad_()
        mask = torch.rand(4, 6, generator=rng) < 0.6
        mask[:, 0] = True
        mask[2] = False
        target = randn(4, 6, rng=rng, dtype=torch.float64)
        (grad,) = torch.autograd.grad(student.masked_softmax(scores, mask), scores, target)
        rows = [0, 1, 3]
        hidden = scores.masked_fill(~mask, -math.inf)[rows]
        expected = torch.zeros_like(scores)
        expected[rows] = torch.autograd.grad(hidden.softmax(-1), scores, target[rows])[0][rows]
        expect.close(grad, expected, "the gradient of the scores")

    @points(2)
    def test_half_precision(self, student, rng):
        """hides keys in float16 and bfloat16, whatever the size of the scores"""
        mask = torch.tensor([[True, False, True, False]]).repeat(3, 1)
        mask[2] = False
        for dtype in (torch.float16, torch.bfloat16):
            for offset in (0, -3e4):
                scores = (randn(3, 4, rng=rng) * 2 + offset).to(dtype)
                expected = scores.float().masked_fill(~mask, -math.inf).softmax(-1)
                expected = expected.nan_to_num(0.0).to(dtype)
                out = student.masked_softmax(scores, mask)
                expect.close(out, expected, f"the {dtype} probabilities of scores near {offset:g}")


def multi_head_oracle(x, weights, num_heads, is_causal):
    seq_len, dim = x.shape[1:]
    future = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
    out, _ = F.multi_head_attention_forward(
        *3 * (x.transpose(0, 1),),
        embed_dim_to_check=dim,
        num_heads=num_heads,
        in_proj_weight=torch.cat([weights[n] for n in ("q_proj", "k_proj", "v_proj")]),
        in_proj_bias=None,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=weights["o_proj"],
        out_proj_bias=None,
        need_weights=False,
        attn_mask=future if is_causal else None,
    )
    return out.transpose(0, 1)


def projections(dim, rng, dtype=torch.float32):
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return {n: 2 * randn(dim, dim, rng=rng, dtype=dtype) / dim**0.5 for n in names}


@exercise(
    "MultiHeadAttention",
    kind="build",
    minutes=12,
    difficulty=2,
    see="6. Many heads, one layer",
    through="run_multi_head_attention",
    hints=(
        "(B, T, dim) -> (B, T, heads, width) -> (B, heads, T, width): a view, then a transpose. On "
        "the way back the same two steps in reverse.",
        "RuntimeError 'view size is not compatible': after a transpose memory is out of order, use "
        "reshape (or contiguous, then view). 'Missing key(s) in state_dict': four nn.Linear with "
        "those names and bias=False. It runs but the values are wrong: a view straight to "
        "(B, heads, T, width) cuts positions, not columns, into heads.",
        "split each projection; scores = q k^T / sqrt(width of a head); mask the upper triangle if "
        "causal; softmax; times v; transpose(1, 2); reshape to (B, T, dim); o_proj.",
    ),
)
class TestMultiHeadAttention:
    @points(3)
    def test_matches_torch(self, student, rng):
        """equals torch's multi-head attention with the same weights"""
        x, weights = randn(2, 5, 24, rng=rng), projections(24, rng)
        out = student.run_multi_head_attention(x, weights, 4)
        expect.close(out, multi_head_oracle(x, weights, 4, False))

    @points(1)
    def test_one_head(self, student, rng):
        """is right with a single head"""
        x, weights = randn(2, 5, 8, rng=rng), projections(8, rng)
        out = student.run_multi_head_attention(x, weights, 1)
        expect.close(out, multi_head_oracle(x, weights, 1, False))

    @points(2)
    def test_causal(self, student, rng):
        """hides the future when causal"""
        x, weights = randn(3, 6, 12, rng=rng), projections(12, rng)
        out = student.run_multi_head_attention(x, weights, 3, True)
        expect.close(out, multi_head_oracle(x, weights, 3, True))

    @points(1)
    def test_square_and_strided(self, student, rng):
        """is right for as many positions as heads, and for input that is not contiguous"""
        x = randn(1, 16, 4, rng=rng, dtype=torch.float64).transpose(1, 2)
        weights = projections(16, rng, torch.float64)
        out = student.run_multi_head_attention(x, weights, 4)
        expect.close(out, multi_head_oracle(x, weights, 4, False))


@exercise(
    "grouped_query_attention",
    kind="build",
    minutes=10,
    difficulty=2,
    see="7. Fewer key and value heads",
    hints=(
        "Do not bring the keys to the queries. G query heads that share a key head ask G times T "
        "questions of the same keys: that is one matrix product.",
        "Right values but too much memory: something copied the keys; expand + reshape and "
        "broadcasting in @ do. Wrong values with the right shape: which query heads are "
        "neighbours, those of one group or those of equal rank in their groups?",
        "reshape q to (B, K, G * T, d); scores against k of (B, K, S, d); softmax; times v; "
        "reshape to (B, H, T, d). Or einsum('bkgtd,bksd->bkgts').",
    ),
)
class TestGroupedQueryAttention:
    @points(2)
    def test_matches_torch(self, student, rng):
        """equals F.scaled_dot_product_attention with enable_gqa"""
        q = randn(2, 6, 5, 8, rng=rng)
        k, v = (randn(2, 3, 7, 8, rng=rng) for _ in range(2))
        expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        expect.close(student.grouped_query_attention(q, k, v), expected)

    @points(1)
    def test_extremes(self, student, rng):
        """covers multi-head (K = H) and multi-query (K = 1) attention"""
        for num_kv_heads in (4, 1):
            q = randn(1, 4, 3, 8, rng=rng, dtype=torch.float64)
            k, v = (randn(1, num_kv_heads, 5, 8, rng=rng, dtype=torch.float64) for _ in range(2))
            expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            out = student.grouped_query_attention(q, k, v)
            expect.close(out, expected, f"the output with {num_kv_heads} key/value heads")

    @points(3)
    def test_no_copy(self, student, rng):
        """allocates nothing as large as the keys when one token is generated"""
        q = randn(2, 8, 1, 64, rng=rng)
        k, v = (randn(2, 2, 512, 64, rng=rng) for _ in range(2))
        with largest_new_tensor() as spy:
            out = student.grouped_query_attention(q, k, v)
        expect.close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
        expect.true(
            spy.bytes < k.nbytes / 2,
            f"A buffer of {spy.bytes:,} bytes, shape {spy.shape}, was allocated; the keys take "
            f"{k.nbytes:,} and need no copy. Group the query heads, leave k and v as they are.",
        )


@exercise(
    "attention_backward",
    kind="derive",
    minutes=15,
    difficulty=3,
    see="9. The backward pass",
    hints=(
        "Go back through the three steps: out = P v, P = softmax(Z), Z = q k^T / sqrt(d) + bias. A "
        "product A B sends grad B^T to A and A^T grad to B.",
        "A shape error in one product: check which factor to transpose. grad_v right, the others "
        "not: softmax mixes a whole row, its derivative is not P (1 - P) element by element. "
        "grad_bias has a batch too many: a tensor used B times collects B gradients.",
        "dV = P^T dO; dP = dO V^T; dZ = P * (dP - rowsum(P * dP)); dQ = dZ K scale; dK = dZ^T Q "
        "scale; dbias = dZ summed over the batch.",
    ),
)
class TestAttentionBackward:
    @staticmethod
    def compare(student, rng, num_queries, num_keys, is_masked=False):
        def make(*shape):
            return randn(*shape, rng=rng, dtype=torch.float64)

        # A batch of 3 and a scale of 1/2: a mean over the batch is not a forgotten scale.
        q, grad_out = make(3, 2, num_queries, 4), make(3, 2, num_queries, 4) + 0.5
        k, v = make(3, 2, num_keys, 4), make(3, 2, num_keys, 4) + 0.5
        bias = make(2, num_queries, num_keys)
        if is_masked:
            future = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(1)
            bias = bias.masked_fill(future, -math.inf)
        inputs = [x.clone().requires_grad_() for x in (q, k, v, bias)]
        out = F.scaled_dot_product_attention(*inputs[:3], attn_mask=inputs[3].expand(3, -1, -1, -1))
        expected = torch.autograd.grad(out, inputs, grad_out)
        actual = student.attention_backward(grad_out, q, k, v, bias)
        expect.true(
            type(actual) is tuple and len(actual) == 4,
            "Return a tuple of four tensors: grad_q, grad_k, grad_v, grad_bias.",
        )
        for name, ours, theirs in zip("qkv", actual, expected, strict=False):
            expect.close(ours, theirs, f"grad_{name}")
        expect.close(actual[3], expected[3], "grad_bias")

    @points(3)
    def test_rectangular(self, student, rng):
        """equals autograd's gradients"""
        self.compare(student, rng, 5, 7)

    @points(1)
    def test_square(self, student, rng):
        """equals them where a wrong transpose would not show as a wrong shape"""
        self.compare(student, rng, 4, 4)

    @points(1)
    def test_masked(self, student, rng):
        """is free of NaN where the bias holds -inf"""
        self.compare(student, rng, 5, 5, is_masked=True)


@exercise(
    "attend_with_cache",
    kind="repair",
    minutes=8,
    difficulty=2,
    see="8. Queries from elsewhere: cross-attention and caches",
    hints=(
        "Two faults. One shows only where K < H, the other only where C > 0. Print the mask for "
        "T = 1 and C = 3: which keys does a new token see?",
        "Still failing the cached checks: tril() keeps the top left; the last query must see all "
        "keys. Still failing the grouped ones: compare x.repeat(2) and x.repeat_interleave(2) on "
        "torch.tensor([0, 1]).",
        "keys = repeat_interleave(k_all, group size, dim 1); the mask is tril(S - T).",
    ),
)
class TestAttendWithCache:
    @staticmethod
    def compare(student, rng, num_kv_heads, num_cached, num_new):
        q = randn(2, 4, num_new, 8, rng=rng, dtype=torch.float64)
        k, v = (randn(2, num_kv_heads, num_new, 8, rng=rng, dtype=torch.float64) for _ in range(2))
        k_cache, v_cache = (
            randn(2, num_kv_heads, num_cached, 8, rng=rng, dtype=torch.float64) for _ in range(2)
        )
        k_all, v_all = torch.cat([k_cache, k], 2), torch.cat([v_cache, v], 2)
        position = torch.arange(num_cached + num_new)
        mask = position <= position[num_cached:, None]
        expected = F.scaled_dot_product_attention(q, k_all, v_all, attn_mask=mask, enable_gqa=True)
        actual = student.attend_with_cache(q, k, v, k_cache, v_cache)
        expect.true(
            type(actual) is tuple and len(actual) == 3, "Return a tuple: (out, k_all, v_all)."
        )
        for name, ours, theirs in zip(
            ("out", "k_all", "v_all"), actual, (expected, k_all, v_all), strict=True
        ):
            case = f"{name}, with C = {num_cached}, T = {num_new}, K = {num_kv_heads} of H = 4"
            expect.close(ours, theirs, case)

    @points(2)
    def test_sharing(self, student, rng):
        """reads the right key/value head where heads are shared"""
        self.compare(student, rng, 2, 0, 5)
        self.compare(student, rng, 1, 0, 4)

    @points(2)
    def test_one_token(self, student, rng):
        """lets a new token see the whole cache"""
        self.compare(student, rng, 4, 6, 1)
        self.compare(student, rng, 4, 0, 3)

    @points(2)
    def test_several_tokens(self, student, rng):
        """does both at once, for several new tokens"""
        self.compare(student, rng, 2, 6, 3)


# Published config.json files.
CONFIGS = {
    "Llama 2 7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama 2 70B": {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "Llama 3 8B": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "OPT-13B": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40},
    "Mistral NeMo": {
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


@functools.cache
def counted_flops(name, seq_len):
    """What torch's FLOP counter sees, on tensors without data: (projections, scores)."""
    config = CONFIGS[name]
    dim, num_heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", dim // num_heads)
    num_kv_heads = config.get("num_key_value_heads", num_heads)
    with torch.device("meta"):
        x, heads = torch.empty(seq_len, dim), torch.empty(num_heads, seq_len, head_dim)
        with FlopCounterMode(display=False) as projections:
            for width in (num_heads, num_kv_heads, num_kv_heads):
                x @ torch.empty(dim, width * head_dim)
            torch.empty(seq_len, num_heads * head_dim) @ torch.empty(num_heads * head_dim, dim)
        with FlopCounterMode(display=False) as scores:
            (heads @ heads.mT) @ heads
    layers = config["num_hidden_layers"]
    return layers * projections.get_total_flops(), layers * scores.get_total_flops()


@exercise(
    "attention_cost",
    kind="estimate",
    minutes=8,
    difficulty=1,
    see="12. What it costs",
    hints=(
        "Count elements first, bytes last. Which of the three answers feel the number of key/value "
        "heads, and which do not?",
        "Off by 2: keys AND values; or a multiplication AND its addition. Off by 8: bits. Wrong "
        "for one model alone: head_dim need not be hidden_size / num_attention_heads.",
        "kv = layers * 2 * K * d * tokens * bits / 8; projections = layers * 2 * tokens * D * d * "
        "(2 H + 2 K); scores = layers * 2 products * 2 * H * d * tokens^2.",
    ),
)
class TestAttentionCost:
    @staticmethod
    def cost(student, name, *args):
        cost = student.attention_cost(dict(CONFIGS[name]), *args)
        keys = ("kv_bytes", "projection_flops", "score_flops")
        expect.true(
            type(cost) is dict and sorted(cost) == sorted(keys),
            f"Return a dict with the keys {', '.join(keys)}.",
        )
        return cost

    @points(2)
    def test_kv_bytes(self, student, rng):
        """gives the published bytes of a cache"""
        for name, kib in (("OPT-13B", 800), ("Llama 2 70B", 320), ("Llama 3 8B", 128)):
            cost = self.cost(student, name, 2048)
            expect.number(cost["kv_bytes"], kib * 1024 * 2048, what=f"kv_bytes of {name}")

    @points(1)
    def test_bits(self, student, rng):
        """counts a cache of 8 or 4 bits an element"""
        for bits in (8, 4):
            cost = self.cost(student, "Llama 2 7B", 100, bits)
            expected = 512 * 1024 * 100 * bits // 16
            expect.number(cost["kv_bytes"], expected, what=f"kv_bytes at {bits} bits")

    @points(1)
    def test_free_head_width(self, student, rng):
        """reads head_dim where a model sets it (Mistral NeMo: 128, and not 5120 / 32)"""
        cost = self.cost(student, "Mistral NeMo", 1)
        expect.number(cost["kv_bytes"], 160 * 1024, what="kv_bytes of Mistral NeMo")

    @points(2)
    def test_projection_flops(self, student, rng):
        """gives the FLOPs of the projections that torch counts"""
        for name in ("Llama 2 7B", "Llama 2 70B", "Mistral NeMo"):
            expected, _ = counted_flops(name, 1000)
            cost = self.cost(student, name, 1000)
            expect.number(cost["projection_flops"], expected, what=f"projection_flops of {name}")

    @points(2)
    def test_score_flops(self, student, rng):
        """gives the FLOPs of both products over pairs that torch counts"""
        for name in ("Llama 2 7B", "Llama 2 70B", "Mistral NeMo"):
            _, expected = counted_flops(name, 1000)
            cost = self.cost(student, name, 1000)
            expect.number(cost["score_flops"], expected, what=f"score_flops of {name}")


@exercise(
    "packed_attention",
    kind="challenge",
    minutes=20,
    difficulty=3,
    see="4. Masks",
    hints=(
        "Solve it first for one chunk, queries start ... stop - 1. Which is the first key that the "
        "query at `start` can see?",
        "Values wrong at chunk borders only: a chunk needs window - 1 keys from before its start. "
        "Right values, too much memory: slice k and v before the product, and build the mask for "
        "the slice only.",
        "for each chunk: first = max(0, start - window + 1); keys first ... stop - 1; mask by "
        "positions and documents[:, start:stop, None] == documents[:, None, first:stop]; softmax; "
        "write into the output.",
    ),
)
class TestPackedAttention:
    @staticmethod
    def expected(q, k, v, documents, window):
        position = torch.arange(q.shape[2])
        distance = position[:, None] - position
        mask = (distance >= 0) & (distance < window)
        mask = mask & (documents[:, :, None] == documents[:, None, :])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])

    @staticmethod
    def make_documents(batch, seq_len, rng):
        return (torch.rand(batch, seq_len, generator=rng) < 0.12).cumsum(1)

    @points(2)
    def test_values(self, student, rng):
        """equals attention with the whole mask"""
        q, k, v = (randn(2, 3, 24, 8, rng=rng) for _ in range(3))
        documents = self.make_documents(2, 24, rng)
        # At least one border in every sequence, at its own place, and names that do not rise.
        documents[0, 14:] += 1
        documents[1, 9:] += 1
        documents = 9 - documents
        out = student.packed_attention(q, k, v, documents, 5, 8)
        expect.close(out, self.expected(q, k, v, documents, 5))

    @points(1)
    def test_uneven(self, student, rng):
        """is right for a last chunk that is shorter, and a window wider than a chunk"""
        q, k, v = (randn(1, 2, 23, 4, rng=rng, dtype=torch.float64) for _ in range(3))
        documents = torch.zeros(1, 23, dtype=torch.long)
        documents[:, 9:] = 1
        out = student.packed_attention(q, k, v, documents, 11, 4)
        expect.close(out, self.expected(q, k, v, documents, 11))

    @points(1)
    def test_own_position(self, student, rng):
        """with a window of 1 each position sees itself alone"""
        q, k, v = (randn(1, 2, 7, 4, rng=rng) for _ in range(3))
        out = student.packed_attention(q, k, v, torch.zeros(1, 7, dtype=torch.long), 1, 3)
        expect.close(out, v)

    @points(3)
    def test_memory(self, student, rng):
        """holds nothing that grows with the length squared, nor with chunk times length"""
        q, k, v = (randn(1, 2, 320, 8, rng=rng) for _ in range(3))
        documents = self.make_documents(1, 320, rng)
        with largest_new_tensor() as spy:
            out = student.packed_attention(q, k, v, documents, 20, 40)
        expect.close(out, self.expected(q, k, v, documents, 20))
        expect.true(
            spy.bytes <= 2 * out.nbytes,
            f"A buffer of {spy.bytes:,} bytes, shape {spy.shape}, was allocated; the output takes "
            f"{out.nbytes:,}, the scores of one chunk with its window {2 * 40 * 60 * 4:,}. Slice "
            "the keys to what the chunk can see before you multiply.",
        )
