import random

import pytest
import torch

from reference.kv_cache import Request, generate, serve, serve_static
from tests.reference.kv_cache.test_branching import paged


def trace(ids, num_requests=14, seed=7):
    """Prompts of 3 to 24 tokens, answers of 1 to 24, some with a beginning in common.

    With this seed the best token is never ahead by less than 0.005: no rounding decides.
    """
    generator = random.Random(seed)
    requests = []
    for i in range(num_requests):
        start = generator.choice([0, 0, 50 * i])
        length = generator.randint(3, 24)
        prompt = tuple(ids[start : start + length].tolist())
        requests.append(Request(f"r{i}", prompt, generator.choice([1, 3, 6, 24]), i // 3))
    return requests


@pytest.fixture(scope="module")
def alone(course):
    """Each answer without anybody else, from contiguous memory."""
    model, ids = course
    return {
        r.name: generate(model, [torch.tensor(r.prompt)], r.max_new_tokens)[0].tolist()
        for r in trace(ids)
    }


@pytest.mark.parametrize("num_blocks, is_tight", [(100, False), (14, True)])
def test_serving_matches_each_request_alone(course, alone, num_blocks, is_tight):
    model, ids = course
    cache = paged(model, num_blocks)
    answers, history = serve(model, trace(ids), cache, max_batch=5)
    assert answers == alone
    assert cache.blocks.num_free == num_blocks
    assert any(i.num_preempted for i in history) == is_tight
    prompts = sum(len(r.prompt) for r in trace(ids))
    if not is_tight:
        assert sum(i.prefill_tokens for i in history) < prompts  # shared beginnings


def test_static_batches_match_each_request_alone(course, alone):
    model, ids = course
    answers, history = serve_static(model, trace(ids), batch_size=5, max_len=64)
    assert answers == alone
    assert sum(i.num_running for i in history) == sum(map(len, alone.values()))


def test_invariant_continuous_batching_wastes_fewer_places(course):
    model, ids = course
    requests = [Request(r.name, r.prompt, r.max_new_tokens) for r in trace(ids, 24)]
    _, continuous = serve(model, requests, paged(model, 200), max_batch=6)
    _, static = serve_static(model, requests, batch_size=6, max_len=64)
    assert len(continuous) < len(static)


def test_invariant_stop(course, alone):
    model, ids = course
    stop = next(answer[3] for answer in alone.values() if len(answer) > 6)
    expected = {n: a[: a.index(stop) + 1] if stop in a else a for n, a in alone.items()}
    cut, _ = serve(model, trace(ids), paged(model, 100), max_batch=5, stop=stop)
    static, _ = serve_static(model, trace(ids), batch_size=4, max_len=64, stop=stop)
    assert cut == static == expected
