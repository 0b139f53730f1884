"""A whole model on parts of a text: attention alone looks beyond them.

Norms, matrices, residuals and loss treat each position by itself, so every rank runs the model as
it is on its own positions. Three things must know of the others:

    attention    all keys before a query: ring, Ulysses or both, gathered keys
    positions    RoPE turns by the place in the text, not in the part
    loss         the mean over all counted tokens: parts may have different numbers of them

Parameters are copies; each sees its positions' part of their gradient, and the parts are summed.

Papers: Llama 3, 2407.21783, sec. 3.3.2; Ulysses x Ring, 2405.07719.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference.attention.dot_product import Mask
from reference.parallel.context.gathered import gathered_attention
from reference.parallel.context.layout import Layout, positions
from reference.parallel.context.partial import Kernel
from reference.parallel.context.ring import ring_attention
from reference.parallel.context.ulysses import ulysses_attention
from reference.parallel.data_parallel import TokenMean, token_mean
from reference.parallel.options import one_of
from reference.parallel.ranks import Comm
from reference.transformer import Llama
from reference.transformer.loss import IGNORED

Keys = Literal["ring", "gathered"]


class ContextParallel:
    """How a text is divided over the ranks of `comm`, the cp axis of a mesh.

    Ranks stand in a grid of comm.size / num_ulysses by num_ulysses: the ranks of a row, neighbours,
    divide heads between them; keys go along columns, round a ring or gathered.

    num_ulysses=1            ring attention, or gathered keys, alone
    num_ulysses=comm.size    Ulysses alone: a ring of one rank, whose layouts are all in order

    Raises: ValueError where num_ulysses does not divide the number of ranks; for an unknown layout
    or way of keys, or a block below 1.
    """

    def __init__(
        self,
        comm: Comm,
        *,
        num_ulysses: int = 1,
        layout: Layout = "zigzag",
        keys: Keys = "ring",
        block_size: int = 256,
    ) -> None:
        if num_ulysses < 1 or comm.size % num_ulysses:
            raise ValueError(
                f"num_ulysses: expected a divisor of {comm.size}, the number of ranks, got "
                f"{num_ulysses}"
            )
        one_of("keys", keys, Keys)
        mesh = comm.mesh(cp_ring=comm.size // num_ulysses, cp_ulysses=num_ulysses)
        self.comm, self.ring, self.ulysses = comm, mesh.cp_ring, mesh.cp_ulysses
        self.kernel = Kernel(is_causal=True, layout=layout, block_size=block_size)
        self._attend = ring_attention if keys == "ring" else gathered_attention

    def positions(self, seq_len: int) -> Int[Tensor, " t"]:
        """Where in a text of `seq_len` tokens this rank's are, in the order of its tensors.

        Raises: ValueError where the text does not divide.
        """
        return self._positions(seq_len, self.comm.rank).to(self.comm.device)

    def part(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's positions of a tensor that it has whole, tokens or targets; a copy."""
        return x.index_select(dim, self.positions(x.shape[dim]))

    def whole(self, part: Tensor, dim: int = 1) -> Tensor:
        """All positions in the order of the text, from everybody's parts; not differentiable."""
        gathered = self.comm.all_gather(part.detach().transpose(0, dim).contiguous())
        held = [self._positions(len(gathered), rank) for rank in range(self.comm.size)]
        order = torch.cat(held).argsort().to(gathered.device)
        return gathered[order].transpose(0, dim).contiguous()

    def attend(
        self,
        q: Float[Tensor, "B H t d"],
        k: Float[Tensor, "B K t d"],
        v: Float[Tensor, "B K t dv"],
        mask: Mask | None = None,
    ) -> Float[Tensor, "B H t dv"]:
        """Causal attention over the whole text: an `attend` of chapter 04's layer.

        Raises: ValueError for a mask; ranks agree on the causal one, and know no other.
        """
        if mask is not None:
            raise ValueError("mask: expected None, causal by position; pack texts of equal length")
        if self.ulysses.size == 1:
            return self._attend(q, k, v, self.ring, self.kernel)
        if self.ring.size == 1:  # its one rank's part is the text in order
            in_order = replace(self.kernel, layout="contiguous")
            return ulysses_attention(q, k, v, self.ulysses, in_order)
        return ulysses_attention(
            q, k, v, self.ulysses, self.kernel, ring=self.ring, attend=self._attend
        )  # fmt: skip

    def logits(self, model: Llama, tokens: Int[Tensor, "B t"]) -> Float[Tensor, "B t V"]:
        """Of this rank's part of the tokens: `model(tokens)` at its positions of the whole text.

        `model` may be a tensor parallel one; its ranks have the same part.

        Raises: ValueError for a text longer than the model's context.
        """
        seq_len, x = tokens.shape[1] * self.comm.size, model.embed_tokens(tokens)
        if seq_len > model.config.max_seq_len:
            raise ValueError(
                f"tokens: expected at most {model.config.max_seq_len} on all ranks together, the "
                f"model's context, got {seq_len}"
            )
        rotate = model._rotation(self.positions(seq_len), x.dtype, seq_len)
        for layer in model.layers:
            x = layer(x, None, rotate=rotate, attend=self.attend)
        return model.logits(x)

    def share_of_mean(
        self,
        losses: Float[Tensor, ...],
        is_counted: Bool[Tensor, ...] | None = None,
        mean: TokenMean | None = None,
    ) -> Float[Tensor, ""]:
        """This rank's share of the mean over all ranks' tokens; shares add up to the mean.

        `is_counted` leaves tokens out, padding for instance. Backward of the shares gives parts of
        the gradient, for `sum_gradients`. Zero where nobody counts any token. `mean` is that of a
        step of which this text is a part; without it, the text is all.
        """
        if is_counted is None:
            is_counted = torch.ones_like(losses, dtype=torch.bool)
        return (mean or token_mean(is_counted, self.comm)).share(losses, is_counted)

    def loss(
        self,
        logits: Float[Tensor, "B t V"],
        targets: Int[Tensor, "B t"],
        mean: TokenMean | None = None,
    ) -> Float[Tensor, ""]:
        """This rank's share of the mean cross-entropy; targets of -100 do not count."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(
            wide.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
        )
        return (mean or token_mean(targets, self.comm)).share(losses, targets)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the parts that ranks have found: all have the gradient of the whole text."""
        for parameter in parameters:
            if parameter.grad is not None:
                self.comm.all_reduce(parameter.grad)

    def _positions(self, seq_len: int, rank: int) -> Tensor:
        row, column = divmod(rank, self.ulysses.size)
        held: Any = positions(self.kernel.layout, seq_len, row, self.ring.size)
        if len(held) % self.ulysses.size:
            raise ValueError(
                f"seq_len: expected a multiple of {self.comm.size}, the number of ranks, got "
                f"{seq_len}; pad the text"
            )
        return held.chunk(self.ulysses.size)[column]
