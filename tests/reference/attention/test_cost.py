import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from reference.attention import (
    Attention,
    attention_flops,
    causal_mask,
    decode_intensity,
    decode_reads,
    grouped_query_attention,
    kv_cache_bytes,
    projection_flops,
    scaled_dot_product_attention,
)

# layers, KV heads, head width -> published or derived bytes a token in 16 bits
PUBLISHED = {
    "OPT-13B": ((40, 40, 128), 800 * 1024),  # vLLM, arXiv 2309.06180, sec. 3
    "Llama-2-7B": ((32, 32, 128), 512 * 1024),
    "Llama-2-70B": ((80, 8, 128), 320 * 1024),
    "Llama-3-8B": ((32, 8, 128), 128 * 1024),
    "Llama-3-405B": ((126, 8, 128), 504 * 1024),
    "GPT-3": ((96, 96, 128), 4_718_592),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_matches_published_bytes(model):
    (num_layers, num_kv_heads, head_dim), expected = PUBLISHED[model]
    actual = kv_cache_bytes(num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim)
    assert actual == expected


def test_matches_the_bytes_in_a_transformers_cache():
    cache = DynamicCache()
    for layer in range(3):
        cache.update(*torch.zeros(2, 4, 2, 9, 16, dtype=torch.float16), layer)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == kv_cache_bytes(num_layers=3, num_kv_heads=2, head_dim=16, num_tokens=4 * 9)


@pytest.mark.parametrize("attend", [scaled_dot_product_attention, grouped_query_attention])
def test_matches_torch_flop_counter(attend):
    dim, heads, kv_heads, head_dim, seq_len = 24, 6, 2, 4, 11
    layer = Attention(dim, num_heads=heads, num_kv_heads=kv_heads)
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(1, seq_len, dim), attend=attend)
    expected = attention_flops(
        num_heads=heads, head_dim=head_dim, num_queries=seq_len, num_keys=seq_len
    ) + projection_flops(
        dim=dim, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, num_tokens=seq_len
    )
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 7), (3, 8), (6, 4), (0, 3)])
def test_causal_flops_match_the_mask(queries, keys):
    pairs = int(causal_mask(queries, keys).sum())
    actual = attention_flops(
        num_heads=2, head_dim=3, num_queries=queries, num_keys=keys, is_causal=True
    )
    assert actual == 4 * 2 * 3 * pairs


def test_decode_intensity_is_the_group_size_in_16_bits():
    assert decode_intensity(num_heads=32, num_kv_heads=32) == 1
    assert decode_intensity(num_heads=64, num_kv_heads=8) == 8
    assert decode_intensity(num_heads=64, num_kv_heads=8, bits=8) == 16


def test_decode_intensity_matches_flops_over_bytes():
    flops = attention_flops(num_heads=12, head_dim=16, num_queries=1, num_keys=100)
    read = kv_cache_bytes(num_layers=1, num_kv_heads=4, head_dim=16, num_tokens=100)
    assert decode_intensity(num_heads=12, num_kv_heads=4) == pytest.approx(flops / read)


def test_decode_reads_count_parameters_and_cache():
    layer = Attention(24, num_heads=6, num_kv_heads=2)
    weights = sum(p.numel() for p in layer.parameters())
    actual = decode_reads(
        dim=24, num_heads=6, num_kv_heads=2, head_dim=4, batch_size=3, num_keys=10
    )
    assert actual == weights + 2 * torch.zeros(3, 2, 10, 4).numel() + torch.zeros(3, 1, 24).numel()


def test_rejects_negative_count():
    with pytest.raises(ValueError, match="num_layers: expected at least 0, got -1"):
        kv_cache_bytes(num_layers=-1, num_kv_heads=1, head_dim=1)
