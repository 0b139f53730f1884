import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from reference.transformer import (
    PRESETS,
    Llama,
    LlamaConfig,
    forward_flops,
    llama_parameters,
    model_flops_utilization,
    six_n,
    training_flops_per_token,
)

TINY = LlamaConfig(
    vocab_size=30, dim=24, hidden_dim=40, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=10
)


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(1, 3), st.booleans())
def test_matches_torchs_counter(seq_len, batch, is_tied):
    config = dataclasses.replace(TINY, is_tied=is_tied)
    model = Llama(config)
    tokens = torch.zeros(batch, seq_len, dtype=torch.long)
    expected = batch * forward_flops(config, seq_len)
    assert counted(lambda: model(tokens)) == expected
    training = batch * seq_len * training_flops_per_token(config, seq_len)
    assert counted(lambda: model(tokens).sum().backward()) == pytest.approx(training, rel=1e-12)


def test_matches_torchs_counter_with_a_cache_and_one_logit():
    model, cache = Llama(TINY), DynamicCache()
    tokens = torch.zeros(1, 12, dtype=torch.long)
    prefill = counted(lambda: model(tokens, cache=cache, num_logits=1))
    assert prefill == forward_flops(TINY, 12, num_logits=1)
    decode = counted(lambda: model(tokens[:, :1], cache=cache))
    assert decode == forward_flops(TINY, 1, num_keys=13)


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "smollm2-135m"])
def test_matches_torchs_counter_at_real_sizes(name):
    config = dataclasses.replace(PRESETS[name], num_layers=2)
    with torch.device("meta"):
        model, tokens = Llama(config), torch.zeros(1, 512, dtype=torch.long)
        assert counted(lambda: model(tokens)) == forward_flops(config, 512)


def test_causal_counts_half_of_the_pairs_and_the_diagonal():
    whole, causal = (forward_flops(TINY, 100, is_causal=flag) for flag in (False, True))
    pairs = 4 * TINY.num_layers * TINY.num_heads * TINY.head_dim
    assert whole - causal == pairs * (100 * 100 - 100 * 101 // 2)


def test_six_n_holds_for_short_texts_and_fails_for_long_ones():
    config = PRESETS["llama-3-8b"]
    ratios = [training_flops_per_token(config, n) / six_n(config) for n in (2048, 8192, 131072)]
    # Short: 6N counts the embedding, which is no product, and not attention: they nearly cancel.
    assert ratios == pytest.approx([1.0013, 1.2018, 5.2122], abs=0.002)


def test_six_n_is_exact_without_attention_and_embedding():
    config = dataclasses.replace(PRESETS["llama-2-7b"], num_layers=1)
    parts = llama_parameters(config)
    pairs = 12 * config.num_heads * config.head_dim * 64
    expected = 6 * parts.in_matrix_products + pairs
    assert training_flops_per_token(config, 64) == expected


def test_palm_matches_the_paper():
    """PaLM 540B, appendix B: 45.7 % without attention, 46.2 % with it."""
    rate, peak = 238.3e3, 6144 * 275e12
    for flops, printed in ((6 * 540.35e9, 45.7), (6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048, 46.2)):
        share = model_flops_utilization(
            tokens_per_second=rate, flops_per_token=flops, peak_flops_per_second=peak
        )
        assert 100 * share == pytest.approx(printed, abs=0.06)


@pytest.mark.parametrize(
    "name, hours, expected",
    [
        ("llama-2-7b", 184_320, 39.1),
        ("llama-2-13b", 368_640, 37.7),
        ("llama-2-70b", 1_720_320, 42.8),
    ],
)
def test_llama_2_from_the_gpu_hours_of_its_model_card(name, hours, expected):
    """2e12 tokens in so many hours of one A100 with 312e12 FLOPs a second: derived, not printed."""
    share = model_flops_utilization(
        tokens_per_second=2e12 / (hours * 3600),
        flops_per_token=six_n(PRESETS[name]),
        peak_flops_per_second=312e12,
    )
    assert 100 * share == pytest.approx(expected, abs=0.05)


def test_llama_3_1_405b_matches_its_compute():
    flops = six_n(PRESETS["llama-3.1-405b"]) * 15.6e12
    assert f"{flops:.1e}" == "3.8e+25"


@pytest.mark.parametrize("lengths", [(0, None), (5, 4)])
def test_rejects_lengths(lengths):
    with pytest.raises(ValueError, match="expected 1 <= seq_len <= num_keys"):
        forward_flops(TINY, lengths[0], num_keys=lengths[1])


def test_rejects_rates():
    with pytest.raises(ValueError, match="tokens_per_second, flops_per_token: expected at least 0"):
        model_flops_utilization(tokens_per_second=-1, flops_per_token=1, peak_flops_per_second=1)
    with pytest.raises(ValueError, match="peak_flops_per_second: expected more than 0"):
        model_flops_utilization(tokens_per_second=1, flops_per_token=1, peak_flops_per_second=0)
