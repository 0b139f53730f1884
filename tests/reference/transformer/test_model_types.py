"""Every causal language model that transformers knows: equal logits, or refused by its name."""

import copy
import itertools

import pytest
import torch
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from reference.transformer import from_huggingface, load_pretrained, to_huggingface
from reference.transformer.huggingface import KEYS

READ = {"llama"}
SIZES = {
    "vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip
TOKENS = torch.arange(24).view(2, 12)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 8}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8}  # fmt: skip
# Values of every key that is honoured, as files have them.
VALUES = {
    "vocab_size": [30], "hidden_size": [16], "intermediate_size": [20], "num_hidden_layers": [1],
    "num_attention_heads": [2], "num_key_value_heads": [1, 2, None], "head_dim": [6, None],
    "max_position_embeddings": [24], "rms_norm_eps": [1e-3], "tie_word_embeddings": [True, False],
    "initializer_range": [0.5], "rope_theta": [500.0], "partial_rotary_factor": [1.0, 0.5],
    "original_max_position_embeddings": [None], "max_seq_len": [32], "max_sequence_length": [32],
    "rope_scaling": [None, {"type": "linear", "factor": 2.0}, LLAMA3],
    "rope_parameters": [
        None, {"rope_type": "default", "rope_theta": 100.0}, {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.5}, LLAMA3, YARN, {**YARN, "truncate": False},
        {**YARN, "truncate": True, "beta_fast": 8.0, "beta_slow": 2.0}, {**YARN, "factor": None},
        {**YARN, "attention_factor": 1.5}, {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ],
}  # fmt: skip


def test_rejects_every_other_model_type_by_name():
    assert READ <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for model_type in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - READ:
        with pytest.raises(ValueError, match=f"model_type: expected 'llama', got '{model_type}'"):
            from_huggingface({**SIZES, "model_type": model_type})


@pytest.mark.parametrize(
    "model_type", ["mistral", "qwen2", "smollm3", "gpt_oss", "gemma", "cohere"]
)
def test_rejects_another_model_under_the_name_of_a_llama(model_type):
    """A renamed file is refused as well, by the keys that its model has beyond a Llama's."""
    entries = CONFIG_MAPPING[model_type]().to_dict()
    with pytest.raises(ValueError, match="not known here|expected"):
        from_huggingface({**entries, "model_type": "llama"})


def test_the_values_cover_every_key_that_is_read():
    assert VALUES.keys() == KEYS.honoured.keys()


@pytest.mark.parametrize(
    "key, value", [(key, value) for key, values in VALUES.items() for value in values]
)
def test_matches_transformers_there_and_back(tmp_path, key, value):
    torch.manual_seed(0)
    entries = {**SIZES, "model_type": "llama", key: value}
    theirs = LlamaForCausalLM(TheirConfig(**copy.deepcopy(entries))).eval()
    theirs.set_attn_implementation("eager")
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    tokens = TOKENS % entries["vocab_size"]
    assert torch.equal(ours(tokens), theirs(tokens).logits)
    if not (key == "original_max_position_embeddings" or value is None):
        assert from_huggingface(entries) == ours.config  # the file as people write it
    again = TheirConfig(**to_huggingface(ours.config))
    assert from_huggingface(again.to_dict()) == ours.config


@pytest.mark.parametrize("usable", [50, 80, 100])
def test_dynamic_length_survives_the_way_to_transformers_and_back(usable):
    entries = {
        **SIZES,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.5},
        "max_seq_len": usable,
    }
    config = from_huggingface(entries)
    assert config.max_seq_len == usable
    theirs = TheirConfig(**to_huggingface(config))
    assert theirs.max_position_embeddings == 32
    assert from_huggingface(theirs.to_dict()) == config


# What public reports say was passed over somewhere.
REFUSED = {
    "is_causal": False, "sliding_window": 4096, "quantization_config": {"quant_method": "fp8"},
    "attention_bias": True, "mlp_bias": True, "attention_dropout": 0.1, "hidden_act": "gelu",
    "auto_map": {"AutoModelForCausalLM": "modeling.Other"}, "layer_types": ["sliding_attention"],
    "embedding_multiplier": 12.0, "logits_scaling": 8.0, "no_rope_layers": [0, 1],
    "tie_word_embeddings": "yes", "num_hidden_layers": 2.0, "head_dim": True, "rope_theta": "1e4",
    "max_seq_len": 64, "rope_interleaved": True, "qk_norm": True,
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_rejects_a_key_by_name_and_value(key):
    with pytest.raises(ValueError, match=f"{key}.*{str(REFUSED[key])[:3].strip('{[')}"):
        from_huggingface({**SIZES, key: REFUSED[key]})


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"rope_type": "linear"}, "expected also factor"),
        ({"rope_type": "yarn"}, "expected also factor"),
        ({"rope_type": "linear", "factor": None}, "factor: expected int or float, got None"),
        ({"rope_type": "linear", "factor": "2"}, "factor: expected int or float, got '2'"),
        ({"rope_type": "llama3", "factor": 8.0}, "expected also low_freq_factor, high_freq"),
        ({"factor": 8.0}, r"rope_parameters \(default\): factor=8.0 not known"),
        ({**YARN, "truncate": None}, "truncate: expected bool, got None"),
        ({**YARN, "mscale": 1.0}, "mscale=1.0 not known"),
        ({**YARN, "partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0, got 0.5"),
        ({"rope_type": "yarn", "type": "linear", "factor": 2.0}, "rope_type"),
        ({"rope_type": "ntk", "factor": 2.0}, "larger rope_theta"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}, "expected "
         "max_position_embeddings=32"),
    ],
)  # fmt: skip
def test_rejects_a_rope_that_transformers_would_read_otherwise(rope, message):
    for name in ("rope_parameters", "rope_scaling"):
        with pytest.raises(ValueError, match=message):
            from_huggingface({**SIZES, name: rope})


def test_rejects_two_ropes_and_takes_one_told_twice():
    linear = {"rope_type": "linear", "factor": 2.0}
    default = {"rope_type": "default", "rope_theta": 1e4}
    for one, other in itertools.permutations((linear, default)):
        with pytest.raises(ValueError, match="rope_parameters, rope_scaling: two ropes"):
            from_huggingface({**SIZES, "rope_parameters": one, "rope_scaling": other})
    twice = {"rope_parameters": {**linear, "rope_theta": 1e4}, "rope_scaling": linear}
    assert from_huggingface({**SIZES, **twice}).rope_scaling.factor == 2.0
    with pytest.raises(ValueError, match="rope_theta: 500.0 beside 10000.0; which is it"):
        from_huggingface({**SIZES, "rope_parameters": default, "rope_theta": 500.0})


def test_matches_transformers_with_the_length_of_training_beside_the_rope():
    """Phi-3's place for it; there it has the last word, so a second one must agree."""
    rope = {"rope_type": "yarn", "factor": 4.0}
    entries = {**SIZES, "rope_parameters": rope, "original_max_position_embeddings": 8}
    theirs = LlamaForCausalLM(TheirConfig(**copy.deepcopy(entries))).model.rotary_emb
    scaling = from_huggingface(entries).rope_scaling
    assert scaling.original_max_position_embeddings == 8
    from reference.positions import rope_frequencies

    assert torch.equal(rope_frequencies(4, 1e4, scaling), theirs.inv_freq)
    rope["original_max_position_embeddings"] = 16
    with pytest.raises(ValueError, match="8 beside 16; which is it"):
        from_huggingface(entries)
