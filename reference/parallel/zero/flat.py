"""Many tensors as one vector, padded so that N ranks get equal parts of it.

A layer has matrices of all shapes; a collective wants one buffer that divides by N. So parameters
are laid end to end, zeros fill up the last part, and rank r owns elements [r n, (r+1) n):

    | wq      | wk  | wv  | wo      | norm | 0 0 |
    | rank 0      | rank 1      | rank 2         |

Where a tensor ends and where a rank's part ends have nothing to do with each other: elementwise
optimizers do not care.

Source: the FlatParameter of FSDP, arXiv 2304.11277, sec. 3.2.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor


@dataclass(frozen=True)
class FlatLayout:
    """Where each tensor lies in the vector, and each rank's part.

    `names` and `shapes` in order; `world_size` is the number of parts.

    Raises: ValueError for no tensors, names twice, or a world below 1.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    world_size: int

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"world_size: expected at least 1, got {self.world_size}")
        if not self.names or len(self.names) != len(self.shapes):
            raise ValueError(
                f"names, shapes: expected as many of each and at least one, got {len(self.names)} "
                f"and {len(self.shapes)}"
            )
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names: expected each once, got {self.names}")

    @property
    def numels(self) -> list[int]:
        """Elements of each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def numel(self) -> int:
        """Elements of all tensors, without padding."""
        return sum(self.numels)

    @property
    def shard_numel(self) -> int:
        """Elements of each rank's part, padding included."""
        return -(-self.numel // self.world_size)

    @property
    def padded_numel(self) -> int:
        """Elements of the vector: N equal parts."""
        return self.shard_numel * self.world_size

    def flatten(self, tensors: Iterable[Tensor]) -> Shaped[Tensor, " P"]:
        """Lay the tensors end to end, in a new vector with zeros at its end."""
        given = list(tensors)
        self.check(given)
        parts = [tensor.reshape(-1) for tensor in given]
        padding = self.padded_numel - self.numel
        return torch.cat(parts + [parts[0].new_zeros(padding)] if padding else parts)

    def views(self, flat: Shaped[Tensor, " P"]) -> list[Tensor]:
        """The tensors inside of the vector: no copy, and differentiable with one concatenation."""
        self.check_flat(flat, self.padded_numel)
        sizes = [*self.numels, self.padded_numel - self.numel]
        pieces = flat.split_with_sizes(sizes)
        return [piece.view(s) for piece, s in zip(pieces[:-1], self.shapes, strict=True)]

    def shard(self, flat: Shaped[Tensor, " P"], rank: int) -> Shaped[Tensor, " n"]:
        """Rank r's part of the vector: a view."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank: expected 0 to {self.world_size - 1}, got {rank}")
        self.check_flat(flat, self.padded_numel)
        return flat[rank * self.shard_numel : (rank + 1) * self.shard_numel]

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raises: ValueError where the tensors are not those of this layout."""
        found = tuple(tuple(tensor.shape) for tensor in tensors)
        if found != self.shapes:
            raise ValueError(f"tensors: expected shapes {self.shapes}, got {found}")

    def check_flat(self, flat: Tensor, numel: int) -> None:
        """Raises: ValueError for a vector of another length."""
        if tuple(flat.shape) != (numel,):
            raise ValueError(f"flat: expected shape ({numel},), got {tuple(flat.shape)}")


def layout_of(named: Iterable[tuple[str, Tensor]], world_size: int) -> FlatLayout:
    """The layout of named tensors, in their order."""
    pairs = list(named)
    return FlatLayout(
        tuple(name for name, _ in pairs), tuple(tuple(t.shape) for _, t in pairs), world_size
    )
