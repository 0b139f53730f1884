"""One request never touches another: random operations on a scheduler and a paged cache.

The oracle is each request's answer without anybody else, from contiguous memory.
"""

import os
import random
from functools import cache

import pytest
import torch
from torch.nn.functional import one_hot

from reference.attention import scaled_dot_product_attention
from reference.kv_cache import (
    BlockManager,
    DynamicCache,
    OutOfBlocks,
    PagedCache,
    Request,
    Scheduler,
    compute_step,
    generate,
    run,
    serve,
)

OPERATIONS = 10_000 if os.environ.get("THOROUGH") else 2_000
VOCABULARY, WIDTH, POISON = 13, 4, 12
WEIGHTS = torch.randn(
    2, VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64
)


def tiny_model(tokens, positions, cache, *, mask=None, num_logits=1):
    """One layer of attention over what the cache gives back; POISON has a value of NaN."""
    angle = positions[..., None] * torch.arange(1.0, WIDTH + 1, dtype=torch.float64) / 7
    k = WEIGHTS[0][tokens] + angle.cos()
    v = (WEIGHTS[1][tokens] + angle.sin()).masked_fill((tokens == POISON)[..., None], torch.nan)
    if k.ndim == 2:
        k, v = k[None], v[None]
    keys, values = cache.update(k[:, None], v[:, None], 0)
    out = scaled_dot_product_attention(3 * k[:, None], keys, values, mask)[:, 0]
    return (out @ WEIGHTS[0].T)[:, -num_logits:]


def choose(rows):
    return rows[:, :POISON].argmax(-1)


@cache
def alone(prompt, num_tokens):
    """Token by token, since the tiny model makes no causal mask of its own."""
    tokens, cache = torch.tensor([prompt]), DynamicCache()
    for t in range(len(prompt)):
        logits = tiny_model(tokens[:, t : t + 1], torch.tensor([[t]]), cache)
    answer = []
    while True:
        answer.append(choose(logits[:, -1]).item())
        if len(answer) == num_tokens:
            return answer
        at = torch.tensor([[len(prompt) + len(answer) - 1]])
        logits = tiny_model(torch.tensor([answer[-1:]]), at, cache)


def paged(num_blocks=10, block_size=3):
    """A cache whose memory is as torch.empty may leave it."""
    cache = PagedCache(
        BlockManager(num_blocks, block_size), num_layers=1, num_kv_heads=1, head_dim=WIDTH,
        dtype=torch.float64,
    )  # fmt: skip
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    return cache


def draw_request(rng, name):
    prompt = [rng.randrange(POISON) for _ in range(rng.randint(1, 8))]
    if rng.random() < 0.2:
        prompt = [1, 2, 3, 4, 5, 6, 7][: rng.randint(4, 7)]  # a prefix that others have as well
    if rng.random() < 0.15:
        prompt[rng.randrange(len(prompt))] = POISON
    return Request(str(name), tuple(prompt), rng.randint(1, 9))


class Crash(Exception):
    pass


def test_invariant_random_operations_leave_no_block_taken_and_no_answer_changed():
    rng = random.Random(0)
    cache = paged()
    scheduler = Scheduler(cache.blocks, max_batch=4)
    requests, counts, has_crashed = (
        {},
        dict.fromkeys(("done", "failed", "aborted", "crashed"), 0),
        [],
    )

    def compute(step):
        if has_crashed:
            cache.values[:, rng.randrange(10)] = torch.nan  # half written
            raise Crash
        tokens = compute_step(tiny_model, cache, step, choose)
        if rng.random() < 0.05:  # a client goes away in the middle of a step
            scheduler.abort(rng.choice(scheduler.running).request.name)
            counts["aborted"] += 1
        return tokens

    for name in range(OPERATIONS):
        under_way = [s.request.name for s in (*scheduler.running, *scheduler.waiting)]
        operation = rng.random()
        if operation < 0.25 and len(under_way) < 9:
            requests[str(name)] = draw_request(rng, name)
            scheduler.submit(requests[str(name)])
        elif operation < 0.30 and under_way:
            scheduler.abort(rng.choice(under_way))
            counts["aborted"] += 1
        elif operation < 0.32 and scheduler.running:
            has_crashed.append(True)
            with pytest.raises(Crash):
                scheduler.step(compute)
            has_crashed.clear()
            counts["crashed"] += 1
            assert cache.blocks.num_free == 10 and not scheduler.waiting
        elif under_way:
            done, iteration = scheduler.step(compute)
            for finished, answer in done.items():
                request = requests[finished]
                assert POISON not in request.prompt
                assert answer == alone(request.prompt, request.max_new_tokens)
            assert all(POISON in requests[failed].prompt for failed in iteration.failed)
            counts["done"] += len(done)
            counts["failed"] += len(iteration.failed)
        cache.blocks.check()
        assert {s.request.name for s in scheduler.running} == set(cache.blocks.tables)
    scheduler.abort_all()
    cache.blocks.check()
    assert cache.blocks.num_free == 10
    assert min(counts.values()) > OPERATIONS // 100, counts


def test_invariant_nan_in_one_request_is_its_own_affair():
    """vllm#641, vllm#50283: all requests of a batch came back as NaN, and later ones as well."""
    requests = [
        Request("good", (1, 2, 3, 4), 6),
        Request("bad", (5, POISON, 6, 7, 8), 6),
        Request("late", (9, 8, 7, 6), 6, arrival=2),  # in the blocks that "bad" gives back
    ]
    cache = paged(6)
    answers, history = serve(tiny_model, requests, cache, max_batch=3, choose=choose)
    assert answers == {r.name: alone(r.prompt, 6) for r in requests if r.name != "bad"}
    assert [i.failed for i in history if i.failed] == [("bad",)]
    assert cache.blocks.num_free == 6


def test_matches_plain_generation():
    """The oracle of this file against `generate` with another model's answers."""
    assert alone((1, 2), 3) == alone((1, 2), 5)[:3]

    def model(tokens, positions, cache, *, mask=None, num_logits=1):
        cache.update(*[torch.zeros(len(tokens), 1, tokens.shape[1], 1)] * 2, 0)
        return one_hot((tokens[:, -1:] + 1) % 9, 9).float()

    assert generate(model, [torch.tensor([3])], 3).tolist() == [[4, 5, 6]]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_invariant_an_error_in_a_step_gives_all_blocks_back(error):
    calls = []

    def fail_later(rows):
        calls.append(len(rows))
        if len(calls) == 3:
            raise error
        return choose(rows)

    cache = paged()
    requests = [Request(str(i), (i, 1, 2), 5, arrival=i) for i in range(4)]
    with pytest.raises(error):
        serve(tiny_model, requests, cache, max_batch=2, choose=fail_later)
    assert cache.blocks.num_free == 10
    answers, _ = serve(tiny_model, requests, cache, max_batch=2, choose=choose)
    assert answers == {r.name: alone(r.prompt, 5) for r in requests}


def test_invariant_abort_gives_blocks_back_and_says_what_there_was():
    blocks = BlockManager(8, 2)
    scheduler = Scheduler(blocks, max_batch=1)
    for name in "ab":
        scheduler.submit(Request(name, (1, 2, 3), 5))
    scheduler.step(lambda step: [7])
    assert scheduler.abort("b") == [] and scheduler.abort("a") == [7]
    assert blocks.num_free == 8
    with pytest.raises(KeyError):
        scheduler.abort("a")


def test_rejects_what_can_never_run_before_anything_has():
    """vllm#39734: too long for the cache and accepted, it was tried again at every step."""
    steps = []

    def compute(step):
        steps.append(step)
        return [1] * (len(step.prefill) + len(step.decode))

    blocks = BlockManager(4, 2)
    requests = [Request("a", (1, 2), 3), Request("b", (1,) * 20, 3, arrival=2)]
    with pytest.raises(ValueError, match="request 'b': expected at most 8 tokens, got 22"):
        run(requests, Scheduler(blocks, max_batch=2), compute)
    assert not steps and blocks.num_free == 4


@pytest.mark.parametrize("held", [8, 5])
def test_rejects_waiting_for_blocks_that_nobody_gives_back(held):
    """vllm#35541, vllm#45388: nothing runs, all wait, and no error ever comes."""
    blocks = BlockManager(4, 2)
    blocks.allocate("another engine", [1] * held)
    with pytest.raises(OutOfBlocks, match="request 'a' waits and nothing runs: .* hold the rest"):
        run([Request("a", (1, 2), 3)], Scheduler(blocks, max_batch=2), lambda step: [1])
    blocks.free("another engine")
    assert blocks.num_free == 4
