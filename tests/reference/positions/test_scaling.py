import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from reference.positions import (
    RopeScaling,
    attention_factor,
    ntk_base,
    rope_frequencies,
    rope_table,
    yarn_range,
)

PARAMETERS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.5,
    },
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
]


def theirs(head_dim, base, parameters, max_positions=2048):
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_theta": base, **parameters},
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda p: p["rope_type"])
@pytest.mark.parametrize("head_dim, base", [(64, 10000.0), (128, 500000.0)])
def test_matches_transformers_bit_for_bit(head_dim, base, parameters):
    scaling = RopeScaling.from_dict(parameters)
    oracle = theirs(head_dim, base, parameters)
    frequencies = rope_frequencies(head_dim, base, scaling)
    assert torch.equal(frequencies, oracle.inv_freq)
    assert attention_factor(scaling) == oracle.attention_scaling
    positions = torch.tensor([[0, 1, 2, 1000], [5, 6, 7, 8]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = oracle(torch.zeros(1, dtype=dtype), positions)
        got = rope_table(
            positions, frequencies, attention_factor=attention_factor(scaling), dtype=dtype
        )
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("seq_len", [10, 2048, 2049, 5000])
def test_dynamic_matches_transformers(seq_len):
    scaling = RopeScaling("dynamic", 2.0, 2048)
    oracle = theirs(64, 10000.0, {"rope_type": "dynamic", "factor": 2.0})
    oracle(torch.zeros(1), torch.tensor([[seq_len - 1]]))
    frequencies = rope_frequencies(64, 10000.0, scaling, seq_len=seq_len)
    # theirs takes the power in a float32 tensor, ours in Python
    torch.testing.assert_close(frequencies, oracle.inv_freq, rtol=1e-6, atol=0)


def test_matches_published_ntk_bases():
    """YaRN, sec. 3.1, for d = 128."""
    for factor, published in ((2.0, 20221), (4.0, 40890), (8.0, 82685)):
        assert round(ntk_base(10000.0, 128, factor)) == published


def test_ntk_slows_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all():
    plain, stretched = rope_frequencies(64), rope_frequencies(64, scaling=RopeScaling("ntk", 8.0))
    assert stretched[0] == plain[0]
    assert (plain[-1] / stretched[-1]).item() == pytest.approx(8, rel=1e-5)


def test_matches_published_yarn_constants():
    for factor, published in ((2, 1.0693), (4, 1.1386), (8, 1.2079), (16, 1.2773)):
        got = attention_factor(RopeScaling("yarn", float(factor), 2048))
        assert round(got, 4) == published
    for length, ramp in ((2048, (16, 41)), (4096, (20, 46))):
        assert yarn_range(128, 10000.0, RopeScaling("yarn", 2.0, length)) == ramp


def test_matches_the_counts_of_llama_3_1():
    """64 pairs of Llama 3.1: 29 unchanged, 6 blended, 29 divided by 8."""
    scaling = RopeScaling("llama3", 8.0, 8192)
    ratio = rope_frequencies(128, 500000.0) / rope_frequencies(128, 500000.0, scaling)
    assert (ratio == 1).sum() == 29
    assert torch.isclose(ratio, torch.tensor(8.0)).sum() == 29
    longest = 2 * math.pi / rope_frequencies(128, 500000.0)[-1].item()
    assert longest == pytest.approx(2.559e6, rel=1e-3)


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
def test_invariant_factor_1_changes_nothing(kind):
    scaling = RopeScaling(kind, 1.0, 2048)
    torch.testing.assert_close(rope_frequencies(64, scaling=scaling), rope_frequencies(64))
    assert attention_factor(scaling) == 1.0


def test_reads_the_older_key():
    assert RopeScaling.from_dict({"type": "linear", "factor": 2.0}).rope_type == "linear"


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"rope_type": "longrope"}, "rope_type: expected one of default, linear"),
        ({"rope_type": "linear", "factor": 0.5}, "factor: expected at least 1, got 0.5"),
        ({"rope_type": "yarn", "factor": 2.0}, "yarn needs the length of training"),
        (
            {"rope_type": "linear", "mscale": 1.0},
            r"rope_parameters \(linear\): mscale=1.0 not known",
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 2.0,
                "original_max_position_embeddings": 8,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
            },
            "0 < low_freq_factor < high_freq_factor",
        ),
    ],
)
def test_rejects_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling.from_dict(parameters)


def test_rejects_widths_and_bases():
    with pytest.raises(ValueError, match="head_dim: expected an even number of at least 2, got 7"):
        rope_frequencies(7)
    with pytest.raises(ValueError, match="base: expected more than 1, got 1.0"):
        rope_frequencies(8, 1.0)
