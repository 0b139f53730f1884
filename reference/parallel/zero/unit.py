"""A unit of FSDP: some modules' parameters as one vector, of which this rank owns a part."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reference.parallel.ranks import Comm, Handle
from reference.parallel.zero.flat import FlatLayout, layout_of

NOWHERE = torch.empty((), device="meta")


class Unit:
    """The part (`shard`), and the whole vector (`full`) from `unshard` to `reshard`.

    The parameters of `module`, without those of the modules in `skip`, are taken out of it. Each
    rank starts from the values of rank 0, its part alone being sent.

    Raises: ValueError for a unit without parameters, or with one that is not floating point.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        skip: set[nn.Module],
        comm: Comm,
        replicas: Comm | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name, self.module, self.comm, self.dtype = name, module, comm, dtype
        self.full: Tensor | None = None
        self.unreduced: Tensor | None = None
        self.has_prefetched = False
        self._gathering: Handle | None = None
        named, self._places = _take_out(name, module, skip)
        if not named:
            raise ValueError(f"units: {name!r} has no parameters of its own")
        for parameter_name, tensor in named.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{parameter_name}: expected floating point, got {tensor.dtype}")
        self.layout: FlatLayout = layout_of(named.items(), comm.size)
        self.shard = nn.Parameter(self._first_values(list(named.values()), replicas))
        comm.memory.label(self.shard, "parameters")
        self.hide()

    def start_gather(self) -> None:
        """Begin to collect the parts, unless that is under way or done."""
        if self.full is None and self._gathering is None:
            part = self.shard.detach().to(self.dtype)
            self._gathering = self.comm.all_gather(part, async_op=True)

    def unshard(self) -> Float[Tensor, " P"]:
        """The whole vector, waited for; at once if it is there."""
        self.start_gather()
        if self._gathering is not None:
            self.full, self._gathering = self._gathering.wait(), None
        assert self.full is not None
        return self.full

    def reshard(self) -> None:
        """Forget the whole: its memory is free when nobody looks at it any more."""
        if self._gathering is not None:
            self._gathering.wait()
        self.full = self._gathering = None

    def show(self, full: Float[Tensor, " P"]) -> None:
        """Let the module see the vector's views in place of its parameters."""
        for places, view in zip(self._places, self.layout.views(full), strict=True):
            for owner, attribute in places:
                setattr(owner, attribute, view)

    def hide(self) -> None:
        """Let the module see shapes alone: used out of turn, they give an error, not old values."""
        for places, shape in zip(self._places, self.layout.shapes, strict=True):
            for owner, attribute in places:
                setattr(owner, attribute, NOWHERE.expand(shape))

    def owns(self, tensor: Tensor) -> bool:
        """Whether the tensor is a view of the whole vector."""
        return (
            self.full is not None
            and tensor.untyped_storage()._cdata == self.full.untyped_storage()._cdata
        )

    def accumulate(self, part: Float[Tensor, " n"]) -> None:
        """Add this rank's part of the mean gradient, in float32."""
        part = part.to(self.shard.dtype)
        if self.shard.grad is None:
            self.shard.grad = part
            self.comm.memory.label(part, "gradients")
        else:
            self.shard.grad.add_(part)

    def whole(self) -> dict[str, Tensor]:
        """Copies of the parameters, gathered in the shard's own precision, by name; collective."""
        full = self.comm.all_gather(self.shard.detach())
        views = self.layout.views(full)
        return {n: v.clone() for n, v in zip(self.layout.names, views, strict=True)}

    def _first_values(self, tensors: list[Tensor], replicas: Comm | None) -> Tensor:
        shard = torch.zeros(self.layout.shard_numel, device=self.comm.device)
        if tensors[0].device.type == "meta":
            return shard
        if replicas is None or replicas.rank == 0:
            is_source = self.comm.rank == 0
            flat = self.layout.flatten(t.detach().float() for t in tensors) if is_source else None
            self.comm.scatter(shard, flat, src=0)
        if replicas is not None:
            replicas.broadcast(shard, src=0)
        return shard


def _take_out(
    prefix: str, module: nn.Module, skip: set[nn.Module]
) -> tuple[dict[str, Tensor], list[list[tuple[nn.Module, str]]]]:
    """Parameters by name, each with all places where it stands: shared ones stand in several."""
    named: dict[str, Tensor] = {}
    places: dict[int, list[Any]] = {}
    for module_name, owner in module.named_modules(prefix=prefix):
        if owner in skip:
            continue
        for attribute, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in places:
                named[f"{module_name}.{attribute}".lstrip(".")] = parameter
                places[id(parameter)] = []
            places[id(parameter)].append((owner, attribute))
            del owner._parameters[attribute]
    return named, list(places.values())
