"""A unit of FSDP: some modules' parameters, of each of which this rank owns a shard."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reference.parallel.ranks import Comm, Handle
from reference.parallel.zero.ownership import Held
from reference.parallel.zero.rows import RowLayout

NOWHERE = torch.empty((), device="meta")


class Unit:
    """Shards (`held`), and the whole parameters (`wholes`) from `unshard` to `reshard`.

    Parameters keep their dtype; floating ones are gathered in `dtype` where it is given. Each rank
    starts from the values of rank 0, its part alone being sent.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        held: list[Held],
        comm: Comm,
        replicas: Comm | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.name, self.module, self.held, self.comm = name, module, held, comm
        self.wholes: list[Tensor] | None = None
        self.is_freed_by_gradient = True
        self.unreduced: dict[int, Tensor] = {}
        self.owed: set[int] = set()
        self.leaves: dict[int, Tensor] = {}
        self.showing: list[Tensor] | None = None
        self._dtype = dtype
        self._gathering: Handle | None = None
        self._gathered: tuple[int, ...] = ()
        self._base: dict[int, int] = {}
        shapes = tuple(h.shape for h in held)
        self._take_first_values(RowLayout(shapes, self._dtypes(), comm.size), replicas)
        self._layout = RowLayout(shapes, self._dtypes(dtype), comm.size)

    @property
    def label(self) -> str:
        """The unit in words."""
        return self.name or "the root"

    @property
    def learning(self) -> list[int]:
        """Which parameters require a gradient, now."""
        return [i for i, held in enumerate(self.held) if held.parameter.requires_grad]

    @property
    def version(self) -> tuple[int, ...]:
        """Changes when a shard is written to."""
        return tuple(held.parameter._version for held in self.held)

    def start_gather(self) -> None:
        """Begin to collect the shards, unless that is under way or done."""
        if self.wholes is not None and self._gathered != self.version:
            self.wholes = None  # left over from before an optimizer's step
        if self.wholes is None and self._gathering is None:
            shards = [
                held.parameter.detach().to(dtype)
                for held, dtype in zip(self.held, self._layout.dtypes, strict=True)
            ]
            self._gathered = self.version
            row = self._layout.pack(shards)
            self._gathering = self.comm.all_gather(row, what=self.label, async_op=True)

    def unshard(self) -> list[Tensor]:
        """The whole parameters, waited for; at once if they are there."""
        self.start_gather()
        if self._gathering is not None:
            message, self._gathering = self._gathering.wait(), None
            with self.comm.memory.category("communication_buffers"):
                self.wholes = self._layout.wholes(message)
            self._base = {}
            for i, whole in enumerate(self.wholes):
                self._base.setdefault(_storage(whole), i)
        assert self.wholes is not None
        return self.wholes

    def reshard(self) -> None:
        """Forget the wholes: their memory is free when nobody looks at it any more."""
        if self._gathering is not None:
            self._gathering.wait()
        self.wholes = self._gathering = None
        self._base = {}

    def gathered_dtype(self, i: int) -> torch.dtype:
        """In which parameter i is computed with, and has its gradient."""
        return self._layout.dtypes[i]

    def base_of(self, tensor: Tensor) -> int | None:
        """The number of a whole parameter whose storage the tensor looks at, if there is one."""
        return self._base.get(_storage(tensor)) if self._base else None

    def show(self, tensors: list[Tensor] | None) -> list[Tensor] | None:
        """Let the module see these, or with None its shards; returns what it saw before."""
        before, self.showing = self.showing, tensors
        for i, held in enumerate(self.held):
            for owner, attribute in held.places:
                if tensors is None:
                    owner.__dict__.pop(attribute, None)
                else:
                    owner.__dict__[attribute] = tensors[i]
        return before

    def hide(self) -> list[Tensor] | None:
        """Let the module see shapes alone: used out of turn, they give an error, not old values."""
        return self.show([NOWHERE.expand(held.shape) for held in self.held])

    def accumulate(self, gradients: dict[int, Tensor]) -> None:
        """Add this rank's shards of a mean gradient, in the shards' own dtype."""
        for i, gradient in gradients.items():
            parameter = self.held[i].parameter
            if parameter.grad is not None:
                parameter.grad.add_(gradient.to(parameter.dtype))
                continue
            with self.comm.memory.category("gradients"):
                parameter.grad = gradient.to(parameter.dtype, copy=True)
            self.comm.memory.label(parameter.grad, "gradients")

    def whole(self) -> dict[str, Tensor]:
        """Copies of the parameters in their own dtypes, gathered, by name; collective."""
        layout = RowLayout(self._layout.shapes, self._dtypes(), self.comm.size)
        message = self.comm.all_gather(layout.pack([h.parameter for h in self.held]))
        wholes = layout.wholes(message)
        return {held.name: t.clone() for held, t in zip(self.held, wholes, strict=True)}

    def _dtypes(self, dtype: torch.dtype | None = None) -> tuple[torch.dtype, ...]:
        stored = (held.parameter.dtype for held in self.held)
        return tuple(dtype if dtype and d.is_floating_point else d for d in stored)

    def _take_first_values(self, layout: RowLayout, replicas: Comm | None) -> None:
        comm = self.comm
        is_meta = [held.parameter.device.type == "meta" for held in self.held]
        row = torch.zeros(
            layout.row_numel,
            dtype=torch.uint8 if layout.is_bytes else layout.dtypes[0],
            device=comm.device,
        )
        if not all(is_meta):
            if replicas is None or replicas.rank == 0:
                wholes = [
                    torch.zeros(held.shape, dtype=held.parameter.dtype) if meta else held.parameter
                    for held, meta in zip(self.held, is_meta, strict=True)
                ]
                message = layout.spread(wholes).to(comm.device) if comm.rank == 0 else None
                comm.scatter(row, message, src=0)
            if replicas is not None:
                replicas.broadcast(row, src=0)
        for held, shard in zip(self.held, layout.shards(row, comm.rank), strict=True):
            _become(held, shard.clone())
            comm.memory.label(held.parameter, "parameters")


def _become(held: Held, shard: Tensor) -> None:
    """Let the parameter hold its shard: the same object, so that optimizers and hooks stay, unless
    it has to come to another device."""
    if held.parameter.device != shard.device:
        held.parameter = nn.Parameter(shard, requires_grad=held.parameter.requires_grad)
        for owner, attribute in held.places:
            owner._parameters[attribute] = held.parameter
    else:
        held.parameter.data = shard
    held.parameter.whole_shape = torch.Size(held.shape)  # type: ignore[attr-defined]

    def refuse(gradient: Tensor | None) -> None:
        if gradient is not None:
            raise RuntimeError(
                f"{held.name}: this rank's shard was used in place of the parameter, outside of "
                "the forward of its unit; compute with it inside of the model"
            )

    if held.parameter.requires_grad:
        held.parameter.register_hook(refuse)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
