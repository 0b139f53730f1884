import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.kv_cache import BlockManager, Request, Scheduler, run


def count_up(step):
    """A model whose next token is the number of tokens before it."""
    return [len(s.tokens) for s in [s for s, _ in step.prefill] + step.decode]


def expected_answer(request):
    return [len(request.prompt) + i for i in range(request.max_new_tokens)]


requests_of = st.lists(
    st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(0, 20)), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=80)
@given(requests_of, st.integers(7, 20), st.integers(1, 6), st.integers(0, 3), st.booleans())
def test_invariant_every_request_is_answered_and_no_block_is_lost(
    shapes, num_blocks, max_batch, reserve, is_alike
):
    requests = [
        Request(str(i), tuple(range(p)) if is_alike else (i,) * p, o, arrival)
        for i, (p, o, arrival) in enumerate(shapes)
    ]
    blocks = BlockManager(num_blocks, 4)
    scheduler = Scheduler(blocks, max_batch=max_batch, reserve=reserve)

    def compute(step):
        blocks.check()
        running = [s for s, _ in step.prefill] + step.decode
        assert 1 <= len(running) <= max_batch and len(scheduler.running) == len(running)
        for sequence in running:  # room for all tokens that have keys after this step
            assert blocks.lengths[sequence.request.name] == len(sequence.tokens)
        return count_up(step)

    answers, history = run(requests, scheduler, compute)
    assert answers == {r.name: expected_answer(r) for r in requests}
    assert blocks.num_free == num_blocks
    blocks.check()
    produced = sum(r.max_new_tokens for r in requests)
    assert sum(i.num_running for i in history) == produced
    assert all(i.held_tokens <= i.used_slots * max_batch for i in history)


def test_invariant_preemption_recomputes_and_keeps_the_order():
    """Two that fit at first and not later: the younger one waits, comes back and goes on."""
    blocks = BlockManager(4, 4)
    seen = []

    def compute(step):
        seen.append(([s.request.name for s, _ in step.prefill], len(step.preempted)))
        return count_up(step)

    requests = [Request("old", (1,) * 6, 8), Request("young", (2,) * 6, 8)]
    answers, history = run(requests, Scheduler(blocks, max_batch=2), compute)
    assert answers == {r.name: expected_answer(r) for r in requests}
    assert seen[0] == (["old", "young"], 0)
    preempted = next(i for i, (_, count) in enumerate(seen) if count)
    assert [names for names, _ in seen[preempted + 1 :] if names] == [["young"]]
    assert history[0].prefill_tokens == 12
    back = next(i for i in history[1:] if i.prefill_tokens)
    assert back.prefill_tokens == 6 + 3  # the prompt and what had been generated


def test_invariant_first_come_first_served_and_arrivals_wait():
    order = []

    def compute(step):
        order.extend(s.request.name for s, _ in step.prefill)
        return count_up(step)

    requests = [Request("c", (1,), 2, 30), Request("a", (1,), 3, 0), Request("b", (1,), 3, 0)]
    run(requests, Scheduler(BlockManager(4, 4), max_batch=1), compute)
    assert order == ["a", "b", "c"]


def test_invariant_stop_frees_the_place_at_once():
    requests = [Request("a", (1, 2), 9), Request("b", (1, 2, 3), 9)]
    answers, history = run(requests, Scheduler(BlockManager(8, 4), max_batch=1), count_up, stop=4)
    assert answers == {"a": [2, 3, 4], "b": [3, 4]} and len(history) == 5


def test_invariant_prefixes_are_shared_after_a_preemption_too():
    blocks = BlockManager(6, 2)
    prefills = []

    def compute(step):
        prefills.extend((s.request.name, cached) for s, cached in step.prefill)
        return count_up(step)

    prompt = (1, 2, 3, 4, 5)
    requests = [Request("a", prompt, 6), Request("b", prompt, 6, arrival=1)]
    run(requests, Scheduler(blocks, max_batch=2), compute)
    assert prefills[:2] == [("a", 0), ("b", 4)]


def test_rejects_requests_and_sizes():
    scheduler = Scheduler(BlockManager(2, 4), max_batch=2)
    with pytest.raises(ValueError, match="prompt: expected at least one token"):
        Request("a", (), 3)
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
        Request("a", (1,), 0)
    with pytest.raises(ValueError, match="expected at most 8 tokens, got 9; enlarge"):
        scheduler.submit(Request("a", (1,) * 5, 5))
    scheduler.submit(Request("a", (1,), 1))
    with pytest.raises(ValueError, match="the name is under way"):
        scheduler.submit(Request("a", (1,), 1))
    with pytest.raises(ValueError, match="requests: expected a name of its own"):
        run([Request("a", (1,), 1)] * 2, Scheduler(BlockManager(2, 4), max_batch=2), count_up)
    for options, message in (
        ({"max_batch": 0}, "max_batch: expected at least 1, got 0"),
        ({"max_batch": 1, "reserve": -1}, "reserve: expected at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Scheduler(BlockManager(2, 4), **options)
