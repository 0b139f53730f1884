"""Forget activations after the forward, and compute them again when the backward comes.

    recompute(block, x)                  full: a block keeps its input alone, one forward more
    attend=recomputed(attention)         selective: scores and probabilities alone, 5 a s / h of
                                         the 34 + 5 a s / h bytes an element, for few FLOPs

The second forward must be the first: the random state goes back to what it was, or dropout would
draw another mask and the gradient would belong to another function.

Papers: Chen et al., 1604.06174; selective, Korthikanti et al., 2205.05198, sec. 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recompute(function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """`function(*inputs)`, keeping only the inputs for backward. Values and gradients are those of
    the plain call, bit by bit, dropout included. Parameters inside get their gradients.

    Raises: ValueError where gradients are wanted and no input asks for one.
    """
    asks = any(x is not None and x.requires_grad for x in inputs)
    if torch.is_grad_enabled() and not asks:
        raise ValueError(
            "inputs: expected one that requires a gradient, got none; autograd would not come "
            "back for the parameters: call x.requires_grad_()"
        )
    return _Recompute.apply(function, *inputs)


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` that forgets: for `attend=` of an attention layer."""

    def forgetful(*inputs: Tensor | None, **options: Any) -> Tensor:
        return recompute(lambda *given: function(*given, **options), *inputs)

    return forgetful


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        ctx.function, ctx.random_state = function, torch.get_rng_state()
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [
            None if x is None else x.detach().requires_grad_(needs)
            for x, needs in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        ]
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.random_state)
        with torch.enable_grad():
            out = ctx.function(*inputs)
        torch.set_rng_state(now)
        torch.autograd.backward(out, grads[0])
        return None, *(None if x is None else x.grad for x in inputs)
