"""The communicator: what a program on one rank calls to talk to the ranks of a group.

Names follow torch.distributed; numbers of ranks (`src`, `dst`) count within the group. Operations
that keep the shape work in place and return their tensor; those that change it return a new one,
or fill `out`. With `async_op=True` they return a `Handle` at once. No operation is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reference.parallel.ranks.calls import Call
from reference.parallel.ranks.in_flight import InFlight, refusal
from reference.parallel.ranks.membership import Membership, Rank
from reference.parallel.ranks.reductions import check_reducible
from reference.parallel.ranks.source import calling_line


class Handle:
    """An operation under way. Its result is there after `wait`, and not before.

    Until then its tensors are the network's: a program that has written to one is told by `wait`.
    """

    remote = ("wait", "is_completed")

    def __init__(self, call: Call, me: Rank, result: Tensor | None, *, is_async: bool) -> None:
        self._call, self._me, self._result = call, me, result
        with me.meter.paused(), torch.no_grad():
            self._ticket = me.transport.start(call)
            self._buffers = InFlight(call) if is_async else None
        me.unfinished[id(call)] = call

    def wait(self) -> Any:
        """Wait for the end of the operation; returns the tensor with its result.

        Raises: RuntimeError where the operation's tensors have been written to since its start.
        """
        if self._me.unfinished.pop(id(self._call), None) is not None:
            with self._me.meter.paused(), torch.no_grad():
                is_spoiled = self._buffers is not None and self._buffers.are_written_to()
                self._me.transport.wait(self._call, self._ticket)
            self._ticket = self._buffers = None
            if is_spoiled:
                raise refusal(self._call)
        return self._result

    def is_completed(self) -> bool:
        """Whether `wait` would return at once. Lets other ranks run before it says no."""
        if id(self._call) not in self._me.unfinished:
            return True
        return self._me.transport.is_completed(self._call, self._ticket)


class Comm(Membership):
    """One rank's end of a group. Made by `run`, `split` and `mesh`.

    Every rank of the group must call the same collective with the same shape and dtype, in the same
    order. Reductions are "sum", "mean", "product", "min" and "max", on the dtypes of `reductions`.

    Raises (all operations): ValueError and TypeError for arguments that cannot be right;
    CollectiveMismatch and Deadlock, which name each rank, its call and its line.
    """

    # What a rank's program may ask of it from another process: no ledger, no clock.
    remote = (
        "rank", "size", "global_rank", "world_size", "local_rank", "node", "device", "now_seconds",
        "all_reduce", "reduce", "broadcast", "all_gather", "gather", "reduce_scatter", "scatter",
        "all_to_all", "barrier", "send", "recv", "isend", "irecv", "split", "mesh",
    )  # fmt: skip

    def all_reduce(self, tensor: Tensor, op: str = "sum", *, async_op: bool = False) -> Any:
        """Reduce over all ranks, in place: afterwards all have the same."""
        check_reducible(tensor, op)
        return self._do("all_reduce", tensor, tensor, async_op, reduction=op)

    def reduce(self, tensor: Tensor, dst: int, op: str = "sum", *, async_op: bool = False) -> Any:
        """Reduce to rank `dst`, in place there; the others' tensors stay as they are."""
        check_reducible(tensor, op)
        out = tensor if self.rank == self._root("dst", dst) else None
        return self._do("reduce", tensor, out, async_op, tensor, reduction=op, root=dst)

    def broadcast(self, tensor: Tensor, src: int, *, async_op: bool = False) -> Any:
        """Copy rank `src`'s tensor into everyone's, in place."""
        out = None if self.rank == self._root("src", src) else tensor
        return self._do("broadcast", tensor, out, async_op, tensor, root=src)

    def all_gather(
        self,
        tensor: Tensor,
        *,
        out: Tensor | None = None,
        what: str = "",
        async_op: bool = False,
    ) -> Any:
        """Concatenate all ranks' tensors along dimension 0: (n, ...) -> (N n, ...).

        `what` they are, on all ranks the same words: parts of another layer may have their shape.
        """
        out = self._out(out, tensor, self._rows(tensor) * self.size)
        return self._do("all_gather", tensor, out, async_op, what=what)

    def gather(self, tensor: Tensor, dst: int, *, async_op: bool = False) -> Any:
        """As all_gather, on rank `dst` alone; None on the others."""
        is_root = self.rank == self._root("dst", dst)
        out = self._out(None, tensor, self._rows(tensor) * self.size) if is_root else None
        return self._do("gather", tensor, out, async_op, root=dst)

    def reduce_scatter(
        self,
        tensor: Tensor,
        op: str = "sum",
        *,
        out: Tensor | None = None,
        what: str = "",
        async_op: bool = False,
    ) -> Any:
        """Reduce, and keep this rank's part of dimension 0: (N n, ...) -> (n, ...).

        `what` is reduced, as in `all_gather`.
        """
        check_reducible(tensor, op)
        out = self._out(out, tensor, self._part(tensor))
        return self._do("reduce_scatter", tensor, out, async_op, reduction=op, what=what)

    def scatter(
        self, out: Tensor, tensor: Tensor | None = None, *, src: int, async_op: bool = False
    ) -> Any:
        """Fill `out` (n, ...) with this rank's part of rank `src`'s `tensor` (N n, ...)."""
        if self.rank == self._root("src", src):
            if tensor is None:
                raise ValueError(f"tensor: expected the whole on rank {src}, the source; got None")
            expected = (self._rows(out) * self.size, *out.shape[1:])
            if tuple(tensor.shape) != expected or tensor.dtype != out.dtype:
                raise ValueError(
                    f"tensor: expected shape {expected} and {out.dtype}, {self.size} parts like "
                    f"out; got {tuple(tensor.shape)} and {tensor.dtype}"
                )
        else:
            tensor = None
        return self._do("scatter", tensor, out, async_op, root=src)

    def all_to_all(
        self,
        tensor: Tensor,
        *,
        input_splits: Sequence[int] | None = None,
        output_splits: Sequence[int] | None = None,
        out: Tensor | None = None,
        async_op: bool = False,
    ) -> Any:
        """Send part j of dimension 0 to rank j; concatenate the parts that come, in rank order.

        Equal parts by default; else `input_splits[j]` rows go to rank j, and `output_splits[j]`
        come from it.
        """
        if input_splits is None and output_splits is None:
            input_splits = output_splits = [self._part(tensor)] * self.size
        if input_splits is None or output_splits is None:
            raise ValueError("input_splits, output_splits: expected both or neither")
        given, expected = tuple(input_splits), tuple(output_splits)
        for name, splits in (("input_splits", given), ("output_splits", expected)):
            if len(splits) != self.size or min(splits) < 0:
                raise ValueError(f"{name}: expected {self.size} sizes from 0 on, got {splits}")
        if sum(given) != self._rows(tensor):
            raise ValueError(
                f"input_splits: expected the sum {self._rows(tensor)}, got {sum(given)}"
            )
        out = self._out(out, tensor, sum(expected))
        return self._do(
            "all_to_all", tensor, out, async_op, input_splits=given, output_splits=expected
        )

    def barrier(self, *, async_op: bool = False) -> Any:
        """Wait until every rank of the group is here."""
        return self._do("barrier", None, None, async_op)

    def send(self, tensor: Tensor, dst: int, *, tag: int = 0) -> None:
        """Send to rank `dst`, and wait until it has been received."""
        self._do("send", tensor, None, False, root=self._peer("dst", dst), tag=tag)

    def recv(self, tensor: Tensor, src: int, *, tag: int = 0) -> Tensor:
        """Receive from rank `src` into `tensor`; messages of one tag come in order."""
        return self._do("recv", None, tensor, False, root=self._peer("src", src), tag=tag)

    def isend(self, tensor: Tensor, dst: int, *, tag: int = 0) -> Handle:
        """As send, without waiting: leave the tensor alone until `wait`."""
        return self._do("send", tensor, None, True, root=self._peer("dst", dst), tag=tag)

    def irecv(self, tensor: Tensor, src: int, *, tag: int = 0) -> Handle:
        """As recv, without waiting: the values come with `wait`."""
        return self._do("recv", None, tensor, True, root=self._peer("src", src), tag=tag)

    def _do(
        self,
        operation: str,
        tensor: Tensor | None,
        out: Tensor | None,
        async_op: bool,
        result: Tensor | None = None,
        **details: Any,
    ) -> Any:
        source, asked_by = calling_line()
        call = Call(
            operation,
            self.group,
            self._me.rank,
            tensor=None if tensor is None else tensor.detach(),
            out=None if out is None else out.detach(),
            source=source,
            asked_by=asked_by,
            ready_seconds=self.now_seconds,
            **details,
        )
        self._me.memory.refresh()
        self._me.traffic.record(call)
        handle = Handle(call, self._me, out if result is None else result, is_async=async_op)
        return handle if async_op else handle.wait()

    def _out(self, out: Tensor | None, tensor: Tensor, rows: int) -> Tensor:
        """The result's place: `out` if it fits, or a new tensor in the ledger's own category."""
        shape = (rows, *tensor.shape[1:])
        if out is None:
            with self._me.memory.category("communication_buffers"):
                return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        if (out.shape, out.dtype, out.device) != (shape, tensor.dtype, tensor.device):
            raise ValueError(
                f"out: expected shape {shape} and {tensor.dtype} on {tensor.device}, "
                f"got {tuple(out.shape)} and {out.dtype} on {out.device}"
            )
        if self._me.meter.is_counting:
            self._me.memory.watch(out, is_elastic=True)
        return out

    def _rows(self, tensor: Tensor) -> int:
        return tensor.shape[0] if tensor.ndim else 1

    def _part(self, tensor: Tensor) -> int:
        if tensor.ndim == 0 or tensor.shape[0] % self.size:
            raise ValueError(
                f"tensor: expected dimension 0 to be a multiple of {self.size}, the size of "
                f"{self.group}; got shape {tuple(tensor.shape)}; pad it"
            )
        return tensor.shape[0] // self.size

    def _root(self, name: str, rank: int) -> int:
        if not 0 <= rank < self.size:
            raise ValueError(
                f"{name}: expected a rank of {self.group}, 0 to {self.size - 1}; got {rank}"
            )
        return rank

    def _peer(self, name: str, rank: int) -> int:
        if self._root(name, rank) == self.rank:
            raise ValueError(f"{name}: expected another rank than {rank}, which is this one")
        return rank
