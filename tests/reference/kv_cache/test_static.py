import pytest
import torch
from transformers import LlamaConfig
from transformers import StaticCache as TheirCache

from reference.kv_cache import StaticCache
from tests.reference.kv_cache.test_dynamic import new


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_matches_transformers(dtype):
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, hidden_size=12
    )
    ours, theirs = StaticCache(9), TheirCache(config=config, max_cache_len=9)
    filled = 0
    for call, tokens in enumerate((5, 1, 3)):
        filled += tokens
        for layer in range(2):
            k, v = new(tokens, dtype=dtype, seed=10 * call + layer)
            got, expected = ours.update(k, v, layer), theirs.update(k, v, layer)
            for a, b in zip(got, expected, strict=True):  # theirs returns the empty part as well
                assert torch.equal(a, b[:, :, :filled])
        assert ours.get_seq_length() == filled


def test_invariant_addresses_and_bytes_stay():
    cache = StaticCache(8)
    k, v = new(2)
    address = cache.update(k, v, 0)[0].data_ptr()
    assert cache.update(k, v, 0)[0].data_ptr() == address
    assert cache.nbytes == 2 * 2 * 3 * 8 * 4 * 4
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(cache.update(k, v, 0)[0], k)


def test_rejects_too_many_tokens():
    with pytest.raises(ValueError, match="max_len: expected at least 1, got 0"):
        StaticCache(0)
    cache = StaticCache(3)
    k, v = new(2)
    cache.update(k, v, 0)
    with pytest.raises(ValueError, match="k: expected at most 1 more tokens, got 2"):
        cache.update(k, v, 0)
    with pytest.raises(ValueError, match="begin a new one"):
        cache.update(k[:1, :, :1], v[:1, :, :1], 0)
