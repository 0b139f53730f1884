"""The rolling cache: where attention looks back `window` tokens, older ones need not be kept.

The token at position p is written to slot p mod window, over the one that has just left the
window. The slots are then out of order, and nobody minds: a key carries its position in its
rotation, and a softmax does not care for the order of its terms.

Shapes: B batch, K key/value heads, T new tokens, W window, S keys returned, d head width.
Source: Mistral 7B, arXiv 2310.06825, sec. 2 (sliding window attention, rolling buffer cache).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reference.kv_cache.dynamic import Keys, check_layer, check_new


def slot_columns(num_tokens: int, window: int) -> Int[Tensor, " S"]:
    """Which position each slot holds after `num_tokens`; slots that are empty are left out.

    Raises: ValueError for a window below 1 or a negative count.
    """
    if window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    if num_tokens < 0:
        raise ValueError(f"num_tokens: expected at least 0, got {num_tokens}")
    slots = torch.arange(min(num_tokens, window))
    return num_tokens - 1 - (num_tokens - 1 - slots) % window


class RollingCache:
    """Keeps the last `window` tokens in a ring.

    One new token gets the ring itself, out of order; several get the last window - 1 keys in order
    and their own behind them. `key_columns` says which is which, for the mask: several new tokens
    do not all see the same keys.

    Raises: ValueError for a window below 1.
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        self.window = window
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._lengths: list[int] = []

    def update(
        self, k: Float[Tensor, "B K T d"], v: Float[Tensor, "B K T d"], layer: int
    ) -> tuple[Keys, Keys]:
        """Write into a layer's ring and return the keys and values that the new tokens may need.

        Raises: ValueError for a layer out of order or shapes that do not fit what is held.
        """
        check_layer(layer, len(self.keys))
        if layer == len(self.keys):
            check_new(k, v, None)
            self.keys.append(k.new_zeros(*k.shape[:2], self.window, k.shape[3]))
            self.values.append(torch.zeros_like(self.keys[layer]))
            self._lengths.append(0)
        check_new(k, v, self.keys[layer])
        past, new = self._lengths[layer], k.shape[2]
        self._lengths[layer] = past + new
        if new == 1:
            self._write(k, v, layer, past)
            held = min(past + 1, self.window)
            return self.keys[layer][:, :, :held], self.values[layer][:, :, :held]
        kept = self._kept(past).to(k.device) % self.window
        joined = (
            torch.cat((self.keys[layer][:, :, kept], k), 2),
            torch.cat((self.values[layer][:, :, kept], v), 2),
        )
        self._write(k, v, layer, past)
        return joined

    def key_columns(self, num_new: int) -> Int[Tensor, " S"]:
        """The position of each key that the next update with `num_new` tokens gives back."""
        past = self.get_seq_length()
        if num_new == 1:
            return slot_columns(past + 1, self.window)
        return torch.cat((self._kept(past), torch.arange(past, past + num_new)))

    def get_seq_length(self) -> int:
        """Tokens seen, those that have rolled out among them: the position of the next one."""
        return self._lengths[0] if self._lengths else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the rings."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def _kept(self, past: int) -> Tensor:
        """Positions of the older keys that a new token can see, in order."""
        return torch.arange(max(0, past - self.window + 1), past)

    def _write(self, k: Tensor, v: Tensor, layer: int, past: int) -> None:
        last = min(k.shape[2], self.window)  # what leaves the window at once is not written
        slots = torch.arange(past + k.shape[2] - last, past + k.shape[2]) % self.window
        slots = slots.to(k.device)
        self.keys[layer][:, :, slots] = k[:, :, k.shape[2] - last :]
        self.values[layer][:, :, slots] = v[:, :, k.shape[2] - last :]
