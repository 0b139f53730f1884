import pytest
import torch

from reference.kv_cache import (
    BlockManager,
    OutOfBlocks,
    PagedCache,
    beam_search,
    generate,
    sample_parallel,
)


def paged(model, num_blocks=64, block_size=4):
    config = model.config
    return PagedCache(
        BlockManager(num_blocks, block_size),
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )


@pytest.mark.parametrize("num_beams", [1, 3])
def test_matches_transformers_beam_search(course, theirs, num_beams):
    model, ids = course
    cache = paged(model)
    tokens, scores = beam_search(model, ids[:9], 12, num_beams=num_beams, cache=cache)
    options = {} if num_beams == 1 else {"length_penalty": 0.0}
    expected = theirs.generate(
        ids[None, :9], attention_mask=torch.ones(1, 9), max_new_tokens=12, min_new_tokens=12,
        num_beams=num_beams, num_return_sequences=num_beams, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    assert torch.equal(tokens, expected.sequences[:, 9:])
    if num_beams > 1:
        torch.testing.assert_close(scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
    assert cache.blocks.num_free == 64
    cache.blocks.check()


@pytest.mark.parametrize("length_penalty", [0.0, 0.5, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("num_beams", [2, 4])
def test_matches_transformers_beams_that_stop(course, theirs, num_beams, length_penalty):
    """Several prompts and stop tokens, so that beams end early, late and never."""
    model, ids = course
    cache = paged(model)
    lengths = set()
    for start, stop in ((0, 267), (40, 267), (80, 299), (120, 199), (160, 33)):
        prompt = ids[start : start + 9]
        tokens, scores = beam_search(
            model, prompt, 10, num_beams=num_beams, cache=cache, stop=stop,
            length_penalty=length_penalty,
        )  # fmt: skip
        expected = theirs.generate(
            prompt[None], attention_mask=torch.ones(1, 9), max_new_tokens=10, do_sample=False,
            num_beams=num_beams, num_return_sequences=num_beams, pad_token_id=stop,
            eos_token_id=stop, length_penalty=length_penalty, early_stopping=False,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        assert torch.equal(tokens, expected.sequences[:, 9:])
        torch.testing.assert_close(scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
        lengths |= {(row != stop).sum().item() for row in tokens}
    assert len(lengths) > 1 and cache.blocks.num_free == 64


def test_invariant_samples_are_what_each_would_be_alone(course):
    """Rows that choose differently: the k-th sample always takes the k-th best token."""
    model, ids = course
    cache = paged(model)
    got = sample_parallel(
        model, ids[:10], 9, num_samples=3, cache=cache,
        choose=lambda logits: logits.topk(3).indices[torch.arange(3), torch.arange(3)],
    )  # fmt: skip
    for k in range(3):
        alone = generate(model, [ids[:10]], 9, choose=lambda x, k=k: x.topk(3).indices[:, k])
        assert torch.equal(got[k], alone[0])
    assert cache.blocks.num_free == 64


def test_invariant_blocks_come_back_after_an_error(course):
    model, ids = course
    cache = paged(model, num_blocks=5)
    with pytest.raises(OutOfBlocks):
        sample_parallel(model, ids[:10], 9, num_samples=3, cache=cache)
    with pytest.raises(OutOfBlocks):
        beam_search(model, ids[:10], 20, num_beams=3, cache=cache)
    assert cache.blocks.num_free == 5
    cache.blocks.check()


def test_rejects_counts(course):
    model, ids = course
    with pytest.raises(ValueError, match="num_beams: expected at least 1, got 0"):
        beam_search(model, ids[:3], 4, num_beams=0, cache=paged(model))
    with pytest.raises(ValueError, match="num_tokens: expected at least 1, got 0"):
        sample_parallel(model, ids[:3], 0, num_samples=2, cache=paged(model))
