"""Distributed data parallelism: each rank has the whole model and its own rows of the batch.

Equal weights at the start and equal gradients at each step keep replicas equal for ever. Hooks see
each gradient as backward makes it; when a bucket is full its all-reduce starts, and runs while
backward goes on:

    backward    | layer 3 | layer 2 | layer 1 |
    network               | bucket 0 | bucket 1 | bucket 2 |

Paper: PyTorch Distributed, Li et al., arXiv 2006.15704, sec. 3.2 and 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from reference.parallel.data_parallel.buckets import (
    BUCKET_BYTES,
    FIRST_BUCKET_BYTES,
    Named,
    divide,
)
from reference.parallel.data_parallel.graph import reached_leaves, tensors_of
from reference.parallel.data_parallel.transparent import Transparent, check_learning
from reference.parallel.ranks import Comm, Handle


class Bucket:
    """Gradients that are reduced together."""

    def __init__(self, named: list[Named]) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.arrived: set[nn.Parameter] = set()
        self.flat: Tensor | None = None
        self.handle: Handle | None = None

    @property
    def is_full(self) -> bool:
        return len(self.arrived) == len(self.parameters)

    def gather(self, divisor: float) -> Tensor:
        """All gradients in one vector, divided; zeros for those that are not there."""
        parts = [
            (torch.zeros_like(p) if p.grad is None else p.grad.detach()).reshape(-1)
            for p in self.parameters
        ]
        # Dividing before the sum keeps 16-bit sums in range.
        return torch.cat(parts).div_(divisor)

    def give_back(self, flat: Tensor, used: set[nn.Parameter]) -> None:
        """Let each used parameter's gradient be its part of the vector."""
        for parameter, part in zip(
            self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True
        ):
            if parameter in used:
                parameter.grad = part.view_as(parameter)


class DDP(Transparent):
    """`module`, trained by all ranks of `comm` on other rows each.

    Use it as the module, by whose names it has parameters and buffers; after `backward` each
    parameter's `.grad` is the mean over ranks, the same on all. Parameters and buffers start as
    rank 0's, and with `broadcast_buffers` the buffers are rank 0's again before each forward that
    is to be reduced.

    `find_unused_parameters` is for models of which a step does not reach every parameter: the
    graph is searched in each forward. A parameter that no rank has reached since the last
    reduction, in passes without synchronisation neither, keeps its `.grad`.

    Raises: ValueError where nothing learns or a bucket has no size; RuntimeError after a backward
    that has not reached all parameters, naming them; in a forward, where other parameters require
    a gradient than those that did at the start.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Comm,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        first_bucket_bytes: int = FIRST_BUCKET_BYTES,
        broadcast_buffers: bool = True,
        find_unused_parameters: bool = False,
    ) -> None:
        super().__init__()
        self.module, self.comm = module, comm
        self.broadcast_buffers = broadcast_buffers
        self.find_unused_parameters = find_unused_parameters
        named = list(module.named_parameters())
        self.buckets = [
            Bucket(b) for b in divide(named, bucket_bytes, min(first_bucket_bytes, bucket_bytes))
        ]
        self.divisor: float = comm.size
        self.buffers_from = 0
        self._is_reducing = True
        self._is_expecting, self._is_queued = False, False
        self._num_started = 0
        self._reached: set[Tensor] = set()
        self._used: set[nn.Parameter] = set()
        self.send_state(source=0)
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._hook(bucket))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's; its backward will reduce, except within no_sync and without gradients."""
        if torch._C._current_graph_task_id() != -1:
            return self.module(*args, **kwargs)  # a checkpoint computes again
        if self._is_reducing and self.broadcast_buffers:
            self._send_buffers()
        output = self.module(*args, **kwargs)
        self._is_expecting = self._is_reducing and torch.is_grad_enabled()
        if self._is_expecting:
            self._expect_backward(output)
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Passes inside add to this rank's gradients; the next backward outside reduces the sum."""
        before, self._is_reducing = self._is_reducing, False
        try:
            yield
        finally:
            self._is_reducing = before

    @torch.no_grad()
    def send_state(self, source: int) -> None:
        """Make all parameters and buffers those of one rank."""
        for tensor in [*self.module.parameters(), *self.module.buffers()]:
            self.comm.broadcast(tensor.detach(), src=source)

    def take_part_without_data(self) -> None:
        """Answer one forward and backward of the others with zeros, changing nothing here."""
        if self.broadcast_buffers:
            self._send_buffers()
        for bucket in self.buckets:
            zeros = torch.cat([torch.zeros_like(p).reshape(-1) for p in bucket.parameters])
            self.comm.all_reduce(zeros)
        self._used_somewhere(set())

    @torch.no_grad()
    def _send_buffers(self) -> None:
        for buffer in self.module.buffers():
            self.comm.broadcast(buffer, src=self.buffers_from)

    def _expect_backward(self, output: Any) -> None:
        check_learning(self.module, [p for bucket in self.buckets for p in bucket.parameters])
        if self._is_queued:  # a backward that has failed
            self._forget()
        # A nested backward, as a checkpoint has it, ends before the one that is to call us back.
        for tensor in tensors_of(output):
            if tensor.requires_grad:
                tensor.register_hook(self._expect_end)
        if self.find_unused_parameters:
            self._reached |= reached_leaves(output)
            for bucket in self.buckets:
                bucket.arrived = set(bucket.parameters) - self._reached

    def _expect_end(self, _: Tensor | None = None) -> None:
        if not self._is_queued and self._is_expecting:
            self._is_queued = True
            Variable._execution_engine.queue_callback(self._end_backward)

    def _forget(self) -> None:
        self._is_queued, self._num_started, self._reached = False, 0, set()
        for bucket in self.buckets:
            bucket.arrived, bucket.flat, bucket.handle = set(), None, None

    def _hook(self, bucket: Bucket) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            if parameter.grad is not None:  # a node may be reached, and have nothing to say
                self._used.add(parameter)  # type: ignore[arg-type]
            if self._is_expecting:
                self._expect_end()
                bucket.arrived.add(parameter)  # type: ignore[arg-type]
                self._start_full_buckets()

        return arrived

    def _start_full_buckets(self) -> None:
        """In order: on all ranks the same bucket must be the next, whichever is full first."""
        while self._num_started < len(self.buckets) and self.buckets[self._num_started].is_full:
            bucket = self.buckets[self._num_started]
            with self.comm.memory.category("communication_buffers"):
                bucket.flat = bucket.gather(self.divisor)
            bucket.handle = self.comm.all_reduce(bucket.flat, async_op=True)
            self._num_started += 1

    def _end_backward(self) -> None:
        missing = [
            name
            for bucket in self.buckets
            for name, parameter in zip(bucket.names, bucket.parameters, strict=True)
            if parameter not in bucket.arrived
        ]
        if missing and not self.find_unused_parameters:
            self._forget()
            raise RuntimeError(
                f"rank {self.comm.rank}: backward has ended without a gradient of "
                f"{', '.join(missing)}; DDP(..., find_unused_parameters=True) allows that"
            )
        for bucket in self.buckets:
            bucket.arrived = set(bucket.parameters)
        self._start_full_buckets()
        used = self._used_somewhere(self._used)
        for bucket in self.buckets:
            assert bucket.handle is not None
            bucket.give_back(bucket.handle.wait(), used)
            self.comm.memory.label(bucket.flat, "gradients")
        self._used = set()
        self._forget()

    def _used_somewhere(self, here: set[nn.Parameter]) -> set[nn.Parameter]:
        parameters = [p for bucket in self.buckets for p in bucket.parameters]
        if not self.find_unused_parameters:
            return set(parameters)
        flags = torch.tensor([p in here for p in parameters], dtype=torch.int32)
        flags = self.comm.all_reduce(flags.to(self.comm.device), "max")
        return {p for p, flag in zip(parameters, flags.tolist(), strict=True) if flag}
