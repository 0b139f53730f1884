"""Seconds of a layer, of the head and of the optimizer on one rank, kernel by kernel.

Element-wise work is counted in elements read and written, of 2 bytes:

    for each of D     norm 2 + 3, twice; residual 3 + 3, twice; dropout 0.5 + 2.5, twice
    for each of F     GELU 2 + 3; SwiGLU 3 + 5                  (forward + backward)
    for each pair of eager attention   softmax 2 + 3, dropout 2.5 + 2.5, and by the batched
                      products, which are bound by these and not by arithmetic, 2 + 4
    for each logit    28 bytes: float32 copies of logits, softmax and gradient

so that wide models, whose products grow with D^2, come nearer to the peak.
"""

from dataclasses import dataclass

from reference.parallel.planner.cluster import Cluster
from reference.parallel.planner.plans import Batch, Plan
from reference.parallel.planner.shapes import ModelShape

NORM, RESIDUAL, DROPOUT = (4, 6), (6, 6), (1, 5)
GELU, SWIGLU = (2, 3), (3, 5)
SOFTMAX, WEIGHT_DROPOUT, WEIGHT_PRODUCTS = (2, 3), (2.5, 2.5), (2, 4)
LOGIT_TRAFFIC_BYTES = 28
FUSED_BACKWARD = 2.5  # five products where forward has two (FlashAttention-2, 2307.08691, sec. 3)
OPTIMIZER_TRAFFIC_BYTES = 28  # read and write three float32, read the gradient, write 16 bits


@dataclass(frozen=True)
class LayerSeconds:
    """One micro-batch through one layer. `tensor` and `context` are what communication adds."""

    forward: float
    backward: float
    recompute: float
    tensor: float
    context: float


def layer_seconds(model: ModelShape, plan: Plan, cluster: Cluster, batch: Batch) -> LayerSeconds:
    """Of one layer on one rank; `recompute` is what the plan does again before backward."""
    tokens = plan.tokens(batch)
    products = model.layer_flops(tokens) / plan.tensor / cluster.flops_per_second
    around, around_back = _element_wise_seconds(model, plan, cluster, tokens)
    attend, attend_back = attention_seconds(model, plan, cluster, batch)
    forward = products + around + attend
    exchange = 2 * cluster.collective_seconds("all_reduce", 2 * tokens * model.dim, plan.tensor)
    again = {"none": 0.0, "selective": attend, "full": forward}[plan.recompute]
    if plan.recompute == "selective" and plan.attention == "fused":
        again = 0.0  # the kernel does it within its backward
    return LayerSeconds(
        forward=forward,
        backward=2 * products + around_back + attend_back,
        recompute=again,
        tensor=(3 if plan.recompute == "full" else 2) * exchange,
        context=_ring_seconds(model, plan, cluster, tokens, attend, attend_back),
    )


def _element_wise_seconds(
    model: ModelShape, plan: Plan, cluster: Cluster, tokens: int
) -> tuple[float, float]:
    stream_shares = plan.tensor if plan.sequence_parallel else 1
    kernels = [NORM, RESIDUAL] + ([DROPOUT] if model.has_dropout else [])
    hidden = SWIGLU if model.is_gated else GELU
    passes = []
    for way in (0, 1):
        stream = sum(kernel[way] for kernel in kernels) * model.dim / stream_shares
        inner = hidden[way] * model.hidden_dim / plan.tensor
        passes.append(2 * tokens * (stream + inner) / cluster.traffic_bytes_per_second)
    return passes[0], passes[1]


def attention_seconds(
    model: ModelShape, plan: Plan, cluster: Cluster, batch: Batch
) -> tuple[float, float]:
    """Of q k^T, softmax and P v, forward and backward. Fused kernels skip what the mask hides."""
    pairs = plan.tokens(batch) * batch.seq_len / plan.tensor
    if plan.attention == "fused":
        flops = model.pair_flops() * pairs / 2
        forward = flops / cluster.attention_flops_per_second
        return forward, FUSED_BACKWARD * forward
    weights = 2 * model.num_heads * pairs / cluster.traffic_bytes_per_second  # one pass over them
    arithmetic = model.pair_flops() * pairs / cluster.flops_per_second
    kernels = [SOFTMAX] + ([WEIGHT_DROPOUT] if model.has_dropout else [])
    around = [sum(kernel[way] for kernel in kernels) * weights for way in (0, 1)]
    return (
        max(arithmetic, WEIGHT_PRODUCTS[0] * weights) + around[0],
        max(2 * arithmetic, WEIGHT_PRODUCTS[1] * weights) + around[1],
    )


def _ring_seconds(
    model: ModelShape, plan: Plan, cluster: Cluster, tokens: int, forward: float, backward: float
) -> float:
    """What Ring Attention's sends take longer than the attention they hide behind.

    Keys and values go round once forward; backward they go round again, and their gradients.
    """
    if plan.context == 1:
        return 0.0
    num_bytes = 2 * 2 * tokens * model.num_kv_heads * model.head_dim
    num_bytes //= min(plan.tensor, model.num_kv_heads)
    hop = cluster.message_seconds(num_bytes, plan.tensor)
    steps = plan.context - 1
    passes = 2 if plan.recompute == "full" else 1
    late_forward = max(0.0, steps * hop - forward * steps / plan.context)
    late_backward = max(0.0, steps * 2 * hop - backward * steps / plan.context)
    return passes * late_forward + late_backward


def head_seconds(model: ModelShape, plan: Plan, cluster: Cluster, batch: Batch) -> float:
    """Logits and loss of one micro-batch, forward and backward."""
    tokens = plan.tokens(batch)
    products = 3 * model.head_flops(tokens) / plan.tensor / cluster.flops_per_second
    traffic = LOGIT_TRAFFIC_BYTES * tokens * model.vocab_size / plan.tensor
    return products + traffic / cluster.traffic_bytes_per_second


def optimizer_seconds(
    model: ModelShape, plan: Plan, cluster: Cluster, num_parameters: float
) -> float:
    """Adam on this rank's part; offloaded, on the host, with gradients down and parameters up."""
    mine = num_parameters / (plan.replicas if plan.zero_stage else 1)
    num_bytes = OPTIMIZER_TRAFFIC_BYTES * mine
    if not plan.is_offloaded:
        return num_bytes / cluster.traffic_bytes_per_second
    host = cluster.hardware.host
    moved = (plan.gradient_bytes + 2) * mine / host.bytes_per_second + 2 * host.latency_seconds
    return num_bytes / cluster.host_bytes_per_second + moved
