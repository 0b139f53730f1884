"""The static cache: room for the longest text from the start, filled from the left.

    buffer[:, :, n : n + T] = k        return buffer[:, :, : n + T]

Nothing is copied when a token comes, and addresses stay, which compiled graphs need. The price is
memory: room for `max_len` tokens a sequence, whether they come or not. Rows that were never
written hold zeros, and a zero key is a key: its score is 0, not -inf, so that the softmax would
give it weight. Only the written part is returned.

Shapes: B batch, K key/value heads, T new tokens, S all tokens, d head width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from reference.kv_cache.dynamic import Keys, check_layer, check_new


class StaticCache:
    """Buffers of `max_len` tokens, made at the first update in its dtype and on its device.

    What update returns are views of the buffers: read them before the next update.

    Raises: ValueError for max_len below 1.
    """

    def __init__(self, max_len: int) -> None:
        if max_len < 1:
            raise ValueError(f"max_len: expected at least 1, got {max_len}")
        self.max_len = max_len
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._lengths: list[int] = []

    def update(
        self, k: Float[Tensor, "B K T d"], v: Float[Tensor, "B K T d"], layer: int
    ) -> tuple[Keys, Keys]:
        """Write behind what a layer holds and return the written part.

        Raises: ValueError for a layer out of order, shapes that do not fit, or a full cache.
        """
        check_layer(layer, len(self.keys))
        if layer == len(self.keys):
            check_new(k, v, None)
            shape = (*k.shape[:2], self.max_len, k.shape[3])
            self.keys.append(torch.zeros(shape, dtype=k.dtype, device=k.device))
            self.values.append(torch.zeros(shape, dtype=v.dtype, device=v.device))
            self._lengths.append(0)
        check_new(k, v, self.keys[layer])
        start, end = self._lengths[layer], self._lengths[layer] + k.shape[2]
        if end > self.max_len:
            raise ValueError(
                f"k: expected at most {self.max_len - start} more tokens, got {k.shape[2]}; "
                f"the cache holds {start} of max_len={self.max_len}"
            )
        self.keys[layer][:, :, start:end] = k
        self.values[layer][:, :, start:end] = v
        self._lengths[layer] = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens held; the room for more does not count."""
        return self._lengths[0] if self._lengths else 0

    def reset(self) -> None:
        """Forget all tokens and keep the buffers."""
        self._lengths = [0] * len(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, full or not."""
        return sum(t.nbytes for t in (*self.keys, *self.values))
