import dataclasses

import pytest
from transformers import LlamaConfig as TheirConfig

from reference.positions import RopeScaling
from reference.transformer import PRESETS, LlamaConfig, from_huggingface, to_huggingface

TINY = LlamaConfig(
    vocab_size=32, dim=24, hidden_dim=40, num_layers=2, num_heads=6, num_kv_heads=2, max_seq_len=64
)
ROPES = {
    "default": None,
    "linear": RopeScaling("linear", 2.0),
    "dynamic": RopeScaling("dynamic", 2.0, 32),
    "yarn": RopeScaling("yarn", 4.0, 16),
    "yarn, own factor": RopeScaling("yarn", 4.0, 16, attention_factor=1.5, beta_fast=16.0),
    "llama3": RopeScaling("llama3", 8.0, 16, low_freq_factor=1.0, high_freq_factor=4.0),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_way_to_transformers_and_back(name):
    config = PRESETS[name]
    theirs = TheirConfig(**to_huggingface(config))
    assert from_huggingface(theirs.to_dict()) == config


@pytest.mark.parametrize("name", ROPES)
def test_rope_survives_the_way_to_transformers_and_back(name):
    config = dataclasses.replace(TINY, rope_scaling=ROPES[name])
    theirs = TheirConfig(**to_huggingface(config))
    assert from_huggingface(theirs.to_dict()) == config


def test_ntk_is_written_as_the_base_that_it_is():
    config = dataclasses.replace(TINY, rope_scaling=RopeScaling("ntk", 4.0))
    entries = to_huggingface(config)
    theta = entries["rope_parameters"]["rope_theta"]
    assert entries["rope_parameters"]["rope_type"] == "default"
    assert theta == pytest.approx(10000 * 4 ** (4 / 2))


OLD = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_reads_older_files():
    config = from_huggingface(OLD)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 16, 10000.0)
    assert (config.max_seq_len, config.norm_eps, config.is_tied) == (2048, 1e-6, False)
    scaled = from_huggingface(
        {
            **OLD,
            "rope_theta": 500000.0,
            "num_key_value_heads": 2,
            "head_dim": None,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        }
    )
    assert scaled.rope_scaling == RopeScaling("llama3", 8.0, 8192)
    assert scaled.rope_theta == 500000.0
    linear = from_huggingface({**OLD, "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert linear.rope_scaling == RopeScaling("linear", 4.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mixtral"}, "model_type: expected 'llama', got 'mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias: expected False, got True"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type"),
    ],
)
def test_rejects_other_architectures(change, message):
    with pytest.raises(ValueError, match=message):
        from_huggingface({**OLD, **change})


def test_rejects_a_config_without_sizes():
    entries = {k: v for k, v in OLD.items() if k != "hidden_size"}
    with pytest.raises(ValueError, match="expected hidden_size; is it a Llama's"):
        from_huggingface(entries)
