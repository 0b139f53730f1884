"""Who a rank is and to which groups it belongs: names, splits, meshes, and its ledgers.

`Comm` (in comm.py) adds the operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from reference.parallel.ranks.calls import Call, Group
from reference.parallel.ranks.clock import Clock
from reference.parallel.ranks.hardware import Hardware
from reference.parallel.ranks.ledger import TrafficLedger
from reference.parallel.ranks.memory import MemoryLedger
from reference.parallel.ranks.meter import Meter
from reference.parallel.ranks.source import calling_line
from reference.parallel.ranks.transport import Transport

if TYPE_CHECKING:
    from reference.parallel.ranks.comm import Comm


@dataclass(eq=False)
class Rank:
    """What belongs to one rank, whatever the group in which it speaks."""

    rank: int
    world_size: int
    hardware: Hardware
    transport: Transport
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    region: str = "compute"

    def __post_init__(self) -> None:
        clock = self.clock
        self.traffic = TrafficLedger(self.rank)
        self.memory = MemoryLedger(lambda: clock.now(self.rank))
        self.meter = Meter(self.memory, lambda n: clock.compute(self.rank, n, self.region))
        self.unfinished: dict[int, Call] = {}

    @property
    def clock(self) -> Clock:
        return self.transport.clock


class Membership:
    """One rank in one group."""

    def __init__(self, group: Group, me: Rank) -> None:
        self.group, self._me = group, me

    @property
    def rank(self) -> int:
        """This rank's number in the group, from 0."""
        return self.group.place[self._me.rank]

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return self.group.size

    @property
    def global_rank(self) -> int:
        """This rank's number among all."""
        return self._me.rank

    @property
    def world_size(self) -> int:
        """How many ranks there are in all."""
        return self._me.world_size

    @property
    def local_rank(self) -> int:
        """This rank's number on its node: which of the node's GPUs it has."""
        return self._me.rank % self.hardware.ranks_per_node

    @property
    def node(self) -> int:
        """The node on which this rank stands."""
        return self.hardware.node(self._me.rank)

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors belong: the CPU, or a GPU under NCCL."""
        return self._me.device

    @property
    def hardware(self) -> Hardware:
        """What the virtual clock takes this rank to be."""
        return self._me.hardware

    @property
    def traffic(self) -> TrafficLedger:
        """This rank's ledger of calls and bytes, over all groups."""
        return self._me.traffic

    @property
    def memory(self) -> MemoryLedger:
        """This rank's ledger of bytes held."""
        return self._me.memory

    @property
    def now_seconds(self) -> float:
        """Where this rank's compute stream stands on the virtual clock."""
        return self._me.clock.now(self._me.rank)

    def compute(self, flops: float, name: str | None = None) -> None:
        """Let the clock do work that no operation shows. `name` labels it on the timeline."""
        self._me.clock.compute(self._me.rank, flops, name or self._me.region)

    def occupy_host_link(self, name: str, num_bytes: int) -> float:
        """Let the clock copy to or from the host; when that ends, for `wait_until`."""
        return self._me.clock.copy_to_host(self._me.rank, name, num_bytes)

    def wait_until(self, end_seconds: float) -> None:
        """Hold the compute stream until then on the virtual clock."""
        self._me.clock.wait(self._me.rank, end_seconds)

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Work counted inside carries this name on the timeline: `with comm.region("F0"): ...`"""
        before, self._me.region = self._me.region, name
        try:
            yield
        finally:
            self._me.region = before

    def split(self, color: int | None, key: int = 0, *, name: str | None = None) -> Comm | None:
        """One new group for each color, its ranks ordered by key, then by rank here.

        Collective: every rank of this group calls it. None for those whose color is None. It is not
        counted as traffic: groups are made once.
        """
        call = self._call("agree", self.group, value=(color, key))
        transport = self._me.transport
        with self._me.meter.paused():
            transport.wait(call, transport.start(call))
        if color is None:
            return None
        order = sorted(
            (other_key, place)
            for place, (other, other_key) in enumerate(call.value)
            if other == color
        )
        ranks = tuple(self.group.ranks[place] for _, place in order)
        return self._sub_group(name or f"{self.group.name}/{color}", ranks)

    def mesh(self, **axes: int) -> Mesh:
        """Arrange the group's ranks in a grid with named axes, the last one running fastest.

        `comm.mesh(dp=2, tp=4)`: ranks 0 to 3 share a tp group, ranks 0 and 4 a dp group. One axis
        may be -1: what is left.

        Raises: ValueError where the axes do not multiply to the size of the group.
        """
        given = math.prod(n for n in axes.values() if n != -1)
        if list(axes.values()).count(-1) == 1 and given > 0 and self.size % given == 0:
            axes = {axis: self.size // given if n == -1 else n for axis, n in axes.items()}
        if not axes or min(axes.values()) < 1 or math.prod(axes.values()) != self.size:
            raise ValueError(
                f"axes: expected sizes with product {self.size}, the size of {self.group}; "
                f"got {axes}"
            )
        return Mesh(self, axes)

    def _call(self, operation: str, group: Group, value: Any = None) -> Call:
        source, asked_by = calling_line()
        return Call(operation, group, self._me.rank, value=value, source=source, asked_by=asked_by)

    def _sub_group(self, name: str, ranks: tuple[int, ...]) -> Comm:
        group = Group(name, ranks)
        self._me.transport.join(self._call("join", group))
        return type(self)(group, self._me)  # type: ignore[return-value]


class Mesh:
    """A grid of ranks: `mesh.tp` or `mesh["tp"]` is this rank's group along an axis.

    `mesh["dp", "cp"]` is the group along several axes together, named "dp_cp", in the order of the
    mesh; all its ranks must ask for it. `coordinates` says where this rank stands, `shape` the size
    of each axis.
    """

    def __init__(self, comm: Membership, axes: dict[str, int]) -> None:
        self.shape = dict(axes)
        self.coordinates: dict[str, int] = {}
        self._comm, self._groups = comm, dict[tuple[str, ...], Any]()
        place = comm.rank
        for axis, size in reversed(axes.items()):
            place, self.coordinates[axis] = divmod(place, size)
        self.coordinates = {axis: self.coordinates[axis] for axis in axes}
        for axis in axes:
            self[axis]

    @property
    def remote(self) -> tuple[str, ...]:
        """What a rank's program may ask of it from another process."""
        return (*self.shape, "__getitem__", "shape", "coordinates", "rank_at")

    def __getitem__(self, axes: str | tuple[str, ...]) -> Comm:
        names = (axes,) if isinstance(axes, str) else tuple(axes)
        unknown = set(names) - set(self.shape)
        if unknown or not names:
            raise KeyError(f"{axes}: expected axes of the mesh, {', '.join(self.shape)}")
        ordered = tuple(axis for axis in self.shape if axis in names)
        if ordered not in self._groups:
            ranks = tuple(self._ranks_along(ordered))
            self._groups[ordered] = self._comm._sub_group("_".join(ordered), ranks)
        return self._groups[ordered]

    def __getattr__(self, axis: str) -> Comm:
        if axis.startswith("_") or axis not in self.shape:
            raise AttributeError(f"{axis}: expected one of {', '.join(self.shape)}")
        return self[axis]

    def rank_at(self, **coordinates: int) -> int:
        """The global rank at the given place; axes that are not given: this rank's own place."""
        at = {**self.coordinates, **coordinates}
        place = 0
        for axis, size in self.shape.items():
            place = place * size + at[axis]
        return self._comm.group.ranks[place]

    def _ranks_along(self, axes: tuple[str, ...]) -> Iterator[int]:
        sizes = [self.shape[axis] for axis in axes]
        for i in range(math.prod(sizes)):
            at = {}
            for axis, size in zip(reversed(axes), reversed(sizes), strict=True):
                i, at[axis] = divmod(i, size)
            yield self.rank_at(**at)
