"""A Llama of which each rank has its heads, its part of the hidden width, and of the vocabulary.

    x = x + leave(attention(enter(norm(x))))          enter: copy      or gather positions
    x = x + leave(mlp(enter(norm(x))))                leave: all-reduce or reduce-scatter

Attention and SwiGLU are chapter 04's and 02's, with smaller matrices. Two sums a block forward, two
backward. With sequence parallelism the stream between them lies in parts of positions: the same
bytes travel, and what norms, residuals and dropout keep is divided by N.

Parameters keep their names; what is frozen, tied or adapted stays so, and buffers and the training
mode are copied.

Papers: Megatron-LM, 1909.08053, sec. 3; sequence parallelism, 2205.05198, sec. 4.2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from reference.attention import Attention, KVCache, scaled_dot_product_attention
from reference.attention.dot_product import Mask
from reference.attention.layer import Attend
from reference.normalization import RMSNorm, rms_norm
from reference.parallel.ranks import Comm
from reference.parallel.tensor.adapters import agree_on_adapters, bias_of_sum, divide
from reference.parallel.tensor.cut import Cut, adopt, copied, cut_of, tie
from reference.parallel.tensor.operators import (
    copy_to_ranks,
    gather_outputs,
    gather_positions,
    scatter_sum,
    sum_over_ranks,
)
from reference.parallel.tensor.takeover import check_can_be_divided, check_nothing_is_lost
from reference.parallel.tensor.vocabulary import VocabParallelEmbedding
from reference.transformer import Llama


class Region:
    """How a parallel region is entered and left: with all positions outside of it, or parts."""

    def __init__(self, comm: Comm, *, sequence_parallel: bool) -> None:
        self.comm, self.sequence_parallel = comm, sequence_parallel

    def enter(self, x: Tensor) -> Tensor:
        return (gather_positions if self.sequence_parallel else copy_to_ranks)(x, self.comm)

    def leave(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The sum of all ranks' x, and the bias, once."""
        y = (scatter_sum if self.sequence_parallel else sum_over_ranks)(x, self.comm)
        return y if bias is None else y + self.of_positions(bias)

    def of_positions(self, parameter: Tensor) -> Tensor:
        """What acts on the stream sees, on parts of positions, a part of its gradient."""
        return copy_to_ranks(parameter, self.comm) if self.sequence_parallel else parameter

    def norm(self, layer: RMSNorm) -> RMSNorm:
        """A copy of the norm, for the stream."""
        return PositionsNorm(layer, self.comm) if self.sequence_parallel else copied(layer)


class PositionsNorm(RMSNorm):
    """An RMSNorm of this rank's positions; its weight's gradient is summed over ranks."""

    def __init__(self, layer: RMSNorm, comm: Comm) -> None:
        nn.Module.__init__(self)
        adopt(self, layer)
        self.eps, self.comm = layer.eps, comm

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return rms_norm(x, copy_to_ranks(self.weight, self.comm), eps=self.eps)


class ParallelBlock(nn.Module):
    """One block, this rank's part of it."""

    def __init__(self, block: Any, region: Region) -> None:
        super().__init__()
        adopt(self, block)
        self.region = region
        self.input_layernorm = region.norm(block.input_layernorm)
        self.self_attn = shard_attention(block.self_attn, region.comm)
        self.post_attention_layernorm = region.norm(block.post_attention_layernorm)
        self.mlp = copied(block.mlp)
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            setattr(self.mlp, name, divide(getattr(block.mlp, name), region.comm, dim))

    def forward(self, x: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        region, attention, mlp = self.region, self.self_attn, self.mlp
        h = attention(region.enter(self.input_layernorm(x)), mask, **options)
        x = x + region.leave(h, bias_of_sum(attention.o_proj))
        h = mlp(region.enter(self.post_attention_layernorm(x)))
        return x + region.leave(h, bias_of_sum(mlp.down_proj))


class ParallelEmbedding(VocabParallelEmbedding):
    """This rank's rows of an embedding; its output leaves the parallel region."""

    def __init__(self, layer: nn.Embedding, region: Region) -> None:
        super().__init__(layer.weight, region.comm)
        self.cuts, self.region = {"weight": Cut(0)}, region
        adopt(self, layer, region.comm, ("vocab_size", "dim"))

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B t D"]:
        return self.region.leave(super().forward(tokens))


class ParallelLlama(Llama):
    """`model`'s part for this rank of `comm`; `model` itself stays as it is.

    Called as a Llama; the logits are this rank's, (B, T, V/N), for vocab_parallel_cross_entropy, or
    with `gather_logits` all, (B, T, V), on each rank: to generate, or for any other loss that all
    ranks compute alike. Every rank of `comm` gets the same tokens, generated ones too: choose them
    greedily, or with one seed on all ranks.

    LoRA's adapters are divided with their matrices (adapters.py). Put them on before: they cannot
    be added to parts. Dropout in them draws one mask for all ranks.

    Raises: ValueError where heads, hidden width, vocabulary (or with sequence parallelism the
    number of tokens) do not divide by the number of ranks, and for a model that would not be the
    same afterwards: modules of other kinds (QLoRA's and fused layers, bottlenecks), hooks.
    """

    embed_tokens: Any
    lm_head: Any
    norm: Any

    def __init__(
        self,
        model: Llama,
        comm: Comm,
        *,
        sequence_parallel: bool = False,
        gather_logits: bool = False,
    ) -> None:
        check_can_be_divided(model)
        nn.Module.__init__(self)
        adopt(self, model)
        self.config, self.comm, self.gather_logits = model.config, comm, gather_logits
        self.region = Region(comm, sequence_parallel=sequence_parallel)
        self.embed_tokens = ParallelEmbedding(model.embed_tokens, self.region)
        self.layers = nn.ModuleList(ParallelBlock(b, self.region) for b in model.layers)
        self.layers.training = model.layers.training
        self.norm = self.region.norm(model.norm)
        self.lm_head = None if model.lm_head is None else divide(model.lm_head, comm, 0)
        check_nothing_is_lost(self, model)
        tie(self, model)
        agree_on_adapters(self, comm)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, ...] | None = None,
        cache: KVCache | None = None,
        *,
        mask: Mask | None = None,
        attend: Attend = scaled_dot_product_attention,
        num_logits: int | None = None,
    ) -> Float[Tensor, "B N v"]:
        """As Llama's. Raises: as Llama's, and ValueError for a cache where its rows would get parts
        of logits, or have parts of positions."""
        if cache is not None and self.region.sequence_parallel:
            raise ValueError(
                "cache: expected none with sequence parallelism, which divides positions; "
                "parallelize(model, comm, gather_logits=True) generates"
            )
        if cache is not None and not self.gather_logits:
            raise ValueError(
                "cache: expected whole logits beside it, to choose tokens from; "
                "parallelize(model, comm, gather_logits=True) has them"
            )
        last = num_logits if self.region.sequence_parallel and (num_logits or 0) > 0 else None
        logits = super().forward(tokens, positions, cache, mask=mask, attend=attend,
                                 num_logits=None if last else num_logits)  # fmt: skip
        return logits if last is None else logits[:, -last:]

    def logits(self, x: Float[Tensor, "B t D"]) -> Float[Tensor, "B T v"]:
        """The last norm and this rank's part of the head, or all of it with `gather_logits`."""
        x = self.region.enter(self.norm(x))
        tied = self.lm_head is None
        y = F.linear(x, self.embed_tokens.weight) if tied else self.lm_head(x)
        return gather_outputs(y, self.comm) if self.gather_logits else y

    def whole(self, named: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
        """The whole model's tensors by their names in a Llama, gathered: `named` picks the tensor
        of a parameter (itself, or its gradient); where that is None, as a frozen parameter's
        gradient is, there is no entry. Every rank calls it, every rank gets all."""
        found = {}
        for name, parameter in self.named_parameters():
            if (part := named(parameter)) is not None:
                found[name] = _gathered(self, name, part)
        return found

    def full_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the whole model, adapters and buffers included: copies, on every rank.

        A Llama with the same adapters loads it, and can be divided by another number of ranks,
        merged, or saved.
        """
        parts = self.state_dict(keep_vars=True)
        return {
            name: _gathered(self, name, part).contiguous().clone() for name, part in parts.items()
        }


def shard_attention(layer: Attention, comm: Comm) -> Attention:
    """This rank's heads of an attention layer, as a layer of its own.

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
    part, sharing = copied(layer), None
    if num_kv_heads < n:
        sharing = comm.split(comm.rank * num_kv_heads // n, name="tp_kv")
    part.num_heads, part.num_kv_heads = layer.num_heads // n, max(1, num_kv_heads // n)
    part._modules |= {
        "q_proj": divide(layer.q_proj, comm, 0),
        "k_proj": divide(layer.k_proj, comm, 0, sharing),
        "v_proj": divide(layer.v_proj, comm, 0, sharing),
        "o_proj": divide(layer.o_proj, comm, 1),
    }
    return part


def parallelize(
    model: Llama, comm: Comm, *, sequence_parallel: bool = False, gather_logits: bool = False
) -> ParallelLlama:
    """This rank's part of `model` under tensor parallelism over `comm`. See ParallelLlama."""
    return ParallelLlama(
        model, comm, sequence_parallel=sequence_parallel, gather_logits=gather_logits
    )


def _gathered(model: ParallelLlama, name: str, part: Tensor) -> Tensor:
    path, _, own = name.rpartition(".")
    return cut_of(model.get_submodule(path), own).whole(part.detach(), model.comm)
