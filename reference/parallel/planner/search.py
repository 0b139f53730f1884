"""All plans for a model, a cluster and a batch: those that fit, fastest first, and why the others
do not.

Sizes of the axes are powers of two and the divisors of the number of GPUs that models use; layers
need not divide. Memory is asked before time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from reference.parallel.options import at_least
from reference.parallel.planner.cluster import Cluster
from reference.parallel.planner.memory import Memory, memory_bytes
from reference.parallel.planner.plans import Batch, Plan, misfits
from reference.parallel.planner.seconds import StepTime, model_flops, step_seconds
from reference.parallel.planner.shapes import ModelShape

MICRO_BATCHES = (1, 2, 4, 8)
CHUNKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Verdict:
    """A plan, weighed. `reasons` is empty where it can be carried out."""

    plan: Plan
    reasons: tuple[str, ...]
    memory: Memory | None = None
    time: StepTime | None = None
    mfu: float = 0.0

    @property
    def fits(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        if not self.fits:
            return f"{self.plan}: {'; '.join(self.reasons)}"
        return f"{self.plan}: {self.time} MFU {self.mfu:.0%}. {self.memory}"


@dataclass(frozen=True)
class Ranking:
    """`fitting` fastest first, `rejected` in the order of the search."""

    fitting: tuple[Verdict, ...]
    rejected: tuple[Verdict, ...]

    @property
    def best(self) -> Verdict:
        """The fastest.

        Raises: ValueError where no plan fits, with the plan that lacks least.
        """
        if self.fitting:
            return self.fitting[0]
        measured = [v for v in self.rejected if v.memory is not None]
        if not measured:
            raise ValueError("no plan divides this model, cluster and batch; try another batch")
        nearest = min(measured, key=lambda v: v.memory.total if v.memory else 0.0)
        raise ValueError(f"no plan fits; nearest: {nearest}; try more GPUs or offload")


def weigh(plan: Plan, model: ModelShape, cluster: Cluster, batch: Batch) -> Verdict:
    """Can it be carried out, in how much memory and time?"""
    reasons = misfits(plan, model, cluster, batch)
    if reasons:
        return Verdict(plan, tuple(reasons))
    memory = memory_bytes(model, plan, batch)
    if memory.total > cluster.usable_bytes:
        budget = f"of {cluster.usable_bytes / 1e9:.1f} GB usable"
        return Verdict(plan, (f"memory: {memory} {budget}",), memory)
    if memory.host > cluster.host_memory_bytes:
        budget = f"of {cluster.host_memory_bytes / 1e9:.0f} GB a GPU"
        return Verdict(plan, (f"host memory: {memory.host / 1e9:.0f} GB {budget}",), memory)
    time = step_seconds(model, plan, cluster, batch)
    peak = cluster.num_gpus * cluster.hardware.flops_per_second
    mfu = model_flops(model, batch) / (time.total * peak)
    return Verdict(plan, (), memory, time, mfu)


def rank_plans(
    model: ModelShape,
    cluster: Cluster,
    batch: Batch,
    *,
    plans: Sequence[Plan] | None = None,
    max_context: int = 1,
    max_tensor: int = 0,
) -> Ranking:
    """Weigh `plans`, or all that `candidates` finds.

    `max_context`: context ranks to try. `max_tensor`: tensor ranks, at most a node's by default; a
    larger number shows what a slow network does.

    Raises: ValueError for ranks below 1 (`max_tensor`: below 0), or next to `plans`.
    """
    at_least(1, [("max_context", max_context)])
    at_least(0, [("max_tensor", max_tensor)])
    if plans is not None and (max_context, max_tensor) != (1, 0):
        raise ValueError(
            "max_context, max_tensor: expected none next to plans; they say what is searched"
        )
    if plans is None:
        plans = list(candidates(model, cluster, batch, max_context, max_tensor))
    verdicts = [weigh(plan, model, cluster, batch) for plan in plans]
    fitting = sorted((v for v in verdicts if v.fits), key=lambda v: v.time.total if v.time else 0.0)
    return Ranking(tuple(fitting), tuple(v for v in verdicts if not v.fits))


def candidates(
    model: ModelShape, cluster: Cluster, batch: Batch, max_context: int = 1, max_tensor: int = 0
) -> Iterator[Plan]:
    """Every combination whose ranks are the cluster's; some of them will not fit."""
    for layout in _layouts(model, cluster, max_context, max_tensor):
        for micro_batch in MICRO_BATCHES:
            if batch.num_sequences % (layout.data * micro_batch):
                continue
            for staged in _staged(replace(layout, micro_batch=micro_batch), model, batch):
                yield from _choices(staged)


def _layouts(
    model: ModelShape, cluster: Cluster, max_context: int, max_tensor: int
) -> Iterator[Plan]:
    max_tensor = max_tensor or cluster.hardware.ranks_per_node
    for tensor in _powers(max_tensor):
        for context in _powers(max_context):
            for pipeline in _powers(min(model.num_layers, cluster.num_gpus)):
                data, left = divmod(cluster.num_gpus, tensor * context * pipeline)
                if not left and data:
                    yield Plan(
                        data=data, tensor=tensor, context=context, pipeline=pipeline,
                        sequence_parallel=tensor > 1,
                    )  # fmt: skip


def _staged(plan: Plan, model: ModelShape, batch: Batch) -> Iterator[Plan]:
    if plan.pipeline == 1:
        yield plan
        return
    for schedule in ("GPipe", "1F1B", "ZB-H1"):
        yield replace(plan, schedule=schedule)
    for num_chunks in CHUNKS[1:]:
        if plan.pipeline * num_chunks <= model.num_layers:
            yield replace(plan, schedule="interleaved", num_chunks=num_chunks)


def _choices(plan: Plan) -> Iterator[Plan]:
    stages = (0, 1, 2, 3) if plan.pipeline == 1 else (0, 1)  # 2 and 3 talk in each micro-batch
    for zero_stage in stages if plan.replicas > 1 else (0,):
        for recompute in ("none", "full"):  # fused attention does what "selective" would
            chosen = replace(plan, zero_stage=zero_stage, recompute=recompute)
            yield chosen
            if zero_stage:
                yield replace(chosen, is_offloaded=True)


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]
