"""A plan: how many ways each axis divides the work, and what is kept, recomputed or put away.

Ranks are numbered as Megatron's: tensor runs fastest, then context, data, pipeline. So a tensor
group lies within a node where it has no more ranks than one, and stages are far apart.
"""

from dataclasses import dataclass
from typing import Literal

from reference.parallel.options import at_least, one_of
from reference.parallel.planner.cluster import Cluster
from reference.parallel.planner.shapes import ModelShape

Schedule = Literal["GPipe", "1F1B", "interleaved", "ZB-H1"]
Recompute = Literal["none", "selective", "full"]
Kernel = Literal["eager", "fused"]


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    Raises: ValueError for counts below 1.
    """

    num_sequences: int
    seq_len: int

    def __post_init__(self) -> None:
        at_least(1, [("num_sequences", self.num_sequences), ("seq_len", self.seq_len)])

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.seq_len


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the axes and choices along them.

    `zero_stage` shards over data and context ranks together: 0 is DDP. `micro_batch` counts
    sequences. `num_chunks` stages stand on each rank of an interleaved pipeline. `is_offloaded`:
    the optimizer and its states are the host's. `attention`: "eager" writes the s x s weights,
    "fused" never does. `is_overlapped`: gradients travel while backward runs (ZeRO-3 always
    prefetches, and has no other way).

    Raises: ValueError for a schedule, a kind of recomputation or of attention that there is not, or
    gradients below a byte. Sizes that do not fit are `misfits`.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    micro_batch: int = 1
    zero_stage: int = 0
    sequence_parallel: bool = False
    schedule: Schedule = "1F1B"
    num_chunks: int = 1
    recompute: Recompute = "none"
    is_offloaded: bool = False
    attention: Kernel = "fused"
    is_overlapped: bool = True
    gradient_bytes: int = 2

    def __post_init__(self) -> None:
        one_of("schedule", self.schedule, Schedule)
        one_of("recompute", self.recompute, Recompute)
        one_of("attention", self.attention, Kernel)
        at_least(1, [("gradient_bytes", self.gradient_bytes)])

    @property
    def num_gpus(self) -> int:
        return self.data * self.tensor * self.pipeline * self.context

    @property
    def replicas(self) -> int:
        """Ranks among which parameters are alike: ZeRO's group."""
        return self.data * self.context

    def num_micro(self, batch: Batch) -> int:
        """Micro-batches that a pipeline takes in a step."""
        return batch.num_sequences // (self.data * self.micro_batch)

    def tokens(self, batch: Batch) -> int:
        """Of one micro-batch on one rank."""
        return self.micro_batch * batch.seq_len // self.context

    def __str__(self) -> str:
        axes = [("TP", self.tensor), ("CP", self.context), ("PP", self.pipeline), ("DP", self.data)]
        words = [f"{name}{size}" for name, size in axes if size > 1] or ["1 GPU"]
        if self.sequence_parallel:
            words.append("SP")
        words += [f"ZeRO-{self.zero_stage}"] if self.zero_stage else []
        words += ["offload"] if self.is_offloaded else []
        if self.pipeline > 1:
            words.append(self.schedule + (f" v{self.num_chunks}" if self.num_chunks > 1 else ""))
        words += [f"micro-batch {self.micro_batch}"]
        words += [f"{self.recompute} recomputation"] if self.recompute != "none" else []
        return " ".join(words)


def misfits(plan: Plan, model: ModelShape, cluster: Cluster, batch: Batch) -> list[str]:
    """Why a plan cannot be carried out, before memory is asked: nothing, or a reason for each."""
    sizes = (plan.data, plan.tensor, plan.pipeline, plan.context, plan.micro_batch, plan.num_chunks)
    if min(sizes) < 1:
        return [f"sizes of axes, micro-batch and chunks: expected at least 1, got {min(sizes)}"]
    found = [*_arrangement(plan, cluster), *_division(plan, model, batch)]
    if found:
        return found
    if plan.schedule == "interleaved" and plan.num_micro(batch) % plan.pipeline:
        found.append(
            f"interleaved: {plan.num_micro(batch)} micro-batches are no multiple of "
            f"{plan.pipeline} stages"
        )
    return found


def _arrangement(plan: Plan, cluster: Cluster) -> list[str]:
    found = []
    if plan.num_gpus != cluster.num_gpus:
        found.append(f"{plan.num_gpus} ranks on {cluster.num_gpus} GPUs")
    if plan.zero_stage not in (0, 1, 2, 3):
        found.append(f"ZeRO has stages 0 to 3, not {plan.zero_stage}")
    if plan.is_offloaded and plan.zero_stage == 0:
        found.append("offload: needs ZeRO, which has each rank update a part")
    if plan.sequence_parallel and plan.tensor == 1:
        found.append("sequence parallelism: goes with tensor parallelism")
    if plan.num_chunks > 1 and plan.schedule != "interleaved":
        found.append(f"{plan.num_chunks} chunks: only the interleaved schedule has them")
    if plan.context > 1 and plan.attention != "fused":
        found.append("context parallelism: needs fused attention, which merges partial softmaxes")
    if plan.zero_stage == 2 and plan.pipeline > 1 and not plan.is_overlapped:
        found.append("ZeRO-2 in a pipeline: only with overlap")
    if plan.zero_stage == 3 and not plan.is_overlapped:
        found.append("ZeRO-3: only with overlap; it prefetches")
    return found


def _division(plan: Plan, model: ModelShape, batch: Batch) -> list[str]:
    found = []
    per_step = plan.data * plan.micro_batch
    checks = [
        ("query heads", model.num_heads, "tensor ranks", plan.tensor),
        ("hidden width", model.hidden_dim, "tensor ranks", plan.tensor),
        ("sequences", batch.num_sequences, "data ranks x micro-batch", per_step),
    ]
    if plan.context > 1:
        checks.append(("positions", batch.seq_len, "zigzag blocks", 2 * plan.context))
    if plan.sequence_parallel:
        checks.append(("positions", batch.seq_len, "tensor x context", plan.tensor * plan.context))
    for what, size, by, ways in checks:
        if size % ways:
            found.append(f"{size} {what} do not divide by {ways} {by}")
    if model.num_kv_heads % plan.tensor and plan.tensor % model.num_kv_heads:
        found.append(f"{model.num_kv_heads} key/value heads on {plan.tensor} tensor ranks")
    if plan.pipeline * plan.num_chunks > model.num_layers:
        stages = plan.pipeline * plan.num_chunks
        found.append(f"{stages} stages for {model.num_layers} layers")
    return found
