"""AdamW: Adam whose weight decay stays out of the moments, and clipping by the global norm.

    m <- b1 m + (1 - b1) g             v <- b2 v + (1 - b2) g^2
    w <- w - lr decay w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

L2 regularisation adds decay * w to the gradient instead, where Adam's division undoes it: weights
with large gradients then decay least. Decoupled, all decay alike.

Papers: Adam, 1412.6980, alg. 1; decoupled weight decay, 1711.05101, alg. 2; clipping, 1211.5063.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def adamw_update(
    parameter: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step for one tensor, in place; `step` counts from 1. Bit for bit torch's (foreach=False).

    Source: arXiv 1711.05101, alg. 2.
    """
    beta1, beta2 = betas
    parameter.mul_(1 - lr * weight_decay)
    m.lerp_(gradient, 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    parameter.addcdiv_(m, root, value=-lr / (1 - beta1**step))


class AdamW(torch.optim.Optimizer):
    """`adamw_update` for every parameter that has a gradient.

    Raises: ValueError for rates outside their range.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(
                f"lr, eps, weight_decay: expected at least 0, got {lr}, {eps}, {weight_decay}"
            )
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two values in [0, 1), got {betas}")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=0, m=torch.zeros_like(parameter), v=torch.zeros_like(parameter))
        state["step"] += 1
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        adamw_update(parameter, gradient, state["m"], state["v"], step=state["step"], **options)


def decay_groups(
    model: nn.Module | Iterable[tuple[str, Tensor]], weight_decay: float
) -> list[dict[str, Any]]:
    """Two parameter groups: matrices, which decay, and vectors (norms, biases), which do not.

    `model` may be (name, parameter) pairs as well. Of a parameter that is sharded the whole's
    dimensions count, its `whole_shape`. Custom, not law: decay on a norm's weight pulls it to 0,
    which rescales and does not regularise.
    """
    named = model.named_parameters() if isinstance(model, nn.Module) else model
    trainable = [parameter for _, parameter in named if parameter.requires_grad]
    dims = [len(getattr(parameter, "whole_shape", parameter.shape)) for parameter in trainable]
    return [
        {"params": [p for p, n in zip(trainable, dims, strict=True) if n >= 2],
         "weight_decay": weight_decay},
        {"params": [p for p, n in zip(trainable, dims, strict=True) if n < 2],
         "weight_decay": 0.0},
    ]  # fmt: skip


@torch.no_grad()
def clip_gradients(parameters: Tensor | Iterable[Tensor], max_norm: float) -> float:
    """Shrink all gradients by one factor so that their joint norm is at most max_norm.

    Returns the norm before. The factor is max_norm / (norm + 1e-6), as torch has it; one tensor is
    taken as well as many.

    Raises: ValueError for a max_norm that is not positive, and for parts of parameters that ranks
    share (`whole_shape`): each rank would clip by a norm of its own.
    Source: Pascanu et al., arXiv 1211.5063, alg. 1.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected more than 0, got {max_norm}")
    if isinstance(parameters, Tensor):  # which can be iterated over as well: its rows have no grad
        parameters = [parameters]
    parameters = list(parameters)
    if any(getattr(p, "whole_shape", p.shape) != p.shape for p in parameters):
        raise ValueError(
            "parameters: expected whole ones, got shards; a shard's gradient has a part of the "
            "norm: clip with the wrapper's clip_grad_norm"
        )
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    norms = torch.stack([torch.linalg.vector_norm(g) for g in gradients])
    norm = torch.linalg.vector_norm(norms)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return norm.item()
