"""Tensor parallelism: each rank has a part of every matrix.

    part = parallelize(copy.deepcopy(model), comm, sequence_parallel=True)
    logits = part(tokens)                                         # (B, T, V/N), this rank's
    losses = vocab_parallel_cross_entropy(logits, targets, comm)
    token_mean(targets).share(losses, targets).backward()         # targets of -100 do not count

A fine-tuned model is divided with its adapters, and `clip_grad_norm` clips by the whole norm:

    part = parallelize(add_adapter(model, LoRAConfig(rank=8, alpha=16)), comm)
    clip_grad_norm(part, 1.0, comm)                               # what all hold, counted once
    whole.load_state_dict(part.full_state_dict())                 # to save, merge, divide otherwise

`comm` is the group of ranks that share a model, such as `mesh.tp`: all of them get the same tokens,
and other axes of the mesh may have others.

operators     entering and leaving a parallel region: f, g and their sequence-parallel forms
cut           what a part takes over: names, dtypes, what is frozen or tied, buffers
layers        column- and row-parallel linear layers
vocabulary    embedding and cross-entropy over a divided vocabulary
adapters      LoRA on divided matrices
takeover      which models can be divided, and that nothing is lost
llama         a whole model
gradients     clipping by the whole gradient's norm
gpt           a layer with biases and dropout; which random numbers ranks share
overlap       a product that begins before its input has arrived
matmul        1D, 2D (SUMMA), 2.5D and 3D matrix products
propagation   from a few annotations to a program: shardings, and the collectives between them
activations   bytes kept for backward, in closed form

Letters: N ranks (t in the papers), B, T, D, F, V as everywhere; small letters are a rank's part.
"""

from reference.parallel.tensor.activations import layer_activation_bytes
from reference.parallel.tensor.adapters import ParallelAdapter
from reference.parallel.tensor.cut import Cut, cut_of
from reference.parallel.tensor.gpt import GPTLayer, ParallelGPTLayer, RandomStreams, dropout
from reference.parallel.tensor.gradients import clip_grad_norm
from reference.parallel.tensor.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SharedLinear,
    column_part,
    row_part,
)
from reference.parallel.tensor.llama import (
    ParallelBlock,
    ParallelLlama,
    parallelize,
    shard_attention,
)
from reference.parallel.tensor.matmul import block_of, matmul_1d, matmul_2_5d, matmul_2d
from reference.parallel.tensor.operators import (
    copy_to_ranks,
    gather_outputs,
    gather_positions,
    scatter_sum,
    sum_over_ranks,
)
from reference.parallel.tensor.overlap import gathered_linear, overlapped_linear
from reference.parallel.tensor.propagation import Einsum, Move, execute, moves, part_by, propagate
from reference.parallel.tensor.vocabulary import (
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)

__all__ = [
    "ColumnParallelLinear",
    "Cut",
    "Einsum",
    "GPTLayer",
    "Move",
    "ParallelAdapter",
    "ParallelBlock",
    "ParallelGPTLayer",
    "ParallelLlama",
    "RandomStreams",
    "RowParallelLinear",
    "SharedLinear",
    "VocabParallelEmbedding",
    "block_of",
    "clip_grad_norm",
    "column_part",
    "copy_to_ranks",
    "cut_of",
    "dropout",
    "execute",
    "gather_outputs",
    "gather_positions",
    "gathered_linear",
    "layer_activation_bytes",
    "matmul_1d",
    "matmul_2_5d",
    "matmul_2d",
    "moves",
    "overlapped_linear",
    "parallelize",
    "part_by",
    "propagate",
    "row_part",
    "scatter_sum",
    "shard_attention",
    "sum_over_ranks",
    "vocab_parallel_cross_entropy",
]
