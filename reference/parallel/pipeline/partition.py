"""A Llama as stages: the embedding with the first layers, norm and head with the last.

Parameters keep their names, so that the stages' together are the whole model's. Where embedding and
head are tied, the first and the last stage have a copy each, and the copies' gradients are summed.

Source: Megatron-LM, 1909.08053 and 2104.04473; for the tied copies, megatron's
_allreduce_word_embedding_grads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reference.attention import causal_mask, scaled_dot_product_attention
from reference.attention.layer import Attend
from reference.parallel.context import ContextParallel
from reference.parallel.options import at_least, one_of
from reference.parallel.pipeline.recompute import recompute, recomputed
from reference.parallel.ranks import Comm
from reference.transformer import Llama

Recompute = Literal["none", "selective", "full"]


def layers_of_stages(num_layers: int, num_stages: int) -> list[range]:
    """Contiguous layers for each stage; where they do not divide, the first have one more.

    Raises: ValueError for more stages than layers.
    """
    if not 1 <= num_stages <= num_layers:
        raise ValueError(
            f"num_stages: expected 1 to {num_layers}, the number of layers, got {num_stages}"
        )
    size, more = divmod(num_layers, num_stages)
    starts = [stage * size + min(stage, more) for stage in range(num_stages + 1)]
    return [range(starts[stage], starts[stage + 1]) for stage in range(num_stages)]


class LlamaStage(nn.Module):
    """Some layers of `model`, which may be a tensor parallel one, and is cut down to them.

    The first stage takes tokens, the last gives logits; between them the stream goes. `recompute`:
    "full" keeps the input of each block alone, "selective" all but what attention holds inside.
    With `context` tokens and stream are this rank's part of the positions.

    Raises: ValueError for another kind of recomputation.
    """

    def __init__(
        self,
        model: Llama,
        layers: range,
        *,
        recompute: Recompute = "none",
        context: ContextParallel | None = None,
    ) -> None:
        super().__init__()
        one_of("recompute", recompute, Recompute)
        num_layers = model.config.num_layers
        self.is_first, self.is_last = layers.start == 0, layers.stop == num_layers
        self.kind, self.context = recompute, context
        model.layers = nn.ModuleDict({str(i): model.layers[i] for i in layers})  # type: ignore
        if not self.is_last:
            del model.norm
            model.lm_head = None
        if not self.is_first and not (self.is_last and model.config.is_tied):
            del model.embed_tokens
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        model: Any = self.model
        seq_len = x.shape[1]
        if self.is_first:
            x = model.embed_tokens(x)
        elif getattr(model, "region", None) is not None and model.region.sequence_parallel:
            seq_len *= model.region.comm.size
        mask: Tensor | None = None
        attend: Attend = scaled_dot_product_attention
        if self.context is not None:
            seq_len *= self.context.comm.size
            positions, attend = self.context.positions(seq_len), self.context.attend
        else:
            positions = torch.arange(seq_len, device=x.device)
            mask = causal_mask(seq_len, seq_len, device=x.device) if seq_len > 1 else None
        rotate = model._rotation(positions, x.dtype, seq_len)
        for layer in model.layers.values():
            x = self._block(layer, x, mask, rotate, attend)
        return model.logits(x) if self.is_last else x

    def _block(
        self,
        layer: nn.Module,
        x: Tensor,
        mask: Tensor | None,
        rotate: Callable[[Tensor], Tensor],
        attend: Attend,
    ) -> Tensor:
        if self.kind == "full":
            return recompute(layer, x, mask, rotate=rotate, attend=attend)
        if self.kind == "selective":
            attend = recomputed(attend)
        return layer(x, mask, rotate=rotate, attend=attend)


def split_llama(
    model: Llama,
    rank: int,
    num_ranks: int,
    *,
    num_chunks: int = 1,
    recompute: Recompute = "none",
    context: ContextParallel | None = None,
) -> list[LlamaStage]:
    """The `num_chunks` stages of one rank: stages rank, rank + p, ... of p * num_chunks.

    `model` keeps its form, and shares its parameters with the stages: hand in a rank's own.

    Raises: ValueError for more stages than layers, a rank outside of the pipeline, or a head that
    is the embedding where the configuration does not say so.
    """
    head: Any = model.lm_head
    if head is not None and getattr(head, "weight", None) is model.embed_tokens.weight:
        raise ValueError(
            "model: embed_tokens.weight stands in two places, and config.is_tied is False; tie "
            "them by LlamaConfig(is_tied=True), so that stages sum their copies' gradients"
        )
    at_least(1, [("num_ranks", num_ranks), ("num_chunks", num_chunks)])
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank: expected 0 to {num_ranks - 1}, got {rank}")
    layers = layers_of_stages(model.config.num_layers, num_ranks * num_chunks)
    return [
        LlamaStage(_shallow(model), layers[rank + chunk * num_ranks],
                   recompute=recompute, context=context)
        for chunk in range(num_chunks)
    ]  # fmt: skip


def sum_tied_gradients(comm: Comm, stages: Sequence[LlamaStage]) -> None:
    """Add up the gradients of both copies of a tied embedding. A no-op where nothing is tied,
    or the embedding is frozen.

    Raises: ValueError where they are gone: ZeRO's stage 2 hands gradients over as they come.
    """
    model: Any = stages[0].model
    if not model.config.is_tied or comm.size == 1 or comm.rank not in (0, comm.size - 1):
        return
    model = stages[0].model if comm.rank == 0 else stages[-1].model
    weight = next(model.embed_tokens.parameters())
    if not weight.requires_grad:
        return
    if weight.grad is None:
        raise ValueError(
            "stages: expected the gradient of the tied embedding, there is none; call this after "
            "backward, and with ZeRO use stage 1: stage 2 has handed it over"
        )
    other, theirs = comm.size - 1 - comm.rank, torch.empty_like(weight)
    receiving = comm.irecv(theirs, other)
    sending = comm.isend(weight.grad.clone(), other)
    receiving.wait()
    sending.wait()
    weight.grad += theirs


def _shallow(model: Llama) -> Llama:
    """A copy whose modules can be taken out."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    return twin
