"""Grades chapter 06: KV cache. Oracles: torch's attention over the whole text in float64, complex
rotations, brute force; the rows that go through a weight, and the largest tensor allocated."""

import math

import torch
import torch.nn.functional as F

from autograder import exercise, expect, points
from autograder.spies import largest_new_tensor, rows_through


def _normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def _integer(rng, low, high):
    return int(torch.randint(low, high + 1, (), generator=rng))


@exercise(
    "cached_attention",
    kind="build",
    minutes=20,
    difficulty=2,
    see="2. Keys and values, and no queries",
    hints=(
        "Which of q, k and v of an old token does a new token ask for? Keep those, joined, and "
        "nothing else.",
        "Right for one chunk and wrong for two: query i of a chunk stands at place past + i, so "
        "its row of the mask begins further right. Too many rows: old tokens go through the "
        "weights again. Too large a tensor: old queries are asked again.",
        "for x in chunks:\n"
        "    q, k, v = x w_q, x w_k, x w_v\n"
        "    keys, values = join(keys, k), join(values, v)\n"
        "    hide key j from query i where j > past + i\n"
        "    softmax(q keys^T / sqrt(d)) values",
    ),
)
class TestCachedAttention:
    def _grade(self, student, rng, sizes, dim=5, width=4):
        x = _normal(rng, sum(sizes), dim)
        weights = [_normal(rng, dim, width) for _ in range(3)]
        q, k, v = (x @ w for w in weights)
        whole = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        chunks = list(x.split(sizes))
        got = student.cached_attention(chunks, *weights)
        expect.close(got, list(whole.split(sizes)), "the outputs")

    @points(2)
    def test_prompt_and_tokens(self, student, rng):
        """a prompt and single tokens give what the whole text gives"""
        self._grade(student, rng, [5, 1, 1, 1])

    @points(2)
    def test_chunks(self, student, rng):
        """so do chunks of any size"""
        self._grade(student, rng, [2, 4, 1, 3])
        self._grade(student, rng, [1, 3])

    @points(2)
    def test_projects_each_row_once(self, student, rng):
        """puts each row through the weights once: the past is not computed again"""
        x, weights = _normal(rng, 10, 5), [_normal(rng, 5, 4) for _ in range(3)]
        with rows_through(*weights) as spy:
            student.cached_attention(list(x.split([7, 1, 1, 1])), *weights)
        for name, rows in zip(("w_q", "w_k", "w_v"), spy.rows, strict=True):
            expect.true(
                rows < 20,  # some forms of a product count a row twice
                f"{rows} rows went through {name} for a text of 10 tokens: keep what was "
                "computed instead of computing the past again",
            )

    @points(2)
    def test_asks_new_queries_only(self, student, rng):
        """computes no scores of earlier queries"""
        x, weights = _normal(rng, 25, 3), [_normal(rng, 3, 2) for _ in range(3)]
        with largest_new_tensor() as spy:
            student.cached_attention(list(x.split([8, 8, 8, 1])), *weights)
        expect.true(
            spy.bytes <= 12 * 25 * 8,
            f"a tensor of shape {spy.shape} was made where 8 tokens attend to 24: the queries "
            "before them were answered, do not keep them",
        )


@exercise(
    "rotary_scores",
    kind="repair",
    minutes=10,
    difficulty=1,
    see="3. Positions",
    hints=(
        "Which positions do the tokens of the second chunk have in the text?",
        "Right for one chunk alone: the positions begin at 0 in each. Still wrong: keys that were "
        "rotated once must not be rotated again.",
        "positions = arange(past, past + T_i), past = tokens cached\n"
        "rotate q and k there; append k; the cache stays as it is",
    ),
)
class TestRotaryScores:
    def _turn(self, x):
        half = x.shape[1] // 2
        angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        turned = torch.complex(x[:, :half], x[:, half:]) * torch.exp(1j * angles)
        return torch.cat((turned.real, turned.imag), 1)

    def _grade(self, student, rng, sizes, width=6):
        q, k = _normal(rng, sum(sizes), width), _normal(rng, sum(sizes), width)
        scores = self._turn(q) @ self._turn(k).T / math.sqrt(width)
        ends = torch.tensor(sizes).cumsum(0).tolist()
        expected = [s[:, :end] for s, end in zip(scores.split(sizes), ends, strict=True)]
        got = student.rotary_scores(list(q.split(sizes)), list(k.split(sizes)))
        expect.close(got, expected, "the scores")

    def test_one_chunk(self, student, rng):
        """equals rotation by complex numbers for one chunk"""
        self._grade(student, rng, [6])

    @points(3)
    def test_prompt_and_tokens(self, student, rng):
        """goes on with the positions after the prompt"""
        self._grade(student, rng, [5, 1, 1, 1])

    @points(2)
    def test_chunks(self, student, rng):
        """goes on in chunks of any size"""
        self._grade(student, rng, [3, 2, 4])


@exercise(
    "prefill_batch",
    kind="build",
    minutes=15,
    difficulty=2,
    see="5. Prompts of different lengths",
    hints=(
        "With the padding at the left, column and position differ by the row's number of pads.",
        "Wrong where a prompt holds pad_id: find the padding by the lengths, not by the ids. Wrong "
        "positions: a prompt's first token is at 0 wherever it stands.",
        "padding = T - length\n"
        "positions = max(0, column - padding)\n"
        "seen[b, i, j] = j <= i and j >= padding[b] and i >= padding[b]",
    ),
)
class TestPrefillBatch:
    def _grade(self, student, prompts, pad_id):
        got = student.prefill_batch([list(p) for p in prompts], pad_id)
        longest = max(map(len, prompts))
        tokens = torch.full((len(prompts), longest), pad_id)
        positions = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros(len(prompts), longest, longest, dtype=torch.bool)
        for b, prompt in enumerate(prompts):
            for i, token in enumerate(prompt):
                column = longest - len(prompt) + i
                tokens[b, column], positions[b, column] = token, i
                for j in range(i + 1):
                    mask[b, column, longest - len(prompt) + j] = True
        expect.close(got, {"tokens": tokens, "positions": positions, "mask": mask}, "the batch")

    def _prompts(self, rng, lengths):
        return [torch.randint(1, 50, (n,), generator=rng).tolist() for n in lengths]

    def test_equal_lengths(self, student, rng):
        """is right for prompts of one length"""
        self._grade(student, self._prompts(rng, [4, 4]), 0)

    @points(3)
    def test_ragged(self, student, rng):
        """pads at the left, counts real tokens, hides the padding"""
        self._grade(student, self._prompts(rng, [2, 5, 1, 3]), 0)

    @points(2)
    def test_pad_among_the_tokens(self, student, rng):
        """takes a real token for real, even where its id is the padding's"""
        prompts = self._prompts(rng, [5, 3, 4])
        prompts[0][1] = prompts[1][0] = prompts[2][2] = 7
        self._grade(student, prompts, 7)


@exercise(
    "static_step",
    kind="build",
    minutes=15,
    difficulty=2,
    see="4. The static cache",
    hints=(
        "Each row writes at its own length. How many rows of the buffer may its query see then?",
        "Nearly right, too close to zero: the empty rows get weight; a zero key has score 0, and "
        "exp(0) is 1. Wrong where a key is zero: hide by place, not by value.",
        "keys[b, lengths[b]] = k[b]; values likewise\n"
        "scores[b, m] = -inf where m > lengths[b]\n"
        "softmax, then values",
    ),
)
class TestStaticStep:
    def _grade(self, student, rng, lengths, room, is_used=False, has_zero_key=False, width=3):
        batch = len(lengths)
        keys, values = _normal(rng, batch, room, width), _normal(rng, batch, room, width)
        if has_zero_key:
            keys[:, 0] = 0
        q, k, v = (_normal(rng, batch, width) for _ in range(3))
        if not is_used:
            for b, n in enumerate(lengths):
                keys[b, n:], values[b, n:] = 0, 0
        new_keys, new_values, out = keys.clone(), values.clone(), torch.empty_like(q)
        for b, n in enumerate(lengths):
            new_keys[b, n], new_values[b, n] = k[b], v[b]
            weights = (new_keys[b, : n + 1] @ q[b] / math.sqrt(width)).softmax(0)
            out[b] = weights @ new_values[b, : n + 1]
        got = student.static_step(keys, values, torch.tensor(lengths), q, k, v)
        expect.close(got, (out, new_keys, new_values), "output and buffers")

    @points(2)
    def test_fresh_buffers(self, student, rng):
        """gives no weight to rows that were never written"""
        self._grade(student, rng, [3, 3], 8)

    @points(2)
    def test_lengths_differ(self, student, rng):
        """writes and attends at each row's own length"""
        self._grade(student, rng, [4, 0, 2], 6)

    @points(2)
    def test_used_buffers(self, student, rng):
        """does not see what an earlier text left behind"""
        self._grade(student, rng, [2, 5, 3], 7, is_used=True)

    def test_zero_keys(self, student, rng):
        """sees a real key of zeros"""
        self._grade(student, rng, [3, 2], 6, has_zero_key=True)

    def test_last_place(self, student, rng):
        """fills the last place of the buffer"""
        self._grade(student, rng, [4, 3], 5, is_used=True)


@exercise(
    "ring_positions",
    kind="derive",
    minutes=10,
    difficulty=2,
    see="6. The rolling cache",
    hints=(
        "Begin with the slot of the last token, last mod window. Which position lies in the slot "
        "before it, and in the one behind it?",
        "Sorted: the ring is not in order, the newest token lies between old ones. One off: the "
        "last token is at num_tokens - 1.",
        "the newest position p <= num_tokens - 1 with p mod window = slot:\n"
        "p = last - (last - slot) mod window",
    ),
)
class TestRingPositions:
    def _grade(self, student, num_tokens, window):
        ring = {}
        for position in range(num_tokens):
            ring[position % window] = position
        got = student.ring_positions(num_tokens, window)
        what = f"ring_positions({num_tokens}, {window})"
        expect.equal(got, [ring[slot] for slot in sorted(ring)], what)

    def test_not_yet_full(self, student, rng):
        """is right before the ring is full"""
        window = _integer(rng, 4, 9)
        for num_tokens in (0, 1, window - 1, window):
            self._grade(student, num_tokens, window)

    @points(2)
    def test_rolls(self, student, rng):
        """is right after it has rolled"""
        window = _integer(rng, 4, 9)
        for num_tokens in (window + 1, 2 * window - 1, 2 * window, 3 * window + 2):
            self._grade(student, num_tokens, window)

    def test_window_of_one(self, student, rng):
        """is right for a window of one token"""
        self._grade(student, _integer(rng, 5, 50), 1)


def _ceil(a, b):
    return -(-a // b)


def _brute_force(num_blocks, block_size, operations):
    """Everything from the tables alone: free is who stands in no table."""
    tables, tokens, states = {}, {}, []
    for operation, name, *rest in operations:
        held = [block for table in tables.values() for block in table]
        free = [block for block in range(num_blocks) if block not in held]
        done, copy = True, None
        if operation == "allocate":
            need = _ceil(rest[0], block_size)
            done = need <= len(free)
            if done:
                tables[name], tokens[name] = free[:need], rest[0]
        elif operation == "append":
            last, is_full = tables[name][-1], tokens[name] % block_size == 0
            if is_full or held.count(last) > 1:
                done = bool(free)
                if done and is_full:
                    tables[name] = [*tables[name], free[0]]
                elif done:
                    tables[name] = [*tables[name][:-1], free[0]]
                    copy = (last, free[0])
            tokens[name] += done
        elif operation == "fork":
            tables[rest[0]], tokens[rest[0]] = list(tables[name]), tokens[name]
        else:
            del tables[name], tokens[name]
        used = {block for table in tables.values() for block in table}
        state = {"tables": {n: list(t) for n, t in tables.items()}, "copy": copy, "done": done}
        states.append(state | {"num_free": num_blocks - len(used)})
    return states


@exercise(
    "paged_memory",
    kind="challenge",
    minutes=40,
    difficulty=3,
    see="7. Pages",
    hints=(
        "Keep for each block how many tables name it. It is free when the last one lets go.",
        "Too few free: blocks were not given back, or were taken before it was known whether they "
        "suffice. Too many: a shared block was freed by the first who left. All states alike: the "
        "same lists were returned each time, copy them.",
        "append: last block full -> take one\n"
        "        last block shared -> take one, count of the old one - 1, report the copy\n"
        "        else only the length grows\n"
        "free: count - 1 for each block; free at 0\n"
        "check that enough are free before anything changes",
    ),
)
class TestPagedMemory:
    def _grade(self, student, num_blocks, block_size, operations):
        expected = _brute_force(num_blocks, block_size, operations)
        got = student.paged_memory(num_blocks, block_size, list(operations))
        expect.true(
            isinstance(got, list) and len(got) == len(operations),
            f"expected a list of {len(operations)} states, one after each operation",
        )
        for i, (state, wanted) in enumerate(zip(got, expected, strict=True)):
            if state != wanted and isinstance(state, dict) and "num_free" in state:
                lost = wanted["num_free"] - state["num_free"]
                after = f"after operation {i}, {operations[i]}"
                expect.true(
                    lost <= 0 or state.get("tables") != wanted["tables"],
                    f"{after}: {lost} blocks are leaked; nobody holds them and they are not free",
                )
                expect.true(
                    lost >= 0 or state.get("tables") != wanted["tables"],
                    f"{after}: {-lost} blocks are free that are held, or free twice",
                )
            expect.close(state, wanted, f"the state after operation {i}, {operations[i]}")

    def test_grows(self, student, rng):
        """takes a block when the last one is full, not before"""
        size = _integer(rng, 3, 4)
        start = [("allocate", "a", size), ("allocate", "b", 2 * size + 1)]
        appends = [("append", n) for _ in range(size + 1) for n in ("a", "b")]
        self._grade(student, 12, size, start + appends)

    @points(2)
    def test_gives_back(self, student, rng):
        """leaks no block: all are free again when all sequences are gone"""
        operations = []
        for i in range(4):
            name = f"s{i}"
            operations += [("allocate", name, _integer(rng, 4, 6)), ("append", name)]
            operations += [("free", name)]
        operations += [("allocate", "x", 2), ("allocate", "y", 5), ("free", "x")]
        operations += [("append", "y")] * 5 + [("free", "y")]
        self._grade(student, 5, 2, operations)

    def test_full(self, student, rng):
        """changes nothing where too few blocks are free"""
        extra = _integer(rng, 7, 9)
        operations = [("allocate", "a", 6), ("allocate", "b", extra), ("allocate", "c", 6)]
        operations += [("append", "a"), ("append", "c"), ("free", "c"), ("append", "a")]
        self._grade(student, 4, 3, operations)

    @points(2)
    def test_copy_on_write(self, student, rng):
        """shares blocks after a fork, copies one that is written to, and no other"""
        operations = [("allocate", "a", 6), ("fork", "a", "b"), ("fork", "a", "c")]
        operations += [("append", "b"), ("append", "a"), ("append", "c"), ("append", "b")]
        operations += [("fork", "b", "d"), ("append", "d"), ("append", "d")]
        self._grade(student, 12, 4, operations)

    @points(2)
    def test_shared_blocks_survive(self, student, rng):
        """frees a shared block once, when the last of its holders is gone"""
        operations = [("allocate", "a", 7), ("fork", "a", "b"), ("free", "a"), ("append", "b")]
        operations += [("allocate", "c", 4), ("fork", "b", "d"), ("append", "d"), ("free", "b")]
        operations += [("allocate", "e", 3), ("free", "d"), ("free", "c"), ("free", "e")]
        self._grade(student, 9, 4, operations)

    @points(2)
    def test_any_script(self, student, rng):
        """is right after any sequence of operations"""
        operations, alive = [], []
        for i in range(40):
            kind = _integer(rng, 0, 9)
            if kind <= 1 or not alive:
                operations.append(("allocate", f"s{i}", _integer(rng, 1, 7)))
            elif kind <= 6:
                operations.append(("append", alive[_integer(rng, 0, len(alive) - 1)]))
            elif kind <= 7:
                operations.append(("fork", alive[_integer(rng, 0, len(alive) - 1)], f"s{i}"))
            else:
                operations.append(("free", alive[_integer(rng, 0, len(alive) - 1)]))
            alive = list(_brute_force(14, 3, operations)[-1]["tables"])
        self._grade(student, 14, 3, operations)


@exercise(
    "serving_iterations",
    kind="estimate",
    minutes=15,
    difficulty=2,
    see="8. Continuous batching",
    hints=(
        "Think of max_batch places. When is each of them free for the next request?",
        "Too few for continuous: at the end places stay empty, so it is more than tokens over "
        "places; and the order of arrival is kept. Too many for static: the requests of a batch "
        "run side by side.",
        "static: sum over batches of the longest answer\n"
        "continuous: free = [0] * max_batch; each request takes the place that is free first,\n"
        "until free + length; the answer is the largest",
    ),
)
class TestServingIterations:
    def _grade(self, student, lengths, max_batch):
        static = sum(max(lengths[i : i + max_batch]) for i in range(0, len(lengths), max_batch))
        waiting, running, continuous = list(lengths), [], 0
        while waiting or running:
            while waiting and len(running) < max_batch:
                running.append(waiting.pop(0))
            running = [n - 1 for n in running if n > 1]
            continuous += 1
        places, total = max_batch, sum(lengths)
        expected = {
            "static": static,
            "continuous": continuous,
            "static_use": total / (static * places),
            "continuous_use": total / (continuous * places),
        }
        expect.close(student.serving_iterations(list(lengths), max_batch), expected, "the answer")

    def test_by_hand(self, student, rng):
        """is right where it can be seen by eye: answers of 4, 1, 1 and 3 tokens in two places"""
        self._grade(student, [4, 1, 1, 3], 2)

    @points(2)
    def test_trace(self, student, rng):
        """is right for a trace of requests"""
        lengths = torch.randint(1, 12, (11,), generator=rng).tolist() + [30, 2, 5, 1]
        self._grade(student, lengths, 4)
        self._grade(student, [2, *lengths[::-1]], 3)

    def test_few(self, student, rng):
        """is right for fewer requests than places"""
        self._grade(student, [7, _integer(rng, 1, 6)], 4)


@exercise(
    "serving_memory",
    kind="estimate",
    minutes=10,
    difficulty=1,
    see="9. Bytes",
    hints=(
        "What is kept of a token: in how many layers, how many tensors, how many heads?",
        "Twice too little: there are keys and values. Too much: queries are not kept, and the "
        "key/value heads count, not the query heads.",
        "token_bytes = 2 * layers * kv_heads * head_dim * bits / 8\n"
        "reserved = free // (max_len * token_bytes)\n"
        "paged = (free // (block_size * token_bytes)) // ceil(num_tokens / block_size)",
    ),
)
class TestServingMemory:
    def _grade(self, student, layers, heads, kv_heads, width, bits, free, max_len, tokens, block):
        element_bits = layers * kv_heads * width * bits * 2
        per_token = element_bits // 8
        blocks_each = len(range(0, tokens, block))
        expected = {
            "token_bytes": per_token,
            "reserved": free // (per_token * max_len),
            "paged": (free // (per_token * block)) // blocks_each,
        }
        args = (layers, heads, kv_heads, width, bits, free, max_len, tokens, block)
        expect.close(student.serving_memory(*args), expected, "the answer")

    @points(2)
    def test_published(self, student, rng):
        """gives 800 KiB a token for OPT-13B, 128 KiB for Llama 3 8B"""
        self._grade(student, 40, 40, 40, 128, 16, 12 * 10**9, 2048, 100, 16)
        self._grade(student, 32, 32, 8, 128, 16, 60 * 10**9, 8192, 700, 16)

    def test_any(self, student, rng):
        """is right for other shapes, bits and blocks"""
        kv_heads = _integer(rng, 2, 4)
        self._grade(student, _integer(rng, 3, 9), 3 * kv_heads, kv_heads, 16, 8,
                    _integer(rng, 10**7, 10**8), 256, 10 * _integer(rng, 3, 7) + 1, 5)  # fmt: skip


@exercise(
    "generation_flops",
    kind="estimate",
    minutes=15,
    difficulty=2,
    see="10. What decoding costs",
    hints=(
        "Write down which tokens go through the weights in each pass, and how many keys each of "
        "them sees.",
        "Cached too small: the new token goes through the MLP as through everything else. Training "
        "too small: all tokens are there at once, each goes through, and there is nothing to "
        "cache.",
        "whole(n) = n * 2 * weights + n (n + 1) / 2 * 4 * width, times the layers\n"
        "recomputed = sum of whole(prompt_len + i), i = 0 ... num_new - 1\n"
        "cached = whole(prompt_len) + for each later token one row and its keys\n"
        "training = 3 * whole(prompt_len + num_new)",
    ),
)
class TestGenerationFlops:
    def _grade(self, student, prompt, new, layers, attention, mlp, width):
        per_row, per_pair = 2 * (attention + mlp), 4 * width
        passes = [(0, prompt + i) for i in range(new)]
        steps = [(0, prompt)] + [(prompt + i, prompt + i + 1) for i in range(new - 1)]

        def flops(ranges):
            return layers * sum(
                per_row + per_pair * (t + 1) for start, end in ranges for t in range(start, end)
            )

        expected = {
            "recomputed": flops(passes),
            "cached": flops(steps),
            "training": 3 * flops([(0, prompt + new)]),
        }
        got = student.generation_flops(prompt, new, layers, attention, mlp, width)
        expect.close(got, expected, "the FLOPs")

    def test_one_token(self, student, rng):
        """one new token costs the same with and without a cache"""
        self._grade(student, _integer(rng, 3, 9), 1, 2, 11, 23, 6)

    @points(2)
    def test_many(self, student, rng):
        """is right for many tokens and layers"""
        self._grade(student, _integer(rng, 5, 12), _integer(rng, 6, 14), 3, 17, 40, 8)

    def test_smollm2(self, student, rng):
        """is right for SmolLM2-135M's layers"""
        attention, mlp = 576 * 64 * (2 * 9 + 2 * 3), 3 * 576 * 1536
        self._grade(student, 37, _integer(rng, 50, 64), 30, attention, mlp, 576)
