"""A Llama of which each rank has its heads, its part of the hidden width, and of the vocabulary.

    x = x + leave(attention(enter(norm(x))))          enter: copy      or gather positions
    x = x + leave(mlp(enter(norm(x))))                leave: all-reduce or reduce-scatter

Attention and SwiGLU are chapter 04's and 02's, with smaller matrices. Two sums a block forward, two
backward. With sequence parallelism the stream between them lies in parts of positions: the same
bytes travel, and what norms, residuals and dropout keep is divided by N.

Papers: Megatron-LM, 1909.08053, sec. 3; sequence parallelism, 2205.05198, sec. 4.2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reference.attention import Attention
from reference.normalization import RMSNorm, rms_norm
from reference.parallel.ranks import Comm
from reference.parallel.tensor.layers import SharedLinear, column_part, row_part
from reference.parallel.tensor.operators import (
    copy_to_ranks,
    gather_positions,
    scatter_sum,
    sum_over_ranks,
)
from reference.parallel.tensor.vocabulary import VocabParallelEmbedding
from reference.transformer import Llama


class Region:
    """How a parallel region is entered and left: with all positions outside of it, or parts."""

    def __init__(self, comm: Comm, *, sequence_parallel: bool) -> None:
        self.comm, self.sequence_parallel = comm, sequence_parallel

    def enter(self, x: Tensor) -> Tensor:
        return (gather_positions if self.sequence_parallel else copy_to_ranks)(x, self.comm)

    def leave(self, x: Tensor) -> Tensor:
        return (scatter_sum if self.sequence_parallel else sum_over_ranks)(x, self.comm)

    def norm(self, layer: RMSNorm) -> nn.Module:
        """On parts of positions a norm's weight sees a part of its gradient."""
        return PositionsNorm(layer, self.comm) if self.sequence_parallel else layer


class PositionsNorm(nn.Module):
    """An RMSNorm of this rank's positions; its weight's gradient is summed over ranks."""

    def __init__(self, layer: RMSNorm, comm: Comm) -> None:
        super().__init__()
        self.weight, self.eps, self.comm = layer.weight, layer.eps, comm

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return rms_norm(x, copy_to_ranks(self.weight, self.comm), eps=self.eps)


class ParallelBlock(nn.Module):
    """One block, this rank's part of it."""

    def __init__(self, block: Any, region: Region) -> None:
        super().__init__()
        self.region = region
        self.input_layernorm = region.norm(block.input_layernorm)
        self.self_attn = shard_attention(block.self_attn, region.comm)
        self.post_attention_layernorm = region.norm(block.post_attention_layernorm)
        self.mlp = block.mlp
        for name in ("gate_proj", "up_proj"):
            setattr(self.mlp, name, column_part(getattr(self.mlp, name), region.comm))
        self.mlp.down_proj = row_part(self.mlp.down_proj, region.comm)

    def forward(self, x: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        enter, leave = self.region.enter, self.region.leave
        x = x + leave(self.self_attn(enter(self.input_layernorm(x)), mask, **options))
        return x + leave(self.mlp(enter(self.post_attention_layernorm(x))))


class ParallelLlama(Llama):
    """`model`'s part for this rank of `comm`; takes its parameters over, so hand in a copy.

    Called as a Llama; the logits are this rank's, (B, T, V/N), for vocab_parallel_cross_entropy.
    Every rank of `comm` gets the same tokens.

    Raises: ValueError where heads, hidden width, vocabulary (or with sequence parallelism the
    number of tokens) do not divide by the number of ranks.
    """

    embed_tokens: Any
    lm_head: Any
    norm: Any

    def __init__(self, model: Llama, comm: Comm, *, sequence_parallel: bool = False) -> None:
        nn.Module.__init__(self)
        self.config, self.comm = model.config, comm
        self.region = Region(comm, sequence_parallel=sequence_parallel)
        self.embed_tokens = Left(VocabParallelEmbedding(model.embed_tokens.weight, comm),
                                 self.region.leave)  # fmt: skip
        self.layers = nn.ModuleList(ParallelBlock(b, self.region) for b in model.layers)
        self.norm = self.region.norm(model.norm)
        self.lm_head = None if model.lm_head is None else column_part(model.lm_head, comm)

    def logits(self, x: Float[Tensor, "B t D"]) -> Float[Tensor, "B T v"]:
        """The last norm and this rank's part of the head."""
        head = self.embed_tokens.inner if self.lm_head is None else self.lm_head
        return F.linear(self.region.enter(self.norm(x)), head.weight)

    def whole(self, named: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """The whole model's tensors by their names in a Llama, gathered: `named` picks the tensor
        of a parameter (itself, or its gradient). Every rank calls it, every rank gets all."""
        found = {}
        for name, parameter in self.named_parameters():
            found[name.replace(".inner", "")] = _whole(name, named(parameter).detach(), self)
        return found


class Left(nn.Module):
    """A layer whose output leaves the parallel region."""

    def __init__(self, inner: nn.Module, leave: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.leave = inner, leave

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.inner(x))


def shard_attention(layer: Attention, comm: Comm) -> Attention:
    """This rank's heads of an attention layer, in place.

    With fewer key/value heads than ranks, N/K ranks share one: each holds a copy, and the
    gradients of the copies are summed.

    Raises: ValueError where query heads do not divide by ranks, or key/value heads neither divide
    nor are divided.
    """
    n, num_kv_heads = comm.size, layer.num_kv_heads
    if layer.num_heads % n or (num_kv_heads % n and n % num_kv_heads):
        raise ValueError(
            f"num_heads, num_kv_heads: expected {layer.num_heads} to be a multiple of {n} ranks, "
            f"and {num_kv_heads} a multiple or a divisor"
        )
    layer.q_proj, layer.o_proj = column_part(layer.q_proj, comm), row_part(layer.o_proj, comm)
    if num_kv_heads >= n:
        layer.k_proj, layer.v_proj = (column_part(p, comm) for p in (layer.k_proj, layer.v_proj))
    else:
        sharing = comm.split(comm.rank * num_kv_heads // n, name="tp_kv")
        assert sharing is not None
        for name in ("k_proj", "v_proj"):
            heads = getattr(layer, name).weight.detach().chunk(num_kv_heads)
            part = heads[comm.rank * num_kv_heads // n].clone()
            setattr(layer, name, SharedLinear(part, sharing))
    layer.num_heads //= n
    layer.num_kv_heads = max(1, num_kv_heads // n)
    return layer


def parallelize(model: Llama, comm: Comm, *, sequence_parallel: bool = False) -> ParallelLlama:
    """This rank's part of `model` under tensor parallelism over `comm`. See ParallelLlama."""
    return ParallelLlama(model, comm, sequence_parallel=sequence_parallel)


def _whole(name: str, part: Tensor, model: ParallelLlama) -> Tensor:
    comm = model.comm
    if "norm" in name:
        return part
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return comm.all_gather(part.T.contiguous()).T
    gathered = comm.all_gather(part.contiguous())
    if name.endswith(("k_proj.weight", "v_proj.weight")):
        copies = max(1, comm.size // model.config.num_kv_heads)
        gathered = torch.cat(gathered.chunk(comm.size)[::copies])
    return gathered
