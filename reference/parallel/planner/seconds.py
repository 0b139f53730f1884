"""How long a step takes under a plan, and where the time goes.

Kernels are bound by arithmetic (products) or by memory (all else), one after another; collectives
of tensor parallelism stand between them; those of data parallelism hide behind backward as far as
there is backward. Stages of unequal length make a pipeline wait for the longest:

    step = m longest + (the other stages once) / v + what does not hide + optimizer

which is m (F + B) + (p - 1)(F + B) / v where all are equal (reference.parallel.pipeline.timing).

Papers: Narayanan et al., 2104.04473, sec. 2 and 3; roofline, Williams et al., CACM 52 (2009).
"""

from dataclasses import dataclass, fields

from reference.parallel.planner.cluster import Cluster
from reference.parallel.planner.kernels import (
    head_seconds,
    layer_seconds,
    optimizer_seconds,
)
from reference.parallel.planner.memory import layers_of_ranks, rank_parameters
from reference.parallel.planner.plans import Batch, Plan
from reference.parallel.planner.shapes import ModelShape
from reference.transformer.flops import TRAINING_PASSES


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by cause; they add up."""

    compute: float
    recompute: float
    tensor: float
    context: float
    messages: float
    bubble: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        words = [f"{k} {s / self.total:.0%}" for k, s in parts.items() if s >= 0.005 * self.total]
        return f"{self.total:.3g} s: {', '.join(words)}"


def step_seconds(model: ModelShape, plan: Plan, cluster: Cluster, batch: Batch) -> StepTime:
    """Of a plan that fits the model (plans.misfits); memory is not asked."""
    num_micro = plan.num_micro(batch)
    stages = _stages(model, plan, cluster, batch)
    longest = max(stages, key=lambda s: s.total)
    gathering = _gathering_seconds(model, plan, cluster)
    per_micro = _with_gathering(longest, gathering)
    fill = _fill_share(plan) * (sum(s.total for s in stages) - longest.total) / plan.num_chunks
    window = longest.backward * (1 - 1 / model.num_layers)  # all but the first layer's
    data = _data_seconds(model, plan, cluster, num_micro, window)
    return StepTime(
        compute=num_micro * longest.compute,
        recompute=num_micro * longest.recompute,
        tensor=num_micro * longest.tensor,
        context=num_micro * longest.context,
        messages=num_micro * longest.messages,
        bubble=fill,
        data=data + num_micro * (per_micro - longest.total),
        optimizer=max(
            optimizer_seconds(model, plan, cluster, rank_parameters(model, plan, rank))
            for rank in {0, plan.pipeline - 1}
        ),
    )


def model_flops(model: ModelShape, batch: Batch, *, is_causal: bool = False) -> float:
    """Of a step, forward and backward, nothing twice: what MFU counts (PaLM, 2204.02311)."""
    pairs = batch.num_tokens * batch.seq_len * (0.5 if is_causal else 1.0)
    forward = model.num_layers * (
        model.layer_flops(batch.num_tokens) + model.pair_flops() * pairs
    ) + model.head_flops(batch.num_tokens)
    return TRAINING_PASSES * forward


@dataclass(frozen=True)
class _Stage:
    """One micro-batch on one rank of the pipeline, forward and backward."""

    compute: float
    recompute: float
    tensor: float
    context: float
    messages: float
    backward: float

    @property
    def total(self) -> float:
        return self.compute + self.recompute + self.tensor + self.context + self.messages


def _stages(model: ModelShape, plan: Plan, cluster: Cluster, batch: Batch) -> list[_Stage]:
    layer = layer_seconds(model, plan, cluster, batch)
    head = head_seconds(model, plan, cluster, batch)
    exchange = cluster.collective_seconds(
        "all_reduce", 2 * plan.tokens(batch) * model.dim, plan.tensor
    )
    messages = _message_seconds(model, plan, cluster, batch)
    stages = []
    for rank, count in enumerate(layers_of_ranks(model.num_layers, plan.pipeline, plan.num_chunks)):
        is_first, is_last = rank == 0, rank == plan.pipeline - 1
        accumulate = rank_parameters(model, plan, rank) * 2 * plan.gradient_bytes
        ends = (head if is_last else 0.0) + accumulate / cluster.traffic_bytes_per_second
        stages.append(
            _Stage(
                compute=count * (layer.forward + layer.backward) + ends,
                recompute=count * layer.recompute,
                tensor=count * layer.tensor + (is_first + is_last) * exchange,
                context=count * layer.context,
                messages=messages,
                backward=count * (layer.backward + layer.recompute) + ends * 2 / 3,
            )
        )
    return stages


def _message_seconds(model: ModelShape, plan: Plan, cluster: Cluster, batch: Batch) -> float:
    """Of one micro-batch, to the next stage and back, each chunk; every tensor rank sends a part
    (Narayanan's scatter/gather)."""
    if plan.pipeline == 1:
        return 0.0
    num_bytes = 2 * plan.tokens(batch) * model.dim / plan.tensor
    stride = plan.num_gpus // plan.pipeline
    return 2 * plan.num_chunks * cluster.message_seconds(num_bytes, stride)


def _fill_share(plan: Plan) -> float:
    """ZB-H1 fills with weights' gradients what 1F1B waits: a third of its bubble is left."""
    return 1 / 3 if plan.schedule == "ZB-H1" else 1.0


def _gathering_seconds(model: ModelShape, plan: Plan, cluster: Cluster) -> tuple[float, float]:
    """ZeRO-3: to gather a rank's layers for one pass, and to scatter their gradients."""
    if plan.zero_stage < 3:
        return 0.0, 0.0
    count = max(layers_of_ranks(model.num_layers, plan.pipeline, plan.num_chunks))
    elements = model.layer_parameters / plan.tensor

    def once(operation: str, num_bytes: float) -> float:
        return count * cluster.collective_seconds(
            operation, num_bytes * elements, plan.replicas, plan.tensor
        )

    return once("all_gather", 2), once("reduce_scatter", plan.gradient_bytes)


def _with_gathering(stage: _Stage, gathering: tuple[float, float]) -> float:
    """A micro-batch under ZeRO-3: each pass lasts as long as the longer of work and traffic."""
    gather, scatter = gathering
    backward = stage.backward
    forward = stage.total - backward
    return max(forward, gather) + max(backward, gather + scatter)


def _data_seconds(
    model: ModelShape, plan: Plan, cluster: Cluster, num_micro: int, window: float
) -> float:
    """What gradients and updated parameters take beyond the backward that they hide behind.

    Once a step, but stage 2, which has no room for whole gradients, scatters each micro-batch's.
    Gradients can hide, the gathering of updated parameters cannot; stage 3's is in its passes.
    """
    if plan.zero_stage == 3 or plan.replicas == 1:
        return 0.0
    parameters = max(rank_parameters(model, plan, rank) for rank in {0, plan.pipeline - 1})

    def once(operation: str, num_bytes: float) -> float:
        return cluster.collective_seconds(
            operation, num_bytes * parameters, plan.replicas, plan.tensor
        )

    hidden = window if plan.is_overlapped else 0.0
    if plan.zero_stage == 0:
        return max(0.0, once("all_reduce", plan.gradient_bytes) - hidden)
    rounds = num_micro if plan.zero_stage == 2 else 1
    late = max(0.0, once("reduce_scatter", plan.gradient_bytes) - hidden)
    return rounds * late + once("all_gather", 2)
