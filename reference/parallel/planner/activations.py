"""Bytes that forward leaves for backward, on one rank of a plan.

A GPT layer's are Korthikanti's (reference.parallel.tensor.layer_activation_bytes). A Llama's, in 16
bits, for each of a micro-batch's positions on this rank of t:

              fused kernels    this course's modules
    stream    8 D              16 D          two norms: input and output, or what they compute with
    heads     4 (H + K) d / t  the same      q, k, v and attention's output
    hidden    8 F / t          the same      gate, silu(gate), up, and their product
    weights   none             6 H S / t     the softmax in float32, and in 16 bits

Sequence parallelism divides the stream by t; the course's modules keep what they gathered, 4 D.

Loss: for each logit while its gradient is made, 14 bytes: the logits (2), the log-softmax in
float32 (4), the gradients after and before it (4 + 4). Vocabulary-parallel, in place: 10.

Papers: Korthikanti et al., 2205.05198, sec. 4; chapter 13 for the table of a GPT layer.
"""

from reference.parallel.options import one_of
from reference.parallel.planner.plans import Batch, Plan, Recompute
from reference.parallel.planner.shapes import ModelShape
from reference.parallel.tensor import layer_activation_bytes

LOGIT_BYTES, PARALLEL_LOGIT_BYTES = 14, 10


def layer_bytes(model: ModelShape, plan: Plan, batch: Batch, *, recompute: str = "") -> float:
    """What one layer keeps of one micro-batch; `recompute` in place of the plan's.

    Raises: ValueError for another kind of recomputation.
    """
    kind = recompute or plan.recompute
    one_of("recompute", kind, Recompute)
    if kind == "full":
        shares = plan.tensor if plan.sequence_parallel else 1
        return 2.0 * plan.tokens(batch) * model.dim / shares
    if model.is_gated:
        return _llama_layer_bytes(model, plan, batch, kind)
    return layer_activation_bytes(
        plan.tokens(batch) // plan.micro_batch,
        plan.micro_batch,
        model.dim,
        model.num_heads,
        num_ranks=plan.tensor,
        sequence_parallel=plan.sequence_parallel,
        recompute="selective" if plan.attention == "fused" else kind,  # type: ignore[arg-type]
    )


def _llama_layer_bytes(model: ModelShape, plan: Plan, batch: Batch, kind: str) -> float:
    shares = plan.tensor if plan.sequence_parallel else 1
    inner = 4 * (model.num_heads + model.num_kv_heads) * model.head_dim + 8 * model.hidden_dim
    stream = 8 * model.dim / shares
    if plan.attention == "eager":
        stream = (12 / shares + 4) * model.dim
        inner += 6 * model.num_heads * batch.seq_len if kind == "none" else 0
    return plan.tokens(batch) * (stream + inner / plan.tensor)


def working_bytes(model: ModelShape, plan: Plan, batch: Batch) -> float:
    """What one layer's backward needs besides what was kept: what it computes anew, and gradients.

    Eager attention has two gradients of its weights at a time, in float32; the hidden layer two or
    three in 16 bits.
    """
    anew = layer_bytes(model, plan, batch, recompute="none") - layer_bytes(model, plan, batch)
    hidden = (6 if model.is_gated else 4) * model.hidden_dim
    weights = 8 * model.num_heads * batch.seq_len if plan.attention == "eager" else 0
    return anew + plan.tokens(batch) * max(hidden, weights) / plan.tensor


def in_flight(plan: Plan, rank: int, num_micro: int) -> float:
    """Micro-batches whose activations stage `rank` of the pipeline keeps at most.

    In units of all the rank's layers: a chunk counts 1/v.
    Source: Narayanan et al., arXiv 2104.04473, sec. 2.2.
    """
    p, v = plan.pipeline, plan.num_chunks
    if plan.schedule == "GPipe":
        return num_micro
    if plan.schedule == "ZB-H1":
        return min(p, num_micro)
    if plan.schedule == "1F1B" or v == 1:
        return min(p - rank, num_micro)
    warm_up = 2 * (p - 1 - rank) + (v - 1) * p
    return min(warm_up + 1, num_micro * v) / v


def head_bytes(model: ModelShape, plan: Plan, batch: Batch) -> float:
    """Of the last norm, the logits and the loss: one micro-batch at a time."""
    shares = plan.tensor if plan.sequence_parallel else 1
    logit_bytes = PARALLEL_LOGIT_BYTES if plan.tensor > 1 else LOGIT_BYTES
    logits = logit_bytes * model.vocab_size / plan.tensor
    return plan.tokens(batch) * (4 * model.dim / shares + logits)
