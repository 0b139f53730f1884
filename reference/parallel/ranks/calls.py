"""What a rank says when it communicates: which operation, in which group, with what, from where.

A `Call` is all that the rest of the package needs to know: collectives reads what it means, cost
what it sends and how long it takes, the doctor where it stands.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from reference.parallel.ranks.source import NOWHERE, Source, text


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with each other. `ranks` are global, in the order of the group.

    The same name and the same ranks are the same group.
    """

    name: str
    ranks: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.ranks)

    @cached_property
    def place(self) -> dict[int, int]:
        """Rank within the group of each global rank."""
        return {rank: i for i, rank in enumerate(self.ranks)}

    def __hash__(self) -> int:
        return hash((self.name, self.size, self.ranks[0], self.ranks[-1]))

    def __str__(self) -> str:
        return f"group {self.name!r}"


@dataclass(eq=False)
class Call:
    """One rank's part of one operation.

    `rank` is global; `root` (the source or destination) counts within the group. `tensor` is what
    the rank gives, `out` is where its result will be written; either may be missing. `sequence`
    numbers the collectives of a group, or the messages of a channel, on each rank. `what` names
    what the tensors are, where shapes alone would not tell one layer from another.
    """

    operation: str
    group: Group
    rank: int
    tensor: Any = None  # a Tensor, or of another process's its outline
    out: Any = None
    reduction: str | None = None
    root: int | None = None
    tag: int = 0
    input_splits: tuple[int, ...] | None = None
    output_splits: tuple[int, ...] | None = None
    value: Any = None
    what: str = ""
    source: Source = NOWHERE
    asked_by: Source = NOWHERE
    ready_seconds: float = 0.0
    sequence: int = 0

    @property
    def group_rank(self) -> int:
        return self.group.place[self.rank]

    @property
    def is_message(self) -> bool:
        return self.operation in ("send", "recv")

    @property
    def channel(self) -> tuple[int, int]:
        """Sender and receiver of a message, within the group."""
        assert self.root is not None
        here = self.group_rank
        return (here, self.root) if self.operation == "send" else (self.root, here)

    @property
    def compared(self) -> Any:
        """The tensor that must look alike on all ranks."""
        return self.out if self.operation in ("scatter", "recv") else self.tensor

    def describe(self) -> str:
        """For instance: all_reduce(sum) of (4, 4) float32 at train.py:12: comm.all_reduce(x)."""
        name = self.operation
        if self.reduction is not None:
            name += f"({self.reduction})"
        if self.root is not None:
            name += {"send": " to", "recv": " from"}.get(self.operation, " rooted at")
            name += f" rank {self.group.ranks[self.root]}"
            name += f" with tag {self.tag}" if self.tag else ""
        tensor = self.compared
        if tensor is not None:
            name += f" of {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            name += "" if tensor.device.type == "cpu" else f" on {tensor.device}"
        name += f" of {self.what}" if self.what else ""
        if self.input_splits is not None:
            name += f", sending {self.input_splits} and expecting {self.output_splits}"
        asker = f" (asked by {self.asked_by[2]})" if self.asked_by[2] else ""
        return f"{name}{asker} at {text(self.source)}"
