import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

from reference.kv_cache import RollingCache, generate, left_pad, slot_columns
from reference.transformer import Llama, LlamaConfig
from tests.reference.kv_cache.test_dynamic import new

WINDOW = 6
SHAPE = LlamaConfig(
    vocab_size=50, dim=32, hidden_dim=48, num_layers=3, num_heads=4, num_kv_heads=2, norm_eps=1e-6,
    initializer_std=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    ours = Llama(SHAPE)
    theirs = MistralForCausalLM(
        MistralConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=WINDOW,
            max_position_embeddings=2048, attn_implementation="eager", rms_norm_eps=1e-6,
            pad_token_id=0, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    state = {
        n if n.startswith("lm_head") else f"model.{n}": t for n, t in ours.state_dict().items()
    }
    theirs.load_state_dict(state)
    return ours.eval(), theirs


@pytest.mark.parametrize("lengths", [(1,), (4,), (6,), (15,), (15, 4, 9), (3, 2)])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_matches_mistral_of_transformers(models, lengths, chunk_size):
    ours, theirs = models
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(50, (n,), generator=generator) for n in lengths]
    tokens, padding = left_pad(prompts)
    seen = (torch.arange(tokens.shape[1]) >= padding[:, None]).long()
    expected = theirs.generate(
        tokens, attention_mask=seen, max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    cache = RollingCache(WINDOW)
    got = generate(ours, prompts, 20, cache=cache, chunk_size=chunk_size)
    assert torch.equal(got, expected[:, tokens.shape[1] :])
    assert cache.keys[0].shape[2] == WINDOW
    assert cache.get_seq_length() == tokens.shape[1] + 19


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 7))
def test_invariant_returns_the_columns_that_it_names(calls, window):
    cache, past = RollingCache(window), 0
    every = torch.randn(1, 1, sum(calls), 1)
    for tokens in calls:
        columns = cache.key_columns(tokens)
        part = every[:, :, past : past + tokens]
        keys, values = cache.update(part, -part, 0)
        past += tokens
        assert torch.equal(keys, every[:, :, columns]) and torch.equal(values, -keys)
        for query in range(past - tokens, past):  # nothing that a query may see is missing
            needed = set(range(max(0, query - window + 1), query + 1))
            assert needed <= set(columns.tolist())


def test_slots_match_writing_them_one_by_one():
    for window in (1, 3, 5):
        ring = {}
        for position in range(12):
            ring[position % window] = position
            expected = [ring[slot] for slot in sorted(ring)]
            assert slot_columns(position + 1, window).tolist() == expected
    assert slot_columns(0, 4).tolist() == []


def test_invariant_bytes_do_not_grow():
    cache = RollingCache(5)
    cache.update(*new(2), 0)
    before = cache.nbytes
    for _ in range(9):
        cache.update(*new(1), 0)
    assert cache.nbytes == before == 2 * 2 * 3 * 5 * 4 * 4


def test_rejects_windows_and_counts():
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        RollingCache(0)
    with pytest.raises(ValueError, match="window: expected at least 1, got -1"):
        slot_columns(3, -1)
    with pytest.raises(ValueError, match="num_tokens: expected at least 0, got -3"):
        slot_columns(-3, 4)
