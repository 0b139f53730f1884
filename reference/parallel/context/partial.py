"""Attention in parts: some queries against some keys, added to what is known so far.

Forward, parts join by their log-sum-exp: each weighs as much as its keys' exponentials. Backward
needs no joining: with the log-sum-exp of *all* keys the probabilities of any tile come out right,
and gradients are sums over tiles.

Papers: FlashAttention-2, 2307.08691, sec. 3.1; Ring Attention, 2310.01889, sec. 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reference.flash_attention import (
    flash_attention_backward,
    flash_attention_forward,
    merge,
)
from reference.flash_attention.forward import check_attention
from reference.parallel.context.layout import Layout, Tile
from reference.parallel.options import at_least, one_of


@dataclass(frozen=True)
class Kernel:
    """How a rank attends: who sees whom, the layout of the text, and chapter 07's tiles.

    Raises: ValueError for an unknown layout or a block below 1.
    """

    is_causal: bool = True
    layout: Layout = "zigzag"
    scale: float | None = None
    block_size: int = 256

    def __post_init__(self) -> None:
        one_of("layout", self.layout, Layout)
        at_least(1, [("block_size", self.block_size)])

    def options(self, q: Tensor) -> dict[str, Any]:
        scale = 1 / math.sqrt(q.shape[3]) if self.scale is None else self.scale
        return {"scale": scale, "block_q": self.block_size, "block_k": self.block_size}


class Partial:
    """Outputs and log-sum-exps of this rank's queries over the keys seen so far, kept wide."""

    def __init__(self, q: Tensor, v: Tensor) -> None:
        wide = torch.promote_types(q.dtype, torch.float32)
        self.out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=wide)
        self.lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)

    def add(self, q: Tensor, k: Tensor, v: Tensor, tiles: Iterable[Tile], kernel: Kernel) -> None:
        """Join what these keys contribute."""
        for rows, columns, is_causal in tiles:
            out, lse = flash_attention_forward(
                q[:, :, rows], k[:, :, columns], v[:, :, columns], is_causal=is_causal,
                **kernel.options(q),
            )  # fmt: skip
            outs = torch.stack([self.out[:, :, rows], out.to(self.out.dtype)])
            lses = torch.stack([self.lse[:, :, rows], lse])
            self.out[:, :, rows], self.lse[:, :, rows] = merge(outs, lses)


class Gradients:
    """Gradients of this rank's queries, and of the keys and values that visit, kept wide."""

    def __init__(self, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> None:
        self.grad, self.q, self.out, self.lse = grad, q, out, lse
        self.dq = torch.zeros_like(q, dtype=lse.dtype)

    def of(
        self, k: Tensor, v: Tensor, tiles: Iterable[Tile], kernel: Kernel
    ) -> tuple[Tensor, Tensor]:
        """dK and dV of these keys by this rank's queries; dQ is added to."""
        dk, dv = (torch.zeros_like(x, dtype=self.dq.dtype) for x in (k, v))
        for rows, columns, is_causal in tiles:
            dq, *dkv = flash_attention_backward(
                self.grad[:, :, rows], self.q[:, :, rows], k[:, :, columns], v[:, :, columns],
                self.out[:, :, rows], self.lse[:, :, rows], is_causal=is_causal,
                **kernel.options(self.q),
            )  # fmt: skip
            self.dq[:, :, rows] += dq
            dk[:, :, columns] += dkv[0]
            dv[:, :, columns] += dkv[1]
        return dk, dv


def check_parts(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse parts of a text that do not belong together."""
    check_attention(q, k, v)
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"k: expected this rank's {q.shape[2]} positions, as q, got {k.shape[2]}; a cache of "
            "other lengths is not divided here"
        )
