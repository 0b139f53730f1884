"""From model, cluster and batch to a plan: memory of a rank, seconds of a step, and why not.

    model = llama_shape(PRESETS["llama-3.1-405b"])
    ranking = rank_plans(model, h100_cluster(16_384), Batch(2048, 8192))
    print(ranking.best)                    # how, how long, where time and memory go
    print(ranking.rejected[0].reasons)     # what another plan lacks

    weigh(Plan(data=8, zero_stage=3), model, cluster, batch)      # a plan of your own

shapes        what counts of a model         cluster      GPUs, links and what they reach
plans         sizes of the axes, misfits     activations  bytes kept for backward
memory        bytes of the fullest rank      kernels      seconds of a layer, head, optimizer
seconds       of a step, by cause            search       all plans, ranked
published     114 runs that were measured, as plans (published_mpt: a table of them)
"""

from reference.parallel.planner.cluster import (
    Cluster,
    Efficiency,
    a100_cluster,
    h100_cluster,
    perfect,
)
from reference.parallel.planner.memory import Memory, memory_bytes
from reference.parallel.planner.plans import Batch, Plan, misfits
from reference.parallel.planner.published import Run, published_runs
from reference.parallel.planner.search import Ranking, Verdict, candidates, rank_plans, weigh
from reference.parallel.planner.seconds import StepTime, model_flops, step_seconds
from reference.parallel.planner.shapes import ModelShape, gpt_shape, llama_shape

__all__ = [
    "Batch",
    "Cluster",
    "Efficiency",
    "Memory",
    "ModelShape",
    "Plan",
    "Ranking",
    "Run",
    "StepTime",
    "Verdict",
    "a100_cluster",
    "candidates",
    "gpt_shape",
    "h100_cluster",
    "llama_shape",
    "memory_bytes",
    "misfits",
    "model_flops",
    "perfect",
    "published_runs",
    "rank_plans",
    "step_seconds",
    "weigh",
]
