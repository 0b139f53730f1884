"""A linear layer's backward in two halves: the input's gradient now, the weight's later.

    B    dx = dy W         what the stage before waits for
    W    dW = dy^T x       what only the optimizer waits for

Of what a forward saved, B frees what the non-linear parts kept; x and dy stay until W.

Paper: Zero Bubble Pipeline Parallelism, 2401.10241, sec. 2.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reference.parallel.zero import same_pass


class WeightGradients:
    """Products that B has put off, by micro-batch. `micro` is the one under way."""

    def __init__(self) -> None:
        self.micro = 0
        self._waiting: defaultdict[int, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)

    def put(self, weight: Tensor, x: Tensor, grad: Tensor) -> None:
        """Keep what dW needs."""
        self._waiting[self.micro].append((weight, x, grad))

    def compute(self, micro: int) -> None:
        """W: add this micro-batch's gradients to the weights', hooks included."""
        waiting = self._waiting.pop(micro, [])
        while waiting:
            weight, x, grad = waiting.pop(0)
            with same_pass():
                torch.autograd.backward(weight, grad.flatten(0, -2).T @ x.flatten(0, -2))

    def defer(self, module: nn.Module) -> None:
        """Let all linear layers inside put their weights' gradients here. Biases are not put off.

        Raises: ValueError for a weight that two layers share: B would see half of its gradient.
        """
        seen: set[int] = set()
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    if id(child.weight) in seen:
                        raise ValueError(f"{name}: expected a weight of its own, got a shared one")
                    seen.add(id(child.weight))
                    setattr(parent, name, DeferredLinear(child, self))


class DeferredLinear(nn.Module):
    """A linear layer that puts its weight's gradient off. Parameters keep their names."""

    def __init__(self, linear: nn.Linear, queue: WeightGradients) -> None:
        super().__init__()
        self.weight, self.bias, self.queue = linear.weight, linear.bias, queue
        self.train(linear.training)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... E"]:
        y = _InputGradient.apply(x, self.weight.detach(), self.weight, self.queue)
        return y if self.bias is None else y + self.bias


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, weight: Any, queue: WeightGradients) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.queue = weight, queue
        return F.linear(x, values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        if ctx.weight.requires_grad:
            ctx.queue.put(ctx.weight, x, grads[0])
        return grads[0] @ ctx.weight.detach(), None, None, None
