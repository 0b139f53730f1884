"""ZeRO stages 0 to 2: each rank computes with whole parameters, and updates a part of them.

Adam is elementwise, so a rank can update its part of the parameters from its part of the gradient,
and nobody needs the whole of the optimizer's states:

    stage 0   all-reduce gradients;            all update everything         (DDP)
    stage 1   reduce-scatter gradients; update a part; all-gather parameters
    stage 2   the same, but each bucket's gradients leave during backward, and are freed

Stage 3 is FSDP, in fsdp.py.

Papers: ZeRO, 1910.02054, sec. 5.1 and 5.2; host memory: ZeRO-Offload, 2101.06840, sec. 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reference.parallel.data_parallel import BUCKET_BYTES, divide
from reference.parallel.ranks import Comm, to_device, to_host
from reference.parallel.zero.flat import FlatLayout, layout_of
from reference.parallel.zero.reduction import GradientReducer, clip_shards

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Bucket:
    """Some parameters as one vector: `flat`, whole, and `master`, the part that this rank updates.

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
        self.num_missing = len(named)
        self.master = nn.Parameter(self._new_master())
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
        self.num_missing = len(self.parameters)
        return flat

    def accumulate(self, part: Float[Tensor, " n"]) -> None:
        """Add a mean gradient of this rank's part."""
        if self.gradient is None:
            self.gradient = part
            self.comm.memory.label(part, "gradients")
        else:
            self.gradient.add_(part)

    def begin_step(self) -> None:
        """Hand the gradient to the master, in its precision and its memory."""
        if self.gradient is None:
            return
        gradient, self.gradient = self.gradient, None
        if self.host:
            gradient = to_host(self.comm, gradient)
        self.master.grad = gradient.to(self.master.dtype)

    def end_step(self) -> None:
        """Bring what was updated into everyone's parameters."""
        self.master.grad = None
        if self.is_copy:
            updated = self.master.detach().to(self.flat.dtype)
            self.own.copy_(to_device(self.comm, updated) if self.host else updated)
        if self.is_sharded:
            self.comm.all_gather(self.own, out=self.flat)

    def _new_master(self) -> Tensor:
        if not self.is_copy:
            return self.own
        with self.comm.memory.category("host" if self.host else "optimizer_states"):
            return self.own.detach().to(torch.float32, copy=True)


class Zero:
    """Data parallel training of `model` over `comm` at ZeRO stage 0, 1 or 2.

    Use: `loss.backward()`, then `zero.step()`, which also clears the gradients. Parameters become
    views of flat buckets of `bucket_bytes`, in the order in which backward fills them; all ranks
    start from those of rank 0. `make_optimizer` gets float32 masters: of everything at stage 0,
    else of this rank's parts; it must be elementwise (Adam, SGD, not LAMB or Muon). With `offload`,
    masters and states live in the host's memory, and only gradients and updated parameters travel.

    Raises: ValueError for another stage, no parameters, mixed dtypes, or a bucket size below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Comm,
        stage: int,
        make_optimizer: MakeOptimizer = torch.optim.AdamW,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        offload: bool = False,
    ) -> None:
        if stage not in (0, 1, 2):
            raise ValueError(f"stage: expected 0, 1 or 2, got {stage}; stage 3 is FSDP")
        self.model, self.comm, self.stage, self.offload = model, comm, stage, offload
        self.buckets = [
            Bucket(named, comm, is_sharded=stage > 0, host=offload)
            for named in _divide(model, bucket_bytes)
        ]
        self.optimizer = make_optimizer([bucket.master for bucket in self.buckets])
        self._reducer = GradientReducer(comm)
        if stage == 2:
            for bucket in self.buckets:
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(self._hook(bucket))

    def reduce_gradients(self) -> None:
        """Mean gradients: of each rank's part, or at stage 0 of everything.

        At stage 2 most have left during backward; here the rest does.
        """
        for bucket in self.buckets:
            if all(parameter.grad is None for parameter in bucket.parameters):
                continue
            flat = bucket.take_gradients()
            if self.stage == 0:
                bucket.accumulate(self.comm.all_reduce(flat, "mean"))
            else:
                self._reducer.start(flat, bucket.accumulate)
            del flat
        self._reducer.finish()

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Reduce, then clip by the norm of the whole gradient; that norm, the same on each rank."""
        self.reduce_gradients()
        parts = [b.gradient for b in self.buckets if b.gradient is not None]
        return clip_shards(parts, max_norm, self.comm if self.stage > 0 else None)

    @torch.no_grad()
    def step(self) -> None:
        """Reduce what is left, update this rank's part, and share it."""
        self.reduce_gradients()
        for bucket in self.buckets:
            bucket.begin_step()
        if self.offload:
            with self.comm.memory.category("host"):
                self.optimizer.step()
        else:
            self.optimizer.step()
        for bucket in self.buckets:
            bucket.end_step()

    def _hook(self, bucket: Bucket) -> Callable[[Tensor], None]:
        def arrived(_: Tensor) -> None:
            bucket.num_missing -= 1
            if bucket.num_missing == 0:
                self._reducer.start(bucket.take_gradients(), bucket.accumulate)

        return arrived


def _divide(model: nn.Module, bucket_bytes: int) -> list[list[tuple[str, nn.Parameter]]]:
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(dtypes) != 1:
        raise ValueError(f"model: expected parameters of one dtype, got {dtypes or 'none'}")
    return divide(model.named_parameters(), bucket_bytes)
