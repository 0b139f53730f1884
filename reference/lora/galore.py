"""GaLore: full weights, a gradient of low rank.

Every weight learns; what is low-rank is the optimizer's memory. The gradient G (F, D) is projected
on its own leading singular vectors P, Adam works on the small one, and its step is projected back:

    R = P^T G  (F <= D, else G P)      N = adam(R)      W <- W - lr * scale * P N

P is computed anew every `gap` steps, since the gradient's subspace turns. It is an optimizer, not a
kind of adapter: afterwards there is nothing to merge or store beside the weights.

Source: GaLore, 2403.03507, algorithm 2, sec. 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def projection(gradient: Float[Tensor, "F D"], rank: int) -> Float[Tensor, ...]:
    """The leading singular vectors of the shorter side: (r, D) where F >= D, else (F, r).

    Raises: ValueError for a rank that is not between 1 and the shorter side.
    Source: arXiv 2403.03507, eq. 12 and 13.
    """
    fan_out, fan_in = gradient.shape
    if not 1 <= rank <= min(fan_out, fan_in):
        raise ValueError(f"rank: expected 1 to {min(fan_out, fan_in)}, got {rank}")
    u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
    return (vh[:rank] if fan_out >= fan_in else u[:, :rank]).to(gradient.dtype)


def project(gradient: Float[Tensor, "F D"], basis: Tensor) -> Tensor:
    """To the small gradient: (F, r) where F >= D, else (r, D)."""
    fan_out, fan_in = gradient.shape
    return gradient @ basis.t() if fan_out >= fan_in else basis.t() @ gradient


def project_back(small: Tensor, basis: Tensor, shape: torch.Size) -> Float[Tensor, "F D"]:
    """From the small step to one of the weight's shape."""
    return small @ basis if shape[0] >= shape[1] else basis @ small


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW on projected gradients for matrices, plain AdamW for the rest.

    `rank`, `gap` (steps between projections) and `scale` (their alpha) may be set by group; a group
    with rank=None is not projected. As in the authors' code, weight decay comes after the step and
    eps is not divided by the bias correction.

    Raises: ValueError for a rank above a matrix's shorter side, or a gap below 1.
    Source: arXiv 2403.03507, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        rank: int | None = None,
        gap: int = 200,
        scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        if gap < 1:
            raise ValueError(f"gap: expected at least 1, got {gap}")
        defaults = {"lr": lr, "rank": rank, "gap": gap, "scale": scale, "betas": betas,
                    "eps": eps, "weight_decay": weight_decay}  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        step = state.get("step", 0)
        is_projected = group["rank"] is not None and parameter.ndim == 2
        if is_projected:
            if step % group["gap"] == 0:
                state["basis"] = projection(gradient, group["rank"])
            gradient = project(gradient, state["basis"])
        if not step:
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        state["step"] = step = step + 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        change = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])
        if is_projected:
            change = project_back(change, state["basis"], parameter.shape) * group["scale"]
        correction = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        parameter.add_(change, alpha=-group["lr"] * correction)
        if group["weight_decay"]:
            parameter.add_(parameter, alpha=-group["lr"] * group["weight_decay"])


def update_in_backward(model: nn.Module, **options: Any) -> list[GaLoreAdamW]:
    """Let backward itself update each parameter and free its gradient: one optimizer each.

    Afterwards `loss.backward()` is the whole step, and no two gradients live together. Gradients
    cannot be clipped by their common norm, or accumulated.

    Returns the optimizers, so that their learning rates can be set.

    Source: arXiv 2403.03507, sec. 4.3, "per-layer weight updates".
    """
    optimizers = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        optimizer = GaLoreAdamW([parameter], **options)
        optimizers.append(optimizer)

        def update(p: Tensor, optimizer: GaLoreAdamW = optimizer) -> None:
            optimizer.step()
            p.grad = None

        parameter.register_post_accumulate_grad_hook(update)
    return optimizers
