"""Parameters cut along their first dimension, and many of them in one message.

Each parameter is cut by itself: of R rows, every rank gets ceil(R / N) until none are left, as
torch.chunk does. A shard is therefore a smaller parameter, with the name, the dtype and the number
of dimensions of the whole. A collective wants equal parts, so shards are padded and laid end to end
in one row of a message, a row for each rank:

    rank 0   | wq rows 0-1 | wo rows 0-1 | norm 0-1 |
    rank 1   | wq rows 2-3 | wo rows 2-3 | norm 2 0 |        0 pads

A whole parameter lies across all rows of the message, so taking the message apart is a copy: the
price of keeping parameters apart, which a flat vector (flat.py) does not pay.

Source: per-parameter sharding of FSDP2, torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor


def rows_of(num_rows: int, world_size: int, rank: int) -> slice:
    """The rows of rank `rank`: torch.chunk's, and none where those have run out."""
    size = -(-num_rows // world_size)
    return slice(min(rank * size, num_rows), min((rank + 1) * size, num_rows))


@dataclass(frozen=True)
class RowLayout:
    """A message that holds tensors of these whole `shapes`, N rows of which each rank has one.

    It has the tensors' dtype where they all agree, and else their bytes (torch.uint8).

    Raises: ValueError for a tensor without dimensions, or a world below 1.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    world_size: int

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"world_size: expected at least 1, got {self.world_size}")
        for shape in self.shapes:
            if not shape:
                raise ValueError(
                    "parameters: expected at least one dimension to cut along, got a scalar; give "
                    "it the shape (1,)"
                )

    @property
    def is_bytes(self) -> bool:
        """Whether several dtypes share the message."""
        return len(set(self.dtypes)) > 1

    @property
    def row_numel(self) -> int:
        """Elements of the message that belong to one rank, padding included."""
        return sum(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        """Of each tensor's part in a row, in elements of the message."""
        return [
            self._most_rows(shape) * math.prod(shape[1:]) * (dtype.itemsize if self.is_bytes else 1)
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]

    def pack(self, shards: Sequence[Tensor]) -> Shaped[Tensor, " n"]:
        """One rank's row of the message, from its shards."""
        pieces = []
        for shard, size in zip(shards, self._sizes, strict=True):
            flat = self._as_message(shard)
            pieces.append(flat)
            if flat.numel() < size:
                pieces.append(flat.new_zeros(size - flat.numel()))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def spread(self, wholes: Sequence[Tensor]) -> Shaped[Tensor, " M"]:
        """The whole message, from whole tensors: what each rank is to get."""
        rows = []
        for whole, size in zip(wholes, self._sizes, strict=True):
            flat = self._as_message(whole)
            missing = size * self.world_size - flat.numel()
            padded = torch.cat([flat, flat.new_zeros(missing)]) if missing else flat
            rows.append(padded.view(self.world_size, size))
        return (rows[0] if len(rows) == 1 else torch.cat(rows, 1)).reshape(-1)

    def wholes(self, message: Shaped[Tensor, " M"]) -> list[Tensor]:
        """Whole tensors, from the whole message; views of it where that is possible."""
        parts = message.view(self.world_size, -1).split_with_sizes(self._sizes, 1)
        return [
            self._from_message(part.reshape(-1), dtype).view(
                self.world_size * self._most_rows(shape), *shape[1:]
            )[: shape[0]]
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]

    def shards(self, row: Shaped[Tensor, " n"], rank: int) -> list[Tensor]:
        """One rank's shards, from its row; views of it where that is possible."""
        found = []
        for part, shape, dtype in zip(
            row.split(self._sizes), self.shapes, self.dtypes, strict=True
        ):
            rows = rows_of(shape[0], self.world_size, rank)
            tensor = self._from_message(part, dtype).view(self._most_rows(shape), *shape[1:])
            found.append(tensor[: rows.stop - rows.start])
        return found

    def _most_rows(self, shape: tuple[int, ...]) -> int:
        return -(-shape[0] // self.world_size)

    def _as_message(self, tensor: Tensor) -> Tensor:
        flat = tensor.detach().reshape(-1)
        return flat.contiguous().view(torch.uint8) if self.is_bytes else flat

    def _from_message(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        return part.clone().view(dtype) if self.is_bytes else part
