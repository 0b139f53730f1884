"""Prefix tuning, prompt tuning, P-tuning: train what the model reads, not what it is.

    prompt tuning   p vectors (p, D) stand before the embeddings of the text
    P-tuning        the same, made by a small network from p embeddings: easier to train
    prefix tuning   p keys and p values a layer stand before those of the text: no queries, no
                    positions of their own to compute

All take p places of the context, and none can be merged into the weights.

Letters: p prefix tokens, L layers, K key/value heads, d head width, D model width.
Papers: prefix tuning, 2101.00190, sec. 4; prompt tuning, 2104.08691; P-tuning, 2103.10385, sec. 3.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reference.transformer import Llama


class PrefixCache:
    """A key/value cache whose first p tokens are given, and which keeps nothing more."""

    def __init__(self, keys: Float[Tensor, "L K p d"], values: Float[Tensor, "L K p d"]) -> None:
        self.keys, self.values = keys, values

    def get_seq_length(self) -> int:
        """The p tokens: those of the text have positions from p on."""
        return self.keys.shape[2]

    def update(self, k: Tensor, v: Tensor, layer: int, /) -> tuple[Tensor, Tensor]:
        """The prefix of this layer, for each row, and the new tokens after it."""
        rows = (k.shape[0], -1, -1, -1)
        prefix_k, prefix_v = self.keys[layer].expand(rows), self.values[layer].expand(rows)
        return torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)


class PrefixTuning(nn.Module):
    """A frozen Llama that reads p trained keys and values first, in every layer.

    `encoder_width` reparametrises: the prefix is the output of embedding, linear, tanh, linear,
    which the paper found more stable; `keys_and_values` may be stored and the network dropped.

    Raises: ValueError for fewer than 1 token or more than the context.
    Source: arXiv 2101.00190, sec. 4.3.
    """

    def __init__(self, model: Llama, num_tokens: int, encoder_width: int | None = None) -> None:
        super().__init__()
        _check_length(model, num_tokens)
        config = model.config
        width = config.num_layers * 2 * config.num_kv_heads * config.head_dim
        self.model = model.requires_grad_(False)
        self.embedding = nn.Embedding(num_tokens, width if encoder_width is None else config.dim)
        self.encoder = (
            nn.Identity()
            if encoder_width is None
            else nn.Sequential(
                nn.Linear(config.dim, encoder_width), nn.Tanh(), nn.Linear(encoder_width, width)
            )
        )

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Both (L, K, p, d)."""
        config = self.model.config
        flat: Tensor = self.encoder(self.embedding.weight)
        shape = (-1, config.num_layers, 2, config.num_kv_heads, config.head_dim)
        both = flat.view(shape).permute(1, 2, 3, 0, 4)
        return both[:, 0], both[:, 1]

    def forward(self, tokens: Int[Tensor, "B T"], **kwargs: Any) -> Float[Tensor, "B T V"]:
        return self.model(tokens, cache=PrefixCache(*self.keys_and_values()), **kwargs)


class PromptTuning(nn.Module):
    """A frozen Llama that reads p trained vectors before the embedded text.

    `encoder`: "mlp" or "lstm" makes it P-tuning, whose vectors come out of a small network.
    `initial_tokens` starts from the embeddings of a text, as the prompt tuning paper advises.

    Raises: ValueError for fewer than 1 token, more than the context, or another encoder.
    Source: arXiv 2104.08691, sec. 2; P-tuning: arXiv 2103.10385, sec. 3.
    """

    def __init__(
        self,
        model: Llama,
        num_tokens: int,
        *,
        encoder: Literal["mlp", "lstm"] | None = None,
        encoder_width: int = 128,
        initial_tokens: Int[Tensor, " p"] | None = None,
    ) -> None:
        super().__init__()
        _check_length(model, num_tokens)
        self.model = model.requires_grad_(False)
        self.embedding = nn.Embedding(num_tokens, model.config.dim)
        if initial_tokens is not None:
            if initial_tokens.shape != (num_tokens,):
                raise ValueError(
                    f"initial_tokens: expected shape ({num_tokens},), got "
                    f"{tuple(initial_tokens.shape)}"
                )
            with torch.no_grad():
                self.embedding.weight.copy_(model.embed_tokens(initial_tokens))
        self.encoder = _prompt_encoder(encoder, model.config.dim, encoder_width)

    def prompt(self) -> Float[Tensor, "p D"]:
        """The vectors that stand before the text."""
        vectors: Tensor = self.encoder(self.embedding.weight)
        return vectors

    def forward(self, tokens: Int[Tensor, "B T"], **kwargs: Any) -> Float[Tensor, "B T V"]:
        """Logits of the text's tokens; the prompt's are cut off."""
        prompt = self.prompt()
        room = tokens.new_zeros(tokens.shape[0], prompt.shape[0])

        def stand_before(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
            rows = prompt.to(embedded.dtype).expand(embedded.shape[0], -1, -1)
            return torch.cat([rows, embedded[:, prompt.shape[0] :]], 1)

        handle = self.model.embed_tokens.register_forward_hook(stand_before)
        try:
            logits = self.model(torch.cat([room, tokens], 1), **kwargs)
        finally:
            handle.remove()
        return logits[:, -tokens.shape[1] :]


class _LSTMEncoder(nn.Module):
    """A bidirectional LSTM of two layers over the prompt, then two linear ones."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dim, width, num_layers=2, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, dim)
        )

    def forward(self, x: Float[Tensor, "p D"]) -> Float[Tensor, "p D"]:
        vectors: Tensor = self.mlp(self.lstm(x[None])[0])[0]
        return vectors


def _prompt_encoder(kind: str | None, dim: int, width: int) -> nn.Module:
    if kind is None:
        return nn.Identity()
    if kind == "lstm":
        return _LSTMEncoder(dim, width)
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, dim),
        )  # fmt: skip
    raise ValueError(f"encoder: expected 'mlp', 'lstm' or None, got {kind!r}")


def _check_length(model: Llama, num_tokens: int) -> None:
    if not 1 <= num_tokens < model.config.max_seq_len:
        raise ValueError(
            f"num_tokens: expected 1 to {model.config.max_seq_len - 1}, the context less one token "
            f"of text; got {num_tokens}"
        )
