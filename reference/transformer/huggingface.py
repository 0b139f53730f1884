"""A configuration in transformers' words, both ways: what stands in config.json.

Since version 5 RoPE is described by one entry, `rope_parameters`; older files have `rope_theta` and
`rope_scaling`. Either is read, the newer is written. What is read and not understood is refused
where it would change the numbers (biases, another activation), and passed over where it would not
(the ids of special tokens, dropout).
"""

from collections.abc import Mapping
from typing import Any

from reference.positions import RopeScaling, ntk_base
from reference.transformer.config import LlamaConfig

# Our name, theirs, and what they take it to be where it is not given (None: it must be).
FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("vocab_size", "vocab_size", None),
    ("dim", "hidden_size", None),
    ("hidden_dim", "intermediate_size", None),
    ("num_layers", "num_hidden_layers", None),
    ("num_heads", "num_attention_heads", None),
    ("num_kv_heads", "num_key_value_heads", 0),
    ("head_dim", "head_dim", 0),
    ("max_seq_len", "max_position_embeddings", 2048),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("is_tied", "tie_word_embeddings", False),
    ("initializer_std", "initializer_range", 0.02),
)
# What a Llama here is, and so the only value that can be read.
FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
TRAINED = "original_max_position_embeddings"


def from_huggingface(entries: Mapping[str, Any]) -> LlamaConfig:
    """The configuration that a config.json describes.

    `max_seq_len` is the length that may be used: with dynamic RoPE, `factor` times theirs.

    Raises: ValueError for another architecture, missing entries, or a RoPE that is not known.
    """
    for name, value in FIXED.items():
        if entries.get(name, value) != value:
            raise ValueError(
                f"config.json: {name}: expected {value!r}, got {entries[name]!r}; "
                "only Llamas can be read"
            )
    missing = [theirs for _, theirs, default in FIELDS if default is None and theirs not in entries]
    if missing:
        raise ValueError(f"config.json: expected {', '.join(missing)}; is it a Llama's?")
    fields = {}
    for ours, theirs, default in FIELDS:
        value = entries.get(theirs)
        fields[ours] = default if value is None else value
    theta, scaling = _rope(entries, fields["max_seq_len"])
    if scaling is not None and scaling.rope_type == "dynamic":
        fields["max_seq_len"] = int(scaling.factor * fields["max_seq_len"])
    return LlamaConfig(rope_theta=theta, rope_scaling=scaling, **fields)


def to_huggingface(config: LlamaConfig) -> dict[str, Any]:
    """The entries of a config.json from which transformers builds the same model."""
    entries: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], **FIXED}
    entries |= {theirs: getattr(config, ours) for ours, theirs, _ in FIELDS}
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling is not None and scaling.rope_type == "ntk":  # a larger base, and nothing else
        rope["rope_theta"] = ntk_base(config.rope_theta, config.head_dim, scaling.factor)
    elif scaling is not None and scaling.rope_type != "default":
        rope |= {"rope_type": scaling.rope_type, "factor": scaling.factor}
        rope |= {name: getattr(scaling, name) for name in _parameters_of(scaling)}
    if scaling is not None and scaling.rope_type == "dynamic":
        entries["max_position_embeddings"] = scaling.original_max_position_embeddings
    return {**entries, "rope_parameters": rope}


def _rope(entries: Mapping[str, Any], context: int) -> tuple[float, RopeScaling | None]:
    rope = dict(entries.get("rope_parameters") or entries.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or entries.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    # transformers stretches dynamically from max_position_embeddings, whatever else is written.
    if kind == "dynamic" or (kind == "yarn" and not rope.get(TRAINED)):
        rope[TRAINED] = context
    return theta, RopeScaling.from_dict(rope)


def _parameters_of(scaling: RopeScaling) -> list[str]:
    """Those parameters that a type reads and that are set."""
    names = {
        "yarn": [TRAINED, "beta_fast", "beta_slow", "attention_factor"],
        "llama3": [TRAINED, "low_freq_factor", "high_freq_factor"],
    }.get(scaling.rope_type, [])
    return [name for name in names if getattr(scaling, name) is not None]
