"""The growing cache: keys and values of each layer, joined to what came before.

A query asks once and is done with; keys and values are asked again by every later token. So K and
V are kept and Q is not. Keys are kept as they were attended to, rotated at their own positions,
and never rotated again.

    k_all = cat(k_all, k)        v_all = cat(v_all, v)        one pair a layer

Shapes: B batch, K key/value heads, T new tokens, S all tokens, d head width.
Source: incremental decoding, Shazeer, arXiv 1911.02150, sec. 2.4.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

Keys = Shaped[Tensor, "B K S d"]


@runtime_checkable
class ColumnedCache(Protocol):
    """A cache that says at which column of the padded batch each key stands that it will return."""

    def key_columns(self, num_new: int) -> Int[Tensor, " S"]:
        """The columns of the keys that the next update with `num_new` tokens gives back."""
        ...


class DynamicCache:
    """Grows by concatenation; the signature is that of transformers' DynamicCache.

    Each update copies all that is held: simple, and quadratic in traffic over a long text, though
    still far below the model's own. Tensors keep their dtype and device.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(
        self, k: Shaped[Tensor, "B K T d"], v: Shaped[Tensor, "B K T d"], layer: int
    ) -> tuple[Keys, Keys]:
        """Append to a layer and return all of it.

        Raises: ValueError for a layer out of order or shapes that do not fit what is held.
        """
        check_layer(layer, len(self.keys))
        if layer == len(self.keys):
            check_new(k, v, None)
            self.keys.append(k)
            self.values.append(v)
        else:
            check_new(k, v, self.keys[layer])
            self.keys[layer] = torch.cat((self.keys[layer], k), 2)
            self.values[layer] = torch.cat((self.values[layer], v), 2)
        return self.keys[layer], self.values[layer]

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.keys[0].shape[2] if self.keys else 0

    def crop(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens`.

        Raises: ValueError for more than are held, or fewer than none.
        """
        if not 0 <= num_tokens <= self.get_seq_length():
            raise ValueError(
                f"num_tokens: expected 0 to {self.get_seq_length()} (those held), got {num_tokens}"
            )
        self.keys = [k[:, :, :num_tokens] for k in self.keys]
        self.values = [v[:, :, :num_tokens] for v in self.values]

    def select(self, rows: Int[Tensor, " N"]) -> None:
        """Keep these rows of the batch, in this order; a row may come twice (beams, samples)."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.nbytes for t in (*self.keys, *self.values))


def check_layer(layer: int, num_layers: int) -> None:
    """Layers come in order: the next one is new, all before it are known."""
    if not 0 <= layer <= num_layers:
        raise ValueError(
            f"layer: expected 0 to {num_layers}, got {layer}; layers are filled in order"
        )


def check_new(k: Tensor, v: Tensor, held: Tensor | None) -> None:
    """Refuse keys and values that do not fit each other or what is held."""
    if k.ndim != 4:
        raise ValueError(f"k: expected (batch, kv_heads, tokens, head_dim), got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected shape {tuple(k.shape)} as k, got {tuple(v.shape)}")
    if held is None:
        return
    expected = (*held.shape[:2], "T", held.shape[3])
    if k.shape[:2] != held.shape[:2] or k.shape[3] != held.shape[3]:
        raise ValueError(
            f"k: expected shape {expected} as the cache, got {tuple(k.shape)}; "
            "a cache serves one batch, begin a new one for another"
        )
    if k.dtype != held.dtype:
        raise TypeError(f"k: expected {held.dtype} as the cache, got {k.dtype}; cast one of them")
