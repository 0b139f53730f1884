"""A schedule carried out: each rank does its actions, and messages bring what they need.

    F   receive x, y = stage(x), send y          the last stage: its share of the mean loss
    B   receive dy, backward from y, send dx     or, split, without the weights
    W   the weights' gradients

The receive for the next action is posted before the present one computes, and a send is waited for
at the end alone: messages travel while ranks compute. Message tags name stage, direction and
micro-batch, so that none is taken for another.

Paper: Narayanan et al., 2104.04473, sec. 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reference.parallel.data_parallel import TokenMean, token_mean
from reference.parallel.pipeline.deferred import WeightGradients
from reference.parallel.pipeline.schedules import Action, Schedule, check_schedule
from reference.parallel.ranks import Comm, Handle

LossOf = Callable[[Tensor, Tensor], Tensor]


class Pipeline:
    """This rank's stages, and the schedule.

    `stages` are this rank's, stage rank + c p the c-th. `loss_of(output, target)` gives a loss for
    each of a micro-batch's targets, not their mean: micro-batches may count different numbers.
    `like(micro_inputs)` gives an empty tensor of the shape that goes from stage to stage; by
    default (B, T, D) of a stage's Llama.

    Raises: ValueError where comm, stages and schedule do not fit each other.
    """

    def __init__(
        self,
        comm: Comm,
        stages: Sequence[nn.Module],
        schedule: Schedule,
        loss_of: LossOf,
        *,
        like: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if schedule.num_ranks != comm.size:
            raise ValueError(
                f"schedule: expected one for {comm.size} ranks, got {schedule.num_ranks}"
            )
        if len(stages) != schedule.num_chunks:
            raise ValueError(
                f"stages: expected {schedule.num_chunks}, the schedule's chunks, got {len(stages)}"
            )
        check_schedule(schedule)
        self.comm, self.stages, self.schedule, self.loss_of = comm, stages, schedule, loss_of
        self.like = like or _stream_of(stages[0])
        self.weights = [WeightGradients() for _ in stages]
        if schedule.is_split:
            for stage, weights in zip(stages, self.weights, strict=True):
                weights.defer(stage)

    def step(self, inputs: Tensor, targets: Tensor, mean: TokenMean | None = None) -> Tensor | None:
        """Gradients of the mean loss over the batch, added to the parameters'; the loss, detached,
        on the last stage's rank, None elsewhere.

        Every rank gives the batch (only the first stage reads inputs, only the last targets); it is
        divided into m equal micro-batches along dimension 0. Targets of -100 do not count. Where
        other ranks have more of the step's tokens, `mean` is that of all: token_mean(targets,
        mesh["dp", "cp"]); the loss is then this pipeline's share of it.

        Raises: ValueError where the batch does not divide, or losses are not one for each target.
        """
        num_micro = self.schedule.num_micro
        if inputs.shape[0] % num_micro or targets.shape[0] % num_micro:
            raise ValueError(
                f"inputs, targets: expected a multiple of {num_micro} micro-batches, got "
                f"{inputs.shape[0]} and {targets.shape[0]} rows"
            )
        mean = token_mean(targets) if mean is None else mean
        return _Step(self, inputs.chunk(num_micro), targets.chunk(num_micro), mean).run()


class _Step:
    def __init__(self, pipeline: Pipeline, inputs: Any, targets: Any, mean: TokenMean) -> None:
        self.of, self.comm = pipeline, pipeline.comm
        self.inputs, self.targets, self.mean = inputs, targets, mean
        self.num_stages = pipeline.schedule.num_stages
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.local: dict[Action, Tensor] = {}
        self.posted: dict[Action, Handle] = {}
        self.sends: list[tuple[int, Handle]] = []
        self.num_done = 0
        self.losses: list[Tensor] = []

    def run(self) -> Tensor | None:
        actions = self.of.schedule.actions[self.comm.rank]
        act = {"F": self.forward, "B": self.backward, "W": self.weight}
        for action, following in zip(actions, (*actions[1:], None), strict=True):
            received = self.receive(action)
            if following is not None:
                self.post(following)
            with self.comm.region(f"{action.kind}{action.micro}"):
                act[action.kind](action, received)
            del received
            self.num_done += 1
            self.forget_sends()
        for _, handle in self.sends:
            handle.wait()
        return torch.stack(self.losses).sum() if self.losses else None

    def forward(self, action: Action, received: Tensor | None) -> None:
        _, stage, micro = action
        x = self.inputs[micro] if received is None else received.requires_grad_()
        y = self.of.stages[stage // self.comm.size](x)
        if stage + 1 == self.num_stages:
            y = self.mean.share(self.of.loss_of(y, self.targets[micro]), self.targets[micro])
            self.losses.append(y.detach())
        else:
            self.send(Action("F", stage + 1, micro), y.detach())
        self.kept[stage, micro] = x, y

    def backward(self, action: Action, received: Tensor | None) -> None:
        _, stage, micro = action
        x, y = self.kept.pop((stage, micro))
        self.of.weights[stage // self.comm.size].micro = micro
        if y.requires_grad:  # not so where a first stage is frozen
            torch.autograd.backward(y, received)
        if stage > 0:
            assert x.grad is not None
            self.send(Action("B", stage - 1, micro), x.grad)

    def weight(self, action: Action, _: Tensor | None) -> None:
        self.of.weights[action.stage // self.comm.size].compute(action.micro)

    def has_message(self, action: Action) -> bool:
        first = action.stage == 0 and action.kind == "F"
        last = action.stage + 1 == self.num_stages and action.kind == "B"
        return action.kind != "W" and not first and not last

    def post(self, action: Action) -> None:
        """Be ready for what an action of this rank needs."""
        if self.comm.size == 1 or not self.has_message(action) or action in self.posted:
            return
        step = -1 if action.kind == "F" else 1
        place = self.of.like(self.inputs[action.micro])
        source = (action.stage + step) % self.comm.size
        self.posted[action] = self.comm.irecv(place, source, tag=self.tag(action))

    def receive(self, action: Action) -> Tensor | None:
        if not self.has_message(action):
            return None
        if self.comm.size == 1:
            return self.local.pop(action)
        self.post(action)
        return self.posted.pop(action).wait()

    def send(self, action: Action, tensor: Tensor) -> None:
        """To the rank whose action needs it."""
        if self.comm.size == 1:
            self.local[action] = tensor
            return
        target = action.stage % self.comm.size
        handle = self.comm.isend(tensor.contiguous(), target, tag=self.tag(action))
        self.sends.append((self.num_done, handle))

    def forget_sends(self) -> None:
        """Let go of what has been received: a send two actions old has left long ago."""
        under_way = []
        for when, handle in self.sends:
            if when + 2 <= self.num_done and handle.is_completed():
                handle.wait()
            else:
                under_way.append((when, handle))
        self.sends = under_way

    def tag(self, action: Action) -> int:
        place = action.micro * self.num_stages + action.stage
        return 2 * place + (action.kind == "B")


def _stream_of(stage: nn.Module) -> Callable[[Tensor], Tensor]:
    model: Any = getattr(stage, "model", None)

    def like(tokens: Tensor) -> Tensor:
        if model is None:
            raise ValueError("like: expected a function that gives the stream's shape, got None")
        batch, seq_len = tokens.shape
        region = getattr(model, "region", None)
        if region is not None and region.sequence_parallel:
            seq_len //= region.comm.size
        dtype = next(model.parameters()).dtype
        return torch.empty(batch, seq_len, model.config.dim, dtype=dtype, device=tokens.device)

    return like
