import random

import pytest
import torch

from reference.kv_cache import Request, Scheduler, run
from reference.kv_cache.blocks import BlockManager
from reference.transformer.sampling import generate
from reference.transformer.stopping import stop_strings, text_before
from reference.transformer.tokenizer import Tokenizer

TOKENIZER = Tokenizer([], ())
TEXT = "one\n\ntwo, and thr\u00e9e."


def spell(tokens, *_, **__):
    """A model that writes TEXT, whatever it reads, over and over."""
    text = torch.tensor(TOKENIZER.encode(TEXT))
    at = torch.arange(tokens.shape[1]) if not _ else _[0]
    logits = torch.nn.functional.one_hot(text[at % len(text)], 256).float()
    return logits.expand(len(tokens), -1, -1)[:, -1:] if _ else logits.expand(len(tokens), -1, -1)


@pytest.mark.parametrize("strings", [["two"], ["\n\n"], ["r\u00e9e"], ["x", "wo, a"], ["never"]])
def test_generation_ends_with_the_string(strings):
    stop = stop_strings(TOKENIZER.decode, strings)
    ids = generate(spell, torch.zeros(2, 1, dtype=torch.long), len(TEXT.encode()), stop=stop)
    text = TOKENIZER.decode(ids[0, 1:].tolist())
    found = [s for s in strings if s in TEXT]
    assert text == (TEXT[: TEXT.index(found[0]) + len(found[0])] if found else TEXT)
    assert text_before(text, strings) == (TEXT[: TEXT.index(found[0])] if found else TEXT)


def test_matches_a_search_in_the_whole_text():
    """Tokens straddle the string, end inside of it, and hold parts of letters."""
    learned = Tokenizer.train("one two thr\u00e9e three " * 30, vocab_size=275)
    rng = random.Random(0)
    found = 0
    for _ in range(300):
        strings = rng.sample(["o t", "r\u00e9", "e", "\u00e9e t", "two thr", "ne"], 2)
        has_stopped = stop_strings(learned.decode, strings)
        tokens = []
        while len(tokens) < 12:
            tokens.append(rng.randrange(learned.vocab_size - 19, learned.vocab_size))
            if rng.random() < 0.3:
                tokens += learned.encode("\u00e9")[:1]
            expected = any(s in learned.decode(tokens) for s in strings)
            assert has_stopped(tokens) == expected
            if expected:
                found += 1
                break
    assert 100 < found < 300


def test_rows_stop_each_on_its_own():
    stop = lambda row: sum(row) > 20 or row[-1] == 9  # noqa: E731
    model = lambda tokens: torch.nn.functional.one_hot((tokens + 1) % 10, 10).float()  # noqa: E731
    out = generate(model, torch.tensor([[3], [6]]), 6, stop=stop)
    assert out.tolist() == [[3, 4, 5, 6, 7], [6, 7, 8, 9, 9]]


def test_served_answers_stop_as_well():
    def compute(step):
        return [len(s.tokens) for s in [s for s, _ in step.prefill] + step.decode]

    scheduler = Scheduler(BlockManager(9, 4), max_batch=2)
    requests = [Request("a", (1, 2), 9), Request("b", (1,) * 5, 9)]
    answers, _ = run(requests, scheduler, compute, stop=lambda row: sum(row) > 10)
    assert answers == {"a": [2, 3, 4, 5], "b": [5, 6]}


@pytest.mark.parametrize("strings", [[], [""], "ab"], ids=str)
def test_rejects_strings(strings):
    with pytest.raises(ValueError, match="strings: expected some that are not empty"):
        stop_strings(TOKENIZER.decode, strings)
