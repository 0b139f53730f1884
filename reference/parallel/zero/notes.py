"""What a layer saves for backward must not keep gathered parameters alive: notes in their place.

A note says how to make a saved view again ("rows 10 to 20 of parameter 3 of unit 2"). The first
note that backward reads brings the unit back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reference.parallel.zero.unit import Unit


class Note(NamedTuple):
    """In place of a saved view of a whole parameter: how to make it again."""

    unit: Unit
    base: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt
    version: tuple[int, ...]

    def read(self) -> Tensor:
        """The view. Raises: RuntimeError after an optimizer's step, for values that are gone."""
        if self.version != self.unit.version:
            raise RuntimeError(
                f"{self.unit.label}: its parameters have changed since the forward of "
                "which this is the backward; call backward before the optimizer's step"
            )
        whole = self.unit.unshard()[self.base]
        return whole.as_strided(self.shape, self.stride, self.offset)


@contextmanager
def saved_as_notes(unit: Unit) -> Iterator[None]:
    """Inside, what is saved for backward and is a view of a whole parameter is noted down.

    The rest goes to the hooks that were there before, such as those of a checkpoint.
    """
    others = torch._C._autograd._top_saved_tensors_default_hooks(True)
    version = unit.version

    def pack(tensor: Tensor) -> Any:
        base = unit.base_of(tensor)
        if base is not None:
            return Note(unit, base, tensor.shape, tensor.stride(), tensor.storage_offset(), version)
        return others[0](tensor) if others else tensor

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, Note):
            return saved.read()
        return others[1](saved) if others else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
