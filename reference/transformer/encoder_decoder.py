"""The transformer of 2017: an encoder reads the source, a decoder writes and looks across.

    encoder layer   x = norm(x + attention(x, x));           x = norm(x + feed_forward(x))
    decoder layer   y = norm(y + attention(y, earlier y));   y = norm(y + attention(y, encoder));
                    y = norm(y + feed_forward(y))

Everything after kept three of its parts: attention, the position-wise feed-forward layer, the
residual stream. A decoder-only model is the right half without the look across; what else Llama
changed is the norm and its place, the activation, the positions and the biases.

Shapes: B batch, S source tokens, T target tokens, D model width, V vocabulary.
Paper: Attention is all you need, 1706.03762, fig. 1 and sec. 3.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference.attention import Attention, causal_mask
from reference.normalization import LayerNorm, PostNorm
from reference.positions import sinusoidal_positions


class EncoderLayer(nn.Module):
    """Self-attention, then a feed-forward layer. Source: arXiv 1706.03762, sec. 3.1."""

    def __init__(self, dim: int, hidden_dim: int, num_heads: int) -> None:
        super().__init__()
        self.self_attention = PostNorm(_attention(dim, num_heads), LayerNorm(dim))
        self.feed_forward = PostNorm(_feed_forward(dim, hidden_dim), LayerNorm(dim))

    def forward(
        self, x: Float[Tensor, "B S D"], mask: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "B S D"]:
        return self.feed_forward(self.self_attention(x, mask))


class DecoderLayer(nn.Module):
    """Self-attention, attention across to the encoder's output, a feed-forward layer.

    Source: arXiv 1706.03762, sec. 3.1 and 3.2.3.
    """

    def __init__(self, dim: int, hidden_dim: int, num_heads: int) -> None:
        super().__init__()
        self.self_attention = PostNorm(_attention(dim, num_heads), LayerNorm(dim))
        self.cross_attention = PostNorm(_attention(dim, num_heads), LayerNorm(dim))
        self.feed_forward = PostNorm(_feed_forward(dim, hidden_dim), LayerNorm(dim))

    def forward(
        self,
        y: Float[Tensor, "B T D"],
        memory: Float[Tensor, "B S D"],
        mask: Bool[Tensor, "..."] | None = None,
        memory_mask: Bool[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "B T D"]:
        y = self.self_attention(y, mask)
        return self.feed_forward(self.cross_attention(y, memory_mask, context=memory))


class EncoderDecoder(nn.Module):
    """The whole model, without dropout; sizes by default those of the paper's base model.

    One matrix embeds source and target and is the head as well; embeddings are multiplied by
    sqrt(D), and sinusoids are added.

    Source: arXiv 1706.03762, fig. 1, sec. 3.4 and table 3.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        dim: int = 512,
        hidden_dim: int = 2048,
        num_heads: int = 8,
        num_layers: int = 6,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        sizes = (dim, hidden_dim, num_heads)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(num_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(num_layers))

    def forward(
        self,
        source: Int[Tensor, "B S"],
        target: Int[Tensor, "B T"],
        source_is_real: Bool[Tensor, "B S"] | None = None,
        target_is_real: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits for the token after each target token. `..._is_real` is False for padding.

        Raises: ValueError for empty texts, different batches, or masks of another shape.
        """
        _check(source, target, source_is_real, target_is_real)
        memory = self.encode(source, source_is_real)
        y = self.decode(target, memory, source_is_real, target_is_real)
        return F.linear(y, self.embedding.weight)

    def encode(
        self, source: Int[Tensor, "B S"], is_real: Bool[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S D"]:
        """The source as the decoder sees it: computed once for a whole translation."""
        x, mask = self._embed(source), _of_keys(is_real)
        for layer in self.encoder:
            x = layer(x, mask)
        return x

    def decode(
        self,
        target: Int[Tensor, "B T"],
        memory: Float[Tensor, "B S D"],
        source_is_real: Bool[Tensor, "B S"] | None = None,
        target_is_real: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The decoder's last layer, before the head."""
        mask = causal_mask(target.shape[1], device=target.device)
        if target_is_real is not None:
            mask = mask & target_is_real[:, None, None, :]
        y, memory_mask = self._embed(target), _of_keys(source_is_real)
        for layer in self.decoder:
            y = layer(y, memory, mask, memory_mask)
        return y

    def _embed(self, tokens: Tensor) -> Tensor:
        dim = self.embedding.embedding_dim
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) * math.sqrt(dim)
        return x + sinusoidal_positions(positions, dim).to(x.dtype)


def _attention(dim: int, num_heads: int) -> Attention:
    return Attention(dim, num_heads=num_heads, bias=True)


def _feed_forward(dim: int, hidden_dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))


def _of_keys(is_real: Tensor | None) -> Tensor | None:
    """A mask over keys, for all heads and queries."""
    return None if is_real is None else is_real[:, None, None, :]


def _check(source: Tensor, target: Tensor, *are_real: Tensor | None) -> None:
    texts = {"source": source, "target": target}
    for (name, text), is_real in zip(texts.items(), are_real, strict=True):
        if text.ndim != 2 or text.shape[1] == 0:
            raise ValueError(
                f"{name}: expected (B, length) with at least one token, got {tuple(text.shape)}"
            )
        if is_real is not None and is_real.shape != text.shape:
            raise ValueError(
                f"{name}_is_real: expected shape {tuple(text.shape)}, got {tuple(is_real.shape)}"
            )
    if len(source) != len(target):
        raise ValueError(
            f"target: expected a batch of {len(source)} as the source, got {len(target)}"
        )
