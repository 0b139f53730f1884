"""A GPT layer with biases and dropout, cut by heads: where copies must differ and where not.

What all ranks hold (a bias after a sum, dropout on the stream) must be the same on all; what each
has a part of (dropout on its heads' attention weights) must be different on each, or heads would
drop the same places. So a rank has two streams of random numbers: `shared`, with one seed
everywhere, and `own`. With sequence parallelism a rank has its own positions, and dropout on the
stream is `own` as well.

This is the layer for which Korthikanti et al. count activations: 4 D wide, GELU, dropout three
times.

Papers: Megatron-LM, 1909.08053, sec. 3 and app. B.1; 2205.05198, sec. 4.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reference.parallel.ranks import Comm
from reference.parallel.tensor.cut import adopt, copied
from reference.parallel.tensor.layers import column_part, row_part
from reference.parallel.tensor.llama import Region

RANK_SEED_OFFSET = 2718  # as Megatron-LM's


class RandomStreams:
    """Generators of a rank: `shared` draws the same on all ranks of `comm`, `own` differs."""

    def __init__(self, comm: Comm, seed: int) -> None:
        self.shared = torch.Generator(comm.device).manual_seed(seed)
        self.own = torch.Generator(comm.device).manual_seed(seed + RANK_SEED_OFFSET + comm.rank)


class _Dropout(torch.autograd.Function):
    """Keeps a mask of one byte a number, as torch's own kernels do."""

    @staticmethod
    def forward(ctx: object, x: Tensor, rate: float, generator: torch.Generator) -> Tensor:
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        mask.bernoulli_(1 - rate, generator=generator)
        ctx.save_for_backward(mask)  # type: ignore[attr-defined]
        ctx.scale = 1 / (1 - rate)  # type: ignore[attr-defined]
        return x * mask * ctx.scale  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0] * mask * ctx.scale, None, None  # type: ignore[attr-defined]


def dropout(
    x: Float[Tensor, "*shape"], rate: float, generator: torch.Generator
) -> Float[Tensor, "*shape"]:
    """Zero each number with probability `rate` by a generator's draw, and scale up the others.

    Raises: ValueError for a rate outside of [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate: expected 0 <= rate < 1, got {rate}")
    return _Dropout.apply(x, rate, generator) if rate else x


class GPTLayer(nn.Module):
    """LayerNorm, attention with dropout, projection, dropout; LayerNorm, GELU MLP, dropout.

    The whole layer; `shard` gives a rank's part. x (B, T, D), causal.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)


class ParallelGPTLayer(nn.Module):
    """A rank's part of a GPTLayer: the same names, the same parameters frozen; dropout in training.

    Raises: ValueError where heads or widths do not divide by the number of ranks.
    """

    def __init__(
        self,
        layer: GPTLayer,
        comm: Comm,
        streams: RandomStreams,
        *,
        rate: float = 0.1,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        if layer.num_heads % comm.size:
            raise ValueError(
                f"num_heads: expected a multiple of {comm.size}, got {layer.num_heads}"
            )
        self.comm, self.rate, self.streams = comm, rate, streams
        self.region = Region(comm, sequence_parallel=sequence_parallel)
        self.num_heads = layer.num_heads // comm.size
        adopt(self, layer)
        self.norms = nn.ModuleList(copied(norm) for norm in layer.norms)
        self.q, self.k, self.v, self.up = (
            column_part(part, comm) for part in (layer.q, layer.k, layer.v, layer.up)
        )
        self.out, self.down = row_part(layer.out, comm), row_part(layer.down, comm)

    def forward(self, x: Float[Tensor, "B t D"]) -> Float[Tensor, "B t D"]:
        h = self.region.enter(self._norm(0, x))
        h = self.region.leave(self.out(self._attention(h)), self.out.bias)
        x = x + self._dropped(h)
        h = self.region.enter(self._norm(1, x))
        h = self.region.leave(self.down(F.gelu(self.up(h))), self.down.bias)
        return x + self._dropped(h)

    def _attention(self, h: Tensor) -> Tensor:
        q, k, v = (
            part(h).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=h.device).triu(1)
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        weights = self._dropout(weights, self.streams.own)
        return (weights @ v).transpose(1, 2).flatten(2)

    def _norm(self, i: int, x: Tensor) -> Tensor:
        norm = self.norms[i]
        assert isinstance(norm, nn.LayerNorm)
        weight, bias = (self.region.of_positions(p) for p in (norm.weight, norm.bias))
        return F.layer_norm(x, (x.shape[-1],), weight, bias, norm.eps)

    def _dropped(self, y: Tensor) -> Tensor:
        """Dropout of what goes on the stream."""
        is_part = self.region.sequence_parallel
        return self._dropout(y, self.streams.own if is_part else self.streams.shared)

    def _dropout(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return dropout(x, self.rate, generator) if self.training else x
