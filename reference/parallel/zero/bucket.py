"""A bucket of ZeRO's first stages: parameters as one vector, of which this rank updates a part.

The optimizer sees a piece of each parameter, where the rank's part of the vector meets it: so
weight decay, learning rates and unused parameters are each parameter's own, as on one rank.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reference.parallel.ranks import Comm, to_device, to_host
from reference.parallel.zero.flat import FlatLayout, layout_of


class Bucket:
    """`flat`, the parameters' vector, whole; `master`, the part that this rank updates; `pieces` of
    it by name, one for each parameter, empty where the part does not meet it.

    In float32 the master is a view of the vector; in 16 bits it is a float32 copy of its part, an
    optimizer state. With `host` it lives in the host's memory.
    """

    def __init__(
        self, named: list[tuple[str, nn.Parameter]], comm: Comm, *, is_sharded: bool, host: bool
    ) -> None:
        self.parameters = [parameter for _, parameter in named]
        self.comm, self.is_sharded, self.host = comm, is_sharded, host
        self.layout: FlatLayout = layout_of(named, comm.size if is_sharded else 1)
        with comm.memory.category("parameters"):
            self.flat = self.layout.flatten(p.detach() for p in self.parameters)
        comm.broadcast(self.flat, src=0)
        for parameter, view in zip(self.parameters, self.layout.views(self.flat), strict=True):
            parameter.data = view
        self.gradient: Tensor | None = None
        self.num_rounds = 0
        self.master = self._new_master()
        self.pieces = [
            (name, _piece(self.master[where], parameter))
            for (name, parameter), where in zip(named, self._places(), strict=True)
        ]
        if self.is_copy:
            comm.memory.label(self.master, "host" if host else "optimizer_states")

    @property
    def is_copy(self) -> bool:
        """Whether the master has memory of its own."""
        return self.host or self.flat.dtype != torch.float32

    @property
    def own(self) -> Float[Tensor, " n"]:
        """The part of the parameters that this rank updates: a view."""
        return self.layout.shard(self.flat, self.comm.rank if self.is_sharded else 0)

    def take_gradients(self) -> Float[Tensor, " P"]:
        """All gradients of the bucket in one vector; those of the parameters are freed."""
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.parameters
        ]
        with self.comm.memory.category("gradients"):
            flat = self.layout.flatten(gradients)
        for parameter in self.parameters:
            parameter.grad = None
        return flat

    def accumulate(self, part: Float[Tensor, " n"]) -> None:
        """Add a mean gradient of this rank's part."""
        if self.gradient is None:
            self.gradient = part
            self.comm.memory.label(part, "gradients")
        else:
            self.gradient.add_(part)

    def gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter with this rank's piece of its reduced gradient, a view; none before."""
        if self.gradient is None:
            return []
        pieces = [self.gradient[where] for where in self._places()]
        return list(zip(self.parameters, pieces, strict=True))

    def begin_step(self, used: set[nn.Parameter]) -> None:
        """Hand the gradients of used parameters to their pieces, in the master's precision and
        memory."""
        if self.gradient is None:
            return
        gradient, self.gradient = self.gradient, None
        if self.host:
            gradient = to_host(self.comm, gradient)
        gradient = gradient.to(self.master.dtype)
        rows = zip(self.parameters, self.pieces, self._places(), strict=True)
        for parameter, (_, piece), where in rows:
            piece.grad = gradient[where] if parameter in used else None

    def end_step(self) -> None:
        """Bring what was updated into everyone's parameters."""
        for _, piece in self.pieces:
            piece.grad = None
        if self.is_copy:
            updated = self.master.to(self.flat.dtype)
            self.own.copy_(to_device(self.comm, updated) if self.host else updated)
        if self.is_sharded:
            self.comm.all_gather(self.own, out=self.flat)

    def whole(self, index: int, piece: Tensor) -> Tensor:
        """A state of parameter `index`, from all ranks' pieces of it; collective."""
        if not self.is_sharded:
            return piece.view(self.layout.shapes[index]).clone()
        part = torch.zeros(self.layout.shard_numel, dtype=piece.dtype, device=self.comm.device)
        part[self._places()[index]] = piece.to(self.comm.device)
        return self.layout.views(self.comm.all_gather(part))[index].clone()

    def piece_of(self, index: int, whole: Tensor) -> Tensor:
        """This rank's piece of a whole state of parameter `index`."""
        flat = torch.zeros(self.layout.padded_numel, dtype=whole.dtype)
        self.layout.views(flat)[index].copy_(whole)
        part = self.layout.shard(flat, self.comm.rank if self.is_sharded else 0)
        return part[self._places()[index]].to(self.master.device, copy=True)

    def _new_master(self) -> Tensor:
        if not self.is_copy:
            return self.own
        with self.comm.memory.category("host" if self.host else "optimizer_states"):
            return self.own.detach().to(torch.float32, copy=True)

    def _places(self) -> list[slice]:
        """Where each parameter lies in this rank's part of the vector."""
        first = self.layout.shard_numel * (self.comm.rank if self.is_sharded else 0)
        places, begin = [], 0
        for numel in self.layout.numels:
            ends = (
                min(max(at - first, 0), self.layout.shard_numel) for at in (begin, begin + numel)
            )
            places.append(slice(*ends))
            begin += numel
        return places


def _piece(part: Tensor, parameter: nn.Parameter) -> nn.Parameter:
    piece = nn.Parameter(part)
    piece.whole_shape = parameter.shape  # type: ignore[attr-defined]
    return piece
