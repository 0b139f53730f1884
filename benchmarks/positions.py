"""RoPE beside transformers' apply_rotary_pos_emb: prefill and decode, forward and backward.

Queries and keys of SmolLM2 (9 and 3 heads of 64) and of Llama 3 8B (32 and 8 heads of 128). "table"
also makes the tables of cosines, which a model does once a forward pass.
"""

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from benchmarks.measure import Row, compare
from reference.positions import rope_frequencies, rope_table, rotation

MODELS = {"SmolLM2": (9, 3, 64), "Llama 3 8B": (32, 8, 128)}
LENGTHS = {"prefill": (1, 512), "decode": (8, 1)}


def rows() -> list[Row]:
    measured = []
    for model, heads in MODELS.items():
        for phase, (batch, seq_len) in LENGTHS.items():
            for dtype in (torch.float32, torch.bfloat16):
                name = f"{model}, {phase}, {str(dtype).removeprefix('torch.')}"
                measured += _rotate(name, heads, batch, seq_len, dtype)
    return measured + _table()


def _rotate(
    name: str, heads: tuple[int, int, int], batch: int, seq_len: int, dtype: torch.dtype
) -> list[Row]:
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(batch, h, seq_len, head_dim, generator=generator).to(dtype).requires_grad_()
        for h in (num_heads, num_kv_heads)
    )
    cos, sin = rope_table(torch.arange(seq_len), rope_frequencies(head_dim), dtype=dtype)
    rotate = rotation(cos, sin)

    def ours() -> Tensor:
        return torch.cat((rotate(q), rotate(k)), 1)

    def theirs() -> Tensor:
        return torch.cat(apply_rotary_pos_emb(q, k, cos[None], sin[None]), 1)

    return compare(name, ours, theirs, (q, k) if seq_len > 1 else ())


def _table() -> list[Row]:
    positions = torch.arange(512)
    config = LlamaConfig(hidden_size=128, num_attention_heads=2)
    embedding, x = LlamaRotaryEmbedding(config), torch.zeros(1)
    frequencies = rope_frequencies(64)
    return compare(
        "table, 512 positions",
        lambda: torch.cat(rope_table(positions, frequencies), -1),
        lambda: torch.cat(embedding(x, positions[None]), -1),
    )
