"""A configuration in transformers' words, both ways: what stands in config.json.

Since version 5 RoPE is described by one entry, `rope_parameters`; older files have `rope_theta` and
`rope_scaling`. Either is read, the newer is written. Every key is honoured, on the list of harmless
ones, or refused by name (`reference.configuration`); what is read is written again.
"""

from collections.abc import Mapping
from typing import Any

from reference.configuration import COUNT, FLAG, NOTHING, NUMBER, Keys
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
# What a Llama here is, and so the only value that can be read; these are written as well.
FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
TRAINED, LENGTH = "original_max_position_embeddings", "max_seq_len"
KEYS = Keys(
    file="config.json",
    honoured={
        "vocab_size": COUNT, "hidden_size": COUNT, "intermediate_size": COUNT,
        "num_hidden_layers": COUNT, "num_attention_heads": COUNT,
        "num_key_value_heads": COUNT + NOTHING, "head_dim": COUNT + NOTHING,
        "max_position_embeddings": COUNT, "rms_norm_eps": NUMBER, "tie_word_embeddings": FLAG,
        "initializer_range": NUMBER, "rope_theta": NUMBER + NOTHING,
        "rope_parameters": (dict, *NOTHING), "rope_scaling": (dict, *NOTHING),
        "partial_rotary_factor": NUMBER + NOTHING, TRAINED: COUNT + NOTHING,
        LENGTH: COUNT + NOTHING, "max_sequence_length": COUNT + NOTHING,
    },
    plain={name: (value,) for name, value in FIXED.items()} | {
        "attention_dropout": (0,), "is_causal": (True,), "is_encoder_decoder": (False,),
        "add_cross_attention": (False,), "chunk_size_feed_forward": (0,),
        "rope_interleaved": (False,), "use_sliding_window": (False,),
    },
    harmless=frozenset(
        "architectures transformers_version torch_dtype dtype _name_or_path _model_name_or_path "
        "use_cache pretraining_tp bos_token_id eos_token_id pad_token_id unk_token_id "
        "return_dict output_hidden_states output_attentions torchscript problem_type id2label "
        "label2id tokenizer_class _attn_implementation attn_implementation is_llama_config "
        "transformers.js_config is_decoder max_length do_sample temperature top_k top_p".split()
    ),
)  # fmt: skip


def from_huggingface(entries: Mapping[str, Any]) -> LlamaConfig:
    """The configuration that a config.json describes.

    `max_seq_len` is the length that may be used: with dynamic RoPE, `factor` times theirs, unless
    the file says another.

    Raises: ValueError for another architecture, keys that are missing or not known, or a RoPE that
    is not known.
    """
    kind = entries.get("model_type", "llama")
    if kind != "llama":
        raise ValueError(
            f"config.json: model_type: expected 'llama', got {kind!r}; only Llamas can be read"
        )
    known = KEYS.read(entries)
    missing = [theirs for _, theirs, default in FIELDS if default is None and theirs not in known]
    if missing:
        raise ValueError(f"config.json: expected {', '.join(missing)}; is it a Llama's?")
    fields = {ours: known.get(theirs, default) for ours, theirs, default in FIELDS}
    theta, scaling = _rope(known, fields["max_seq_len"])
    usable = fields["max_seq_len"]
    if scaling is not None and scaling.rope_type == "dynamic":
        usable = known.get(LENGTH, int(scaling.factor * usable))
    for name in (LENGTH, "max_sequence_length"):
        if known.get(name, usable) != usable:
            raise ValueError(
                f"config.json: {name}: expected max_position_embeddings={usable}, "
                f"got {known[name]}; which is it?"
            )
    fields["max_seq_len"] = usable
    return LlamaConfig(rope_theta=theta, rope_scaling=scaling, **fields)


def to_huggingface(config: LlamaConfig) -> dict[str, Any]:
    """The entries of a config.json from which transformers builds the same model.

    Dynamic RoPE has its length of training as `max_position_embeddings` there; a usable length that
    is not `factor` times that is written as `max_seq_len`, which transformers keeps and ignores.
    """
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
        trained = scaling.original_max_position_embeddings
        assert trained is not None
        entries["max_position_embeddings"] = trained
        if config.max_seq_len != int(scaling.factor * trained):
            entries[LENGTH] = config.max_seq_len
    return {**entries, "rope_parameters": rope}


def _rope(entries: Mapping[str, Any], context: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling, which the newer and the older entry must not tell differently."""
    blocks = {
        name: entries[name] for name in ("rope_parameters", "rope_scaling") if entries.get(name)
    }
    told = {name: _one_rope(block, entries, context) for name, block in blocks.items()}
    if not told:
        return _one_rope({}, entries, context)
    if len(set(told.values())) > 1:
        raise ValueError(f"config.json: rope_parameters, rope_scaling: two ropes, got {blocks}")
    return next(iter(told.values()))


def _one_rope(
    block: Mapping[str, Any], entries: Mapping[str, Any], context: int
) -> tuple[float, RopeScaling | None]:
    rope = dict(block)
    for name in ("rope_theta", "partial_rotary_factor", TRAINED):  # beside the block, or in it
        outside = entries.get(name)
        if outside is not None and rope.setdefault(name, outside) != outside:
            raise ValueError(f"config.json: {name}: {outside} beside {rope[name]}; which is it?")
    theta = float(rope.pop("rope_theta", None) or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "ntk":
        raise ValueError("config.json: rope_type: 'ntk' is a larger rope_theta in transformers")
    if kind == "dynamic" and rope.get(TRAINED, context) != context:
        raise ValueError(  # transformers stretches dynamically from max_position_embeddings
            f"config.json: {TRAINED}: expected max_position_embeddings={context} with dynamic "
            f"RoPE, got {rope[TRAINED]}"
        )
    if kind in ("dynamic", "yarn", "llama3") and not rope.get(TRAINED):
        rope[TRAINED] = context
    if kind == "yarn" and rope.get("factor", 0) is None:
        rope["factor"] = context / rope[TRAINED]
    scaling = RopeScaling.from_dict(rope)
    return theta, None if kind == "default" else scaling


def _parameters_of(scaling: RopeScaling) -> list[str]:
    """Those parameters that a type reads and that are not left to their default."""
    names = {
        "yarn": [TRAINED, "beta_fast", "beta_slow", "attention_factor", "truncate"],
        "llama3": [TRAINED, "low_freq_factor", "high_freq_factor"],
    }.get(scaling.rope_type, [])
    left_out = {"attention_factor": None, "truncate": True}
    return [name for name in names if getattr(scaling, name) != left_out.get(name, ...)]
