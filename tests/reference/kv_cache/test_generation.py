from functools import partial

import pytest
import torch
from transformers import DynamicCache as TheirDynamicCache
from transformers import StaticCache as TheirStaticCache

from reference.attention import grouped_query_attention
from reference.kv_cache import (
    DynamicCache,
    StaticCache,
    column_mask,
    generate,
    left_pad,
)
from reference.pretrained import SMOLLM2, load_smollm2, passage
from reference.transformer import fused_causal_attention, load_pretrained
from reference.transformer.sampling import generate as generate_without_cache


def their_tokens(theirs, prompts, num_tokens, cache):
    tokens, padding = left_pad(prompts)
    seen = (torch.arange(tokens.shape[1]) >= padding[:, None]).long()
    out = theirs.generate(
        tokens, attention_mask=seen, max_new_tokens=num_tokens, min_new_tokens=num_tokens,
        do_sample=False, past_key_values=cache, pad_token_id=0,
    )  # fmt: skip
    return out[:, tokens.shape[1] :]


@pytest.mark.slow
def test_smollm2_matches_transformers_token_for_token():
    """64 greedy tokens after three prompts of different lengths, with both of their caches."""
    theirs, tokenizer = load_smollm2()
    ids = tokenizer(passage(), return_tensors="pt").input_ids[0]
    prompts = [ids[:37], ids[50:61], ids[100:124]]
    model = load_pretrained(SMOLLM2).requires_grad_(False)
    got = generate(
        partial(model, attend=fused_causal_attention), prompts, 64, cache=StaticCache(100)
    )
    assert got.shape == (3, 64)
    growing = TheirDynamicCache(config=theirs.config)
    assert torch.equal(got, their_tokens(theirs, prompts, 64, growing))
    static = TheirStaticCache(config=theirs.config, max_cache_len=101)
    assert torch.equal(got, their_tokens(theirs, prompts, 64, static))


@pytest.mark.parametrize("cache", [DynamicCache, partial(StaticCache, 160), TheirDynamicCache])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_matches_transformers(course, theirs, prompts, cache, chunk_size):
    expected = their_tokens(theirs, prompts, 70, TheirDynamicCache(config=theirs.config))
    got = generate(course[0], prompts, 70, cache=cache(), chunk_size=chunk_size)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("attend", [fused_causal_attention, grouped_query_attention])
def test_matches_each_prompt_alone_without_a_cache(course, prompts, attend):
    model, _ = course
    got = generate(partial(model, attend=attend), prompts, 20)
    for row, prompt in zip(got, prompts, strict=True):
        alone = generate_without_cache(model, prompt[None], 20)
        assert torch.equal(row, alone[0, len(prompt) :])


def test_invariant_one_token_a_pass_after_prefill(course, prompts):
    passes = []

    def counted(tokens, *args, **options):
        passes.append(tokens.shape[1])
        return course[0](tokens, *args, **options)

    generate(counted, prompts, 6)
    assert passes == [31, 1, 1, 1, 1, 1]  # the last token needs no keys


def test_invariant_stop(course, prompts):
    full = generate(course[0], prompts, 12)
    stop = int(full[0, 4])
    got = generate(course[0], prompts, 12, stop=stop)
    for row, expected in zip(got.tolist(), full.tolist(), strict=True):
        end = expected.index(stop) + 1 if stop in expected else len(expected)
        assert row[:end] == expected[: min(end, len(row))]
        assert all(token == stop for token in row[end:])


def test_column_mask_matches_its_definition():
    padding, window = torch.tensor([0, 2]), 3
    keys, queries = torch.tensor([4, 1, 2, 3]), torch.tensor([3, 4])
    for w in (None, window):
        got = column_mask(keys, queries, padding, w)
        for b in range(2):
            for i, query in enumerate(queries.tolist()):
                for j, key in enumerate(keys.tolist()):
                    seen = key <= query and key >= padding[b] and (w is None or query - key < w)
                    assert bool(got[b, 0, i, j]) == bool(seen)


def test_rejects_prompts_counts_and_used_caches(course, prompts):
    model = course[0]
    assert generate(model, prompts, 0).shape == (4, 0)
    used = DynamicCache()
    generate(model, prompts, 2, cache=used)
    for call, message in (
        (lambda: generate(model, [], 3), "prompts: expected at least one, got none"),
        (lambda: generate(model, [prompts[0][:0]], 3), r"prompts\[0\]: expected a row"),
        (lambda: generate(model, prompts, -1), "num_tokens: expected at least 0, got -1"),
        (lambda: generate(model, prompts, 3, chunk_size=0), "chunk_size: expected at least 1"),
        (lambda: generate(model, prompts, 3, cache=used), "cache: expected an empty one"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
