"""Pipeline parallelism: each rank has some of the layers, and micro-batches flow through them.

    schedule = one_f_one_b(comm.size, num_micro)
    stages = split_llama(model, comm.rank, comm.size)
    pipeline = Pipeline(comm, stages, schedule, losses_of)
    pipeline.step(tokens, targets)      # gradients are in stages' parameters

schedules      who does what in which order, as data: GPipe, 1F1B, interleaved, ZB-H1
timing         what a schedule costs: event by event, and in closed form
deferred       a backward in two halves: inputs now, weights later
executor       a schedule carried out over messages
partition      a Llama as stages
recompute      forget activations, and compute them again: all, or attention's alone
circumstances  what a second run must find as the first one did
topology       who talks to whom when pipeline, tensor, context and data parallelism compose

Letters: p ranks of the pipeline, m micro-batches, v stages a rank (chunks).
"""

from reference.parallel.pipeline.deferred import WeightGradients
from reference.parallel.pipeline.executor import Pipeline
from reference.parallel.pipeline.partition import (
    LlamaStage,
    layers_of_stages,
    split_llama,
    sum_tied_gradients,
)
from reference.parallel.pipeline.recompute import recompute, recomputed
from reference.parallel.pipeline.schedules import (
    Action,
    Schedule,
    gpipe,
    interleaved,
    one_f_one_b,
    zero_bubble_h1,
)
from reference.parallel.pipeline.timing import (
    Timed,
    bubble_fraction,
    bubble_seconds,
    in_flight,
    peak_in_flight,
    simulate,
)
from reference.parallel.pipeline.topology import groups_along, megatron_groups

__all__ = [
    "Action",
    "LlamaStage",
    "Pipeline",
    "Schedule",
    "Timed",
    "WeightGradients",
    "bubble_fraction",
    "bubble_seconds",
    "gpipe",
    "groups_along",
    "in_flight",
    "interleaved",
    "layers_of_stages",
    "megatron_groups",
    "one_f_one_b",
    "peak_in_flight",
    "recompute",
    "recomputed",
    "simulate",
    "split_llama",
    "sum_tied_gradients",
    "zero_bubble_h1",
]
