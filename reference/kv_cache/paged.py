"""The paged cache: pools of blocks for all sequences, and views of them for one batch.

Token t of a sequence lies in slot t mod block_size of block table[t // block_size], in every layer
alike. A batch writes its new keys to their slots and gathers what its tables name; rows that are
shorter than the longest get some of their own keys again behind them, which the mask hides. A block
is cleared when its first slot is written: what an earlier owner left, NaN perhaps, reaches nobody,
not even through a kernel that multiplies it by 0. A
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

    def flat_batch(self, names: Sequence[Hashable], num_new: Sequence[int]) -> "FlatBatch":
        """The same for different numbers of new tokens, all in one row.

        Raises: as `batch`.
        """
        return FlatBatch(self, names, num_new)

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
        _check_new_tokens(num_new, min(lengths))
        self.cache, self.num_new, self.longest = cache, num_new, max(lengths)
        width = blocks.blocks_for(self.longest)
        rows = [blocks.tables[name] for name in names]
        padded = [row + row[-1:] * (width - len(row)) for row in rows]
        self.tables: Int[Tensor, "B M"] = torch.tensor(padded, device=device)
        self.lengths: Int[Tensor, " B"] = torch.tensor(lengths, device=device)
        new = torch.arange(num_new, device=device)
        self.positions: Int[Tensor, "B T"] = (self.lengths - num_new)[:, None] + new
        block = self.tables.gather(1, self.positions // blocks.block_size)
        slot = self.positions % blocks.block_size
        self._slots = block * blocks.block_size + slot
        self._begun = block[slot == 0]

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
        for pool, new in ((keys, k), (values, v)):
            if len(self._begun):
                pool[self._begun] = 0
            pool.flatten(0, 1)[self._slots] = new.transpose(1, 2)
        return self._gather(keys), self._gather(values)

    def get_seq_length(self) -> int:
        """Tokens of the longest sequence before this call."""
        return self.longest - self.num_new

    def _gather(self, pool: Float[Tensor, "N block K d"]) -> Keys:
        found = pool.index_select(0, self.tables.flatten())
        found = found.view(len(self.tables), -1, *pool.shape[2:])  # (B, M * block, K, d)
        return found[:, : self.longest].transpose(1, 2)


class FlatBatch:
    """New tokens of several sequences in one row, (1, N): prompts and single tokens in one pass.

    Everything but attention treats tokens alike, so that a row of N takes one read of the weights;
    in attention `mask` keeps the sequences apart. The last token of each sequence stands at the
    row's end, in the order of `names`: `num_logits=len(names)` gives their logits. `row` brings
    each sequence's new tokens into this order.

    Source: selective batching, Orca (OSDI 2022), sec. 3.2.
    """

    def __init__(
        self, cache: PagedCache, names: Sequence[Hashable], num_new: Sequence[int]
    ) -> None:
        if not names or len(names) != len(num_new):
            raise ValueError(
                f"num_new: expected a number for each of {len(names)} sequences, at least one, "
                f"got {len(num_new)}"
            )
        self.cache, self.device = cache, cache.keys.device
        held, owners, positions = [], [], []
        for i, name in enumerate(names):
            length = cache.blocks.lengths[name]
            _check_new_tokens(num_new[i], length)
            held.append(self._slots_of(name, length))
            owners.append(torch.full((length,), i, device=self.device))
            positions.append(torch.arange(length, device=self.device))
        self._held = torch.cat(held)
        new = [x[-n:] for x, n in zip(positions, num_new, strict=True)]
        self.positions: Int[Tensor, "1 N"] = self.row(new)
        asks = self.row([x[-n:] for x, n in zip(owners, num_new, strict=True)])
        is_own = torch.cat(owners) == asks.mT
        is_past = torch.cat(positions) <= self.positions.mT
        self.mask: Bool[Tensor, "1 1 N S"] = (is_own & is_past)[None, None]
        self._written = self.row([x[-n:] for x, n in zip(held, num_new, strict=True)])[0]
        size = cache.blocks.block_size
        self._begun = self._written[self._written % size == 0] // size

    def row(self, parts: Sequence[Int[Tensor, " _"]]) -> Int[Tensor, "1 N"]:
        """One entry for each new token of each sequence, as a row: last ones at the end."""
        return torch.cat([x[:-1] for x in parts] + [x[-1:] for x in parts])[None]

    def update(
        self, k: Float[Tensor, "1 K N d"], v: Float[Tensor, "1 K N d"], layer: int
    ) -> tuple[Keys, Keys]:
        """Write the new tokens to their slots; return the keys and values of all sequences."""
        check_new(k, v, None)
        found = []
        for pool, new in ((self.cache.keys[layer], k), (self.cache.values[layer], v)):
            pool[self._begun] = 0
            slots = pool.flatten(0, 1)  # (N * block, K, d)
            slots[self._written] = new[0].transpose(0, 1)
            found.append(slots[self._held].transpose(0, 1)[None])
        return found[0], found[1]

    def get_seq_length(self) -> int:
        """Keys of all sequences that were there before this call."""
        return len(self._held) - len(self._written)

    def _slots_of(self, name: Hashable, length: int) -> Tensor:
        size = self.cache.blocks.block_size
        first = torch.tensor(self.cache.blocks.tables[name], device=self.device) * size
        return (first[:, None] + torch.arange(size, device=self.device)).flatten()[:length]


def _check_new_tokens(num_new: int, held: int) -> None:
    if not 1 <= num_new <= held:
        raise ValueError(f"num_new: expected 1 to {held} (tokens held), got {num_new}")
