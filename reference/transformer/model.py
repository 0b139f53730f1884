"""Llama: earlier chapters' parts, twice in each block, stacked.

    x = embedding[tokens]
    x = x + attention(norm(x), rotated by position)          in each of L blocks
    x = x + swiglu(norm(x))
    logits = norm(x) head^T                                  head = embedding where tied

`Llama(config)(tokens)` gives logits for the next token at every position. `cache=` holds the keys
and values of earlier tokens, so that the next call brings the new ones alone; positions go on where
the cache ends. `attend=` is the kernel, `mask=` who sees whom beside the causal rule. Parameters
are named as in checkpoints; reference.transformer.checkpoint reads and writes them.

Shapes: B batch, T tokens, S keys (cached and new), D model width, V vocabulary, d head width.
Papers: Llama, 2302.13971, sec. 2.2; Llama 2, 2307.09288, sec. 2.2; RMSNorm, SwiGLU, RoPE and GQA in
their chapters.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from reference.activations import SwiGLU
from reference.attention import (
    Attention,
    KVCache,
    causal_mask,
    scaled_dot_product_attention,
)
from reference.attention.dot_product import Mask
from reference.attention.layer import Attend
from reference.normalization import RMSNorm
from reference.positions import attention_factor, rope_frequencies, rope_table, rotation
from reference.transformer.config import LlamaConfig
from reference.transformer.token_ids import check_token_ids, has_values


@runtime_checkable
class SequenceCache(KVCache, Protocol):
    """A cache that knows how many tokens it holds; transformers' DynamicCache is one."""

    def get_seq_length(self) -> int:
        """Tokens that every layer holds: the position of the next one."""
        ...


class Block(nn.Module):
    """One layer of Llama: attention, then SwiGLU, each on a normalised copy of the stream.

    Source: Llama, arXiv 2302.13971, sec. 2.2.
    """

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(
            config.dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            layer=layer,
        )
        self.post_attention_layernorm = RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.hidden_dim)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        mask: Mask | None,
        *,
        rotate: Callable[[Tensor], Tensor],
        cache: KVCache | None = None,
        attend: Attend = scaled_dot_product_attention,
    ) -> Float[Tensor, "B T D"]:
        x = x + self.self_attn(
            self.input_layernorm(x), mask, rotate=rotate, cache=cache, attend=attend
        )
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A decoder-only language model; parameters named as in checkpoints, less the prefix `model.`.

    Fresh matrices are normal with the configuration's `initializer_std`; under
    `torch.device("meta")` no memory is taken, which counts the parameters of any size.

    Source: Llama, arXiv 2302.13971, sec. 2.2; Llama 2, 2307.09288, sec. 2.2.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = (
            None if config.is_tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        )
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.initializer_std)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "..."] | None = None,
        cache: KVCache | None = None,
        *,
        mask: Mask | None = None,
        attend: Attend = scaled_dot_product_attention,
        num_logits: int | None = None,
    ) -> Float[Tensor, "B N V"]:
        """Logits for the token after each of `tokens`, or after the last `num_logits` alone.

        `positions`, (T,) or (B, T), go on from the cache by default. `mask` replaces the causal
        one, (T, S): for padded texts pass `causal_mask(T, S) & padding_mask(lengths, S)`, with
        positions that count real tokens where the padding is at the left. The logits have the
        parameters' dtype.

        Raises: TypeError for tokens that are no whole numbers; ValueError for an empty prompt, ids
        outside the vocabulary, positions beyond the context, a cache of unknown length, or
        num_logits below 1.
        """
        self._check_tokens(tokens)
        if num_logits is not None and num_logits < 1:
            raise ValueError(f"num_logits: expected at least 1, got {num_logits}; None gives all")
        new = tokens.shape[1]
        past = _cached_tokens(cache)
        if positions is None:
            positions = torch.arange(past, past + new, device=tokens.device)
        seq_len = self._check_positions(positions, tokens, past + new)
        if mask is None and new > 1:  # the last token sees all keys
            mask = causal_mask(new, past + new, device=tokens.device)
        x = self.embed_tokens(tokens)
        rotate = self._rotation(positions, x.dtype, seq_len)
        for layer in self.layers:
            x = layer(x, mask, rotate=rotate, cache=cache, attend=attend)
        return self.logits(x if num_logits is None else x[:, -num_logits:])

    def logits(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """The last norm and the head."""
        x = self.norm(x)
        return F.linear(x, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)

    def _rotation(
        self, positions: Tensor, dtype: torch.dtype, seq_len: int
    ) -> Callable[[Tensor], Tensor]:
        """RoPE at these positions, for q and k of every layer alike."""
        config = self.config
        frequencies = rope_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling, seq_len=seq_len
        )
        factor = attention_factor(config.rope_scaling)
        cos, sin = rope_table(positions, frequencies, attention_factor=factor, dtype=dtype)
        return rotation(cos, sin)

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(
                f"tokens: expected (B, T) with at least one token, got {tuple(tokens.shape)}; "
                "an empty prompt begins with the tokenizer's first special token"
            )
        check_token_ids("tokens", tokens, self.config.vocab_size)

    def _check_positions(self, positions: Tensor, tokens: Tensor, num_keys: int) -> int:
        """The length of the text so far: the last position and one."""
        if positions.shape not in (tokens.shape[1:], tokens.shape):
            expected = f"{tuple(tokens.shape[1:])} or {tuple(tokens.shape)}"
            raise ValueError(f"positions: expected {expected}, got {tuple(positions.shape)}")
        limit = self.config.max_seq_len
        is_known = has_values(positions) and positions.numel()
        low, high = map(int, positions.aminmax()) if is_known else (0, num_keys - 1)
        if low < 0 or high >= limit:
            raise ValueError(
                f"positions: expected 0 ... {limit - 1} in a context of {limit} tokens, got {low} "
                f"... {high}; cut the text, or stretch the context by rope_scaling, max_seq_len"
            )
        return high + 1


def _cached_tokens(cache: KVCache | None) -> int:
    if cache is None:
        return 0
    if isinstance(cache, SequenceCache):
        return int(cache.get_seq_length())
    raise ValueError("cache: expected get_seq_length() beside update(), to know where it ends")
