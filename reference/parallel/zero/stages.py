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

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from reference.parallel.data_parallel import BUCKET_BYTES, check_learning, divide
from reference.parallel.ranks import Comm
from reference.parallel.zero.bucket import Bucket
from reference.parallel.zero.passes import Passes
from reference.parallel.zero.reduction import GradientReducer, clip_shards, copies_on

Named = list[tuple[str, nn.Parameter]]
MakeOptimizer = Callable[[Named], torch.optim.Optimizer]


class Zero:
    """Data parallel training of `model` over `comm` at ZeRO stage 0, 1 or 2.

    Use: `loss.backward()`, then `zero.step()`, which also clears the gradients. Parameters that
    learn become views of flat buckets of `bucket_bytes`, in the order in which backward fills them;
    all ranks start from the parameters and buffers of rank 0. `make_optimizer` gets (name, piece)
    pairs, as torch's optimizers take them: of each parameter the piece that this rank updates (at
    stage 0 all of it), flat and in float32, its `whole_shape` that of the parameter. For groups,
    `lambda named: AdamW(decay_groups(named, 0.1))`. It must be elementwise (Adam, SGD, not LAMB or
    Muon). With `offload`, masters and states live in the host's memory, and only gradients and
    updated parameters travel.

    A parameter that no rank has used since the last step stays as it is; where some have, the
    others' share of the mean is zero. At stage 2 each backward must reach a parameter on each rank.

    Raises: ValueError for another stage, no parameters, mixed dtypes, a model that is sharded
    already, or a bucket size below 1; RuntimeError in a step, where parameters have begun to learn.
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
        self._send_what_does_not_learn()
        self.optimizer = make_optimizer([pair for bucket in self.buckets for pair in bucket.pieces])
        self._reducer = GradientReducer(comm)
        self._num_arrived: Counter[nn.Parameter] = Counter()
        self._passes = Passes(at_end=self._end_pass)
        self._used: set[nn.Parameter] = set()
        self._num_started = 0
        self._coming: set[nn.Parameter] = set()
        for parameter in self._parameters:
            parameter.register_hook(self._hook(parameter))
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def reduce_gradients(self) -> None:
        """Mean gradients: of each rank's part, or at stage 0 of everything.

        At stage 2 they have left during backward, but for those that a schedule has put off.
        """
        check_learning(self.model, self._parameters)
        here = {p for p in self._parameters if p.grad is not None or self._num_arrived[p]}
        used, is_left = self._used_somewhere(here)
        self._used |= used
        if self.stage == 2 and is_left:  # deferred gradients, or such as no backward has brought
            for _ in self.buckets:
                self._start_next()
        for bucket in self.buckets if self.stage < 2 else ():
            if used.isdisjoint(bucket.parameters):
                continue
            flat = bucket.take_gradients()
            if self.stage == 0:
                bucket.accumulate(self.comm.all_reduce(flat, "mean"))
            else:
                self._reducer.start(flat, bucket.accumulate)
            del flat
        self._reducer.finish()
        self._num_arrived.clear()
        self._passes.clear()
        self._num_started = 0

    def clip_grad_norm(self, max_norm: float, *, tensor: Comm | None = None) -> Tensor:
        """Reduce, then clip by the norm of the whole gradient; that norm, the same on each rank.

        `tensor`: the tensor parallel ranks, where the model is divided among them as well. Stages
        of a pipeline have a norm each: `clip_shards` takes their group.

        Raises: ValueError for a divided model without `tensor`, or a norm that is not positive.
        """
        copies = copies_on(self.model, tensor)
        self.reduce_gradients()
        found = [pair for bucket in self.buckets for pair in bucket.gradients()]
        return clip_shards(
            [part for _, part in found],
            max_norm,
            self.comm if self.stage > 0 else None,
            tensor,
            copies=[copies[parameter] for parameter, _ in found],
        )

    @torch.no_grad()
    def step(self) -> None:
        """Reduce what is left, update this rank's part, and share it."""
        self.reduce_gradients()
        for bucket in self.buckets:
            bucket.begin_step(self._used)
        if self.offload:
            with self.comm.memory.category("host"):
                self.optimizer.step()
        else:
            self.optimizer.step()
        for bucket in self.buckets:
            bucket.end_step()
        self._used = set()

    def full_optimizer_state(self) -> dict[str, dict[str, Any]]:
        """Each parameter's states by its name, whole, for another number of ranks; collective."""
        found: dict[str, dict[str, Any]] = {}
        for bucket in self.buckets:
            for i, (name, piece) in enumerate(bucket.pieces):
                state = self.optimizer.state.get(piece, {})
                found[name] = {
                    kind: bucket.whole(i, value) if _is_piece(value, piece) else deepcopy(value)
                    for kind, value in state.items()
                }
        return found

    def load_full_optimizer_state(self, states: dict[str, dict[str, Any]]) -> None:
        """Give the optimizer this rank's pieces of what `full_optimizer_state` has collected.

        Raises: ValueError where the names are not those of this model.
        """
        names = {name for bucket in self.buckets for name, _ in bucket.pieces}
        if names != states.keys():
            raise ValueError(
                f"states: expected those of {len(names)} parameters, differs in "
                f"{sorted(names ^ states.keys())}"
            )
        for bucket in self.buckets:
            for i, (name, piece) in enumerate(bucket.pieces):
                shape = bucket.layout.shapes[i]
                state = {
                    kind: bucket.piece_of(i, value)
                    if isinstance(value, Tensor) and value.shape == shape
                    else deepcopy(value)
                    for kind, value in states[name].items()
                }
                if state:
                    self.optimizer.state[piece] = state

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for bucket in self.buckets for parameter in bucket.parameters]

    @torch.no_grad()
    def _send_what_does_not_learn(self) -> None:
        frozen = (p for p in self.model.parameters() if not p.requires_grad)
        for tensor in [*frozen, *self.model.buffers()]:
            self.comm.broadcast(tensor.detach(), src=0)

    def _used_somewhere(self, here: set[nn.Parameter]) -> tuple[set[nn.Parameter], bool]:
        """What any rank has used, and whether any still holds a gradient."""
        flags = torch.tensor(
            [(p in here) + (p.grad is not None) for p in self._parameters], dtype=torch.uint8
        )
        flags = self.comm.all_reduce(flags.to(self.comm.device), "max")
        if isinstance(flags, FakeTensor):
            return set(here), any(p.grad is not None for p in self._parameters)
        found = flags.tolist()
        return {p for p, flag in zip(self._parameters, found, strict=True) if flag}, 2 in found

    def _hook(self, parameter: nn.Parameter) -> Callable[[Tensor | None], None]:
        def come(gradient: Tensor | None) -> None:
            if gradient is not None:  # a node may be reached, and have nothing to say
                self._coming.add(parameter)

        return come

    def _arrived(self, parameter: Tensor) -> None:
        """At stage 2 buckets leave when they are full, on all ranks in the same order: the bucket
        that comes next, in its n-th round, when all of it has arrived n times. Each backward pass
        is a round, and at its end the rest leaves, before anybody else can communicate."""
        if parameter not in self._coming:
            return
        self._coming.discard(parameter)
        self._num_arrived[parameter] += 1  # type: ignore[index]
        self._passes.note()
        if self.stage < 2:
            return
        while True:
            num_rounds, following = divmod(self._num_started, len(self.buckets))
            waiting = self.buckets[following].parameters
            if any(self._num_arrived[p] <= num_rounds for p in waiting):
                return
            self._start_next()

    def _end_pass(self) -> None:
        while self.stage == 2 and self._num_started < len(self.buckets) * self._passes.count:
            self._start_next()

    def _start_next(self) -> None:
        bucket = self.buckets[self._num_started % len(self.buckets)]
        self._num_started += 1
        self._reducer.start(bucket.take_gradients(), bucket.accumulate)


def _is_piece(value: Any, piece: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape == piece.shape


def _divide(model: nn.Module, bucket_bytes: int) -> list[Named]:
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "whole_shape")]
    if sharded:
        raise ValueError(f"model: {', '.join(sharded)}: sharded already; wrap a model once")
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(dtypes) != 1:
        raise ValueError(f"model: expected parameters of one dtype, got {dtypes or 'none'}")
    return divide(model.named_parameters(), bucket_bytes)
