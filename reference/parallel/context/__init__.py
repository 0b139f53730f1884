"""Context parallelism: each rank has a part of the positions, through the whole model.

    context = ContextParallel(mesh.cp, layout="zigzag")            # or num_ulysses=2, keys=...
    logits = context.logits(model, context.part(tokens))           # (B, t, V), this rank's
    context.loss(logits, context.part(targets)).backward()         # its share of the mean
    context.sum_gradients(model.parameters())

`mesh.cp` is the group of ranks that share a text: all of them get the same rows of the batch. It
composes with the other axes. Tensor parallel: hand `parallelize(model, mesh.tp)` in as the model,
and vocab_parallel_cross_entropy's losses to `share_of_mean`. Data parallel and micro-batches: hand
the mean of the step to `loss`, token_mean(targets, mesh["dp", "cp"], averaged_by=...), of which
data_parallel.token_mean says who averages. One attention by itself: ring_attention(q, k, v,
mesh.cp, Kernel(...)), and so forth.

layout        contiguous, zigzag, striped; who sees whom, and how much work that is
partial       attention in parts: joined by log-sum-exp forward, added backward
ring          keys and values go round
gathered      keys and values of all ranks at once
ulysses       parts of positions against parts of heads; with a ring, both
whole_model   positions, loss and gradients of a Llama
cost          bytes and seconds in closed form

Letters: N ranks, t = T/N positions of a rank, h = H/N of its heads.
"""

from reference.parallel.context.cost import attention_bytes, least_part, ring_forward_seconds
from reference.parallel.context.gathered import gathered_attention
from reference.parallel.context.layout import (
    Layout,
    Stretch,
    Tile,
    causal_pairs,
    positions,
    stretches,
    tiles,
)
from reference.parallel.context.partial import Kernel, Partial
from reference.parallel.context.ring import ring_attention
from reference.parallel.context.ulysses import (
    heads_from_positions,
    positions_from_heads,
    ulysses_attention,
)
from reference.parallel.context.whole_model import ContextParallel

__all__ = [
    "ContextParallel",
    "Kernel",
    "Layout",
    "Partial",
    "Stretch",
    "Tile",
    "attention_bytes",
    "causal_pairs",
    "gathered_attention",
    "heads_from_positions",
    "least_part",
    "positions",
    "positions_from_heads",
    "ring_attention",
    "ring_forward_seconds",
    "stretches",
    "tiles",
    "ulysses_attention",
]
