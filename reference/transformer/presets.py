"""The configurations of every published Llama 1, 2, 3, 3.1, 3.2 and SmolLM2.

Letters and papers: see reference.transformer.config.
"""

from dataclasses import replace

from reference.positions import RopeScaling
from reference.transformer.config import LlamaConfig


def _llama1(dim: int, hidden_dim: int, num_layers: int, num_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        dim=dim,
        hidden_dim=hidden_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        norm_eps=1e-6,
    )


def _twice_as_long(config: LlamaConfig) -> LlamaConfig:
    """Llama 2: the shapes of Llama 1 (grouped heads in the 70B alone), a context of 4,096."""
    return replace(config, max_seq_len=4096, norm_eps=1e-5)


def _llama3(dim: int, hidden_dim: int, num_layers: int, num_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        dim=dim,
        hidden_dim=hidden_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        max_seq_len=8192,
        rope_theta=500000.0,
    )


def _longer(config: LlamaConfig, factor: float = 8.0) -> LlamaConfig:
    """Llama 3's context of 8,192 stretched to 128k, that is 2^17 = 131,072 tokens."""
    scaling = RopeScaling("llama3", factor, config.max_seq_len)
    return replace(config, max_seq_len=131072, rope_scaling=scaling)


def _small(config: LlamaConfig) -> LlamaConfig:
    return replace(_longer(config, factor=32.0), is_tied=True)


def _smollm2(
    dim: int, hidden_dim: int, num_layers: int, num_heads: int, num_kv_heads: int, theta: float
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49152,
        dim=dim,
        hidden_dim=hidden_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        max_seq_len=8192,
        rope_theta=theta,
        is_tied=True,
    )


_LLAMA_1_7B = _llama1(4096, 11008, 32, 32)
_LLAMA_1_13B = _llama1(5120, 13824, 40, 40)
_LLAMA_1_65B = replace(_llama1(8192, 22016, 80, 64), norm_eps=1e-5)
_LLAMA_3_8B = _llama3(4096, 14336, 32, 32)
_LLAMA_3_70B = _llama3(8192, 28672, 80, 64)

PRESETS: dict[str, LlamaConfig] = {
    "llama-1-7b": _LLAMA_1_7B,
    "llama-1-13b": _LLAMA_1_13B,
    "llama-1-33b": _llama1(6656, 17920, 60, 52),
    "llama-1-65b": _LLAMA_1_65B,
    "llama-2-7b": _twice_as_long(_LLAMA_1_7B),
    "llama-2-13b": _twice_as_long(_LLAMA_1_13B),
    "llama-2-70b": _twice_as_long(replace(_LLAMA_1_65B, hidden_dim=28672, num_kv_heads=8)),
    "llama-3-8b": _LLAMA_3_8B,
    "llama-3-70b": _LLAMA_3_70B,
    "llama-3.1-8b": _longer(_LLAMA_3_8B),
    "llama-3.1-70b": _longer(_LLAMA_3_70B),
    "llama-3.1-405b": _longer(_llama3(16384, 53248, 126, 128)),
    "llama-3.2-1b": _small(_llama3(2048, 8192, 16, 32)),
    "llama-3.2-3b": _small(_llama3(3072, 8192, 28, 24)),
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, 100000.0),
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5, 100000.0),
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, 130000.0),
}
