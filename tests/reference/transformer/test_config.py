import dataclasses

import pytest

from reference.transformer import LlamaConfig

TINY = LlamaConfig(
    vocab_size=32, dim=24, hidden_dim=40, num_layers=2, num_heads=6, num_kv_heads=2, max_seq_len=64
)


def test_heads_have_defaults():
    config = LlamaConfig(vocab_size=8, dim=12, hidden_dim=16, num_layers=1, num_heads=3)
    assert (config.num_kv_heads, config.head_dim) == (3, 4)
    assert hash(config) == hash(dataclasses.replace(config))


def test_head_dim_is_free():
    config = dataclasses.replace(TINY, num_heads=5, num_kv_heads=1, head_dim=10)
    assert config.num_heads * config.head_dim != config.dim


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_kv_heads": 4}, "num_kv_heads: expected a divisor of num_heads=6, got 4"),
        ({"num_kv_heads": -2}, "num_kv_heads"),
        ({"dim": 25, "head_dim": 0}, "dim: expected a multiple of num_heads=6, got 25"),
        ({"head_dim": 7}, "head_dim: expected an even number, got 7"),
        ({"num_layers": 0}, "num_layers: expected at least 1, got 0"),
        ({"vocab_size": -1}, "vocab_size: expected at least 1"),
        ({"norm_eps": 0.0}, "norm_eps: expected more than 0"),
    ],
)
def test_rejects_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
