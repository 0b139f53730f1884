import pytest

from reference.activations import swiglu_hidden_dim
from reference.transformer import PRESETS

# name: context, key/value heads, vocabulary, RoPE base, rounding of the hidden width
PUBLISHED = {
    "llama-1-7b": (2048, 32, 32000, 1e4, (1.0, 256)),
    "llama-1-65b": (2048, 64, 32000, 1e4, (1.0, 256)),
    "llama-2-7b": (4096, 32, 32000, 1e4, (1.0, 256)),
    "llama-2-13b": (4096, 40, 32000, 1e4, (1.0, 256)),
    "llama-2-70b": (4096, 8, 32000, 1e4, (1.3, 4096)),
    "llama-3-8b": (8192, 8, 128256, 5e5, (1.3, 1024)),
    "llama-3-70b": (8192, 8, 128256, 5e5, (1.3, 4096)),
    "llama-3.1-8b": (131072, 8, 128256, 5e5, (1.3, 1024)),
    "llama-3.1-405b": (131072, 8, 128256, 5e5, (1.2, 4096)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_match_the_papers(name):
    config = PRESETS[name]
    context, kv_heads, vocab_size, theta, (multiplier, multiple_of) = PUBLISHED[name]
    assert config.max_seq_len == context and config.num_kv_heads == kv_heads
    assert config.vocab_size == vocab_size and config.rope_theta == theta
    width = swiglu_hidden_dim(config.dim, multiplier=multiplier, multiple_of=multiple_of)
    assert config.hidden_dim == width
    assert config.head_dim == 128


def test_only_the_largest_llama_2_shares_keys():
    shares = {n: c.num_kv_heads < c.num_heads for n, c in PRESETS.items() if "llama-2" in n}
    assert shares == {"llama-2-7b": False, "llama-2-13b": False, "llama-2-70b": True}
