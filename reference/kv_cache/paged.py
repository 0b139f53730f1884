"""The paged cache: pools of blocks for all sequences, and views of them for one batch.

Token t of a sequence lies in slot t mod block_size of block table[t // block_size], in every layer
alike. A batch writes its new keys to their slots and gathers what its tables name; rows that are
shorter than the longest get keys that are not theirs behind their own, which the mask hides. A
kernel that reads the blocks where they lie needs no gathering (reference.flash_attention's
paged_attention, on `tables` and `lengths`).

Shapes: L layers, N blocks, K key/value heads, d head width, B batch, T new tokens, S longest, M
columns of the table.
Source: PagedAttention, vLLM, arXiv 2309.06180, sec. 4.1.
"""

from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reference.kv_cache.blocks import BlockManager
from reference.kv_cache.dynamic import Keys, check_new


class PagedCache:
    """Pools of (L, N, block_size, K, d) for keys and values; `blocks` says who owns which."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.blocks = blocks
        shape = (num_layers, blocks.num_blocks, blocks.block_size, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to) in all layers, as copy-on-write asks for."""
        for source, target in copies:
            self.keys[:, target] = self.keys[:, source]
            self.values[:, target] = self.values[:, source]

    def batch(self, names: Sequence[Hashable], num_new: int) -> "PagedBatch":
        """These sequences as a cache; the last `num_new` tokens of each are yet to be written.

        Raises: KeyError for an unknown name; ValueError for none, or with fewer tokens than new.
        """
        return PagedBatch(self, names, num_new)

    @property
    def nbytes(self) -> int:
        """Bytes of the pools."""
        return self.keys.nbytes + self.values.nbytes


class PagedBatch:
    """One call's view of a paged cache: give it to the model with its `positions` and `mask`."""

    def __init__(self, cache: PagedCache, names: Sequence[Hashable], num_new: int) -> None:
        if not names:
            raise ValueError("names: expected at least one sequence, got none")
        blocks, device = cache.blocks, cache.keys.device
        lengths = [blocks.lengths[name] for name in names]
        if not 1 <= num_new <= min(lengths):
            raise ValueError(f"num_new: expected 1 to {min(lengths)} (tokens held), got {num_new}")
        self.cache, self.num_new, self.longest = cache, num_new, max(lengths)
        width = blocks.blocks_for(self.longest)
        rows = [blocks.tables[name] for name in names]
        padded = [row + [0] * (width - len(row)) for row in rows]
        self.tables: Int[Tensor, "B M"] = torch.tensor(padded, device=device)
        self.lengths: Int[Tensor, " B"] = torch.tensor(lengths, device=device)
        new = torch.arange(num_new, device=device)
        self.positions: Int[Tensor, "B T"] = (self.lengths - num_new)[:, None] + new
        block = self.tables.gather(1, self.positions // blocks.block_size)
        self._slots = block * blocks.block_size + self.positions % blocks.block_size

    @property
    def mask(self) -> Bool[Tensor, "B 1 T S"]:
        """A query sees its own sequence up to its own position."""
        keys = torch.arange(self.longest, device=self.positions.device)
        return (keys <= self.positions[:, :, None])[:, None]

    def update(
        self, k: Float[Tensor, "B K T d"], v: Float[Tensor, "B K T d"], layer: int
    ) -> tuple[Keys, Keys]:
        """Write the new tokens to their slots and gather each sequence's keys and values.

        Raises: ValueError for shapes that do not fit the batch.
        """
        check_new(k, v, None)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        expected = (len(self.lengths), keys.shape[2], self.num_new, keys.shape[3])
        if k.shape != expected:
            raise ValueError(f"k: expected shape {expected}, got {tuple(k.shape)}")
        keys.flatten(0, 1)[self._slots] = k.transpose(1, 2)
        values.flatten(0, 1)[self._slots] = v.transpose(1, 2)
        return self._gather(keys), self._gather(values)

    def get_seq_length(self) -> int:
        """Tokens of the longest sequence before this call."""
        return self.longest - self.num_new

    def _gather(self, pool: Float[Tensor, "N block K d"]) -> Keys:
        found = pool[self.tables].flatten(1, 2)  # (B, M * block, K, d)
        return found[:, : self.longest].transpose(1, 2)
