"""Loss scaling: lift gradients into float16's range, and take the factor off before they are used.

Gradients below 2^-25 round to zero in float16. The chain rule is linear, so a loss times S has
gradients times S: multiply the loss, divide the gradients in float32. A scale that is too large
overflows instead; such a step is recognised by its inf or NaN, skipped, and the scale lowered.

    S <- S * backoff                    after an overflow
    S <- S * growth                     after `growth_interval` steps in a row without one

It guards against underflow; overflow is the price, found and undone. bfloat16 has float32's range
and needs none of it.

Sources: Micikevicius et al., arXiv 1710.03740, sec. 3.2; the rule is torch.amp.GradScaler's.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScaleRule:
    """When a loss scale moves. Defaults are GradScaler's.

    `min_scale` is the floor: a run of overflows that gets there has NaN or inf in the loss itself,
    and no scale will help. 2^-126 by default, the smallest whose inverse float32 holds as well.
    `hysteresis` is the number of overflows that it takes to lower the scale (DeepSpeed: 2, with
    growth_interval=1000); `ScaleRule.static()` never moves.

    Raises: ValueError for factors on the wrong side of 1 or counts below 1.
    """

    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    hysteresis: int = 1
    min_scale: float = 2.0**-126

    def __post_init__(self) -> None:
        if self.growth_factor < 1 or not 0 < self.backoff_factor <= 1:
            raise ValueError(
                "growth_factor, backoff_factor: expected at least 1 and a value in (0, 1], got "
                f"{self.growth_factor} and {self.backoff_factor}"
            )
        if not 2.0**-126 <= self.min_scale < math.inf:
            raise ValueError(f"min_scale: expected at least 2**-126, got {self.min_scale}")
        for name in ("growth_interval", "hysteresis"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @classmethod
    def static(cls) -> "ScaleRule":
        return cls(growth_factor=1.0, backoff_factor=1.0)


@dataclass(frozen=True)
class ScaleState:
    """The scale, the steps without overflow since it last moved, the overflows still forgiven."""

    scale: float = 65536.0
    good_steps: int = 0
    overflows: int = 0


def next_scale(state: ScaleState, rule: ScaleRule, *, overflowed: bool) -> ScaleState:
    """The state after one step. A scale that would grow to infinity, or below its floor, stays."""
    if overflowed:
        overflows = state.overflows + 1
        scale = state.scale
        if overflows >= rule.hysteresis:
            scale = min(scale, max(scale * rule.backoff_factor, rule.min_scale))
        return ScaleState(scale, 0, min(overflows, rule.hysteresis - 1))
    if state.good_steps + 1 < rule.growth_interval:
        return replace(state, good_steps=state.good_steps + 1)
    grown = float(torch.tensor(state.scale * rule.growth_factor, dtype=torch.float32))
    return ScaleState(grown if math.isfinite(grown) else state.scale)


def unscale_(gradients: Iterable[Tensor], scale: float) -> bool:
    """Divide gradients by the scale in place; True if any held an inf or NaN.

    Raises: TypeError for float16 gradients: divided, they would underflow after all.
    """
    overflowed = False
    inverse = float(torch.tensor(1.0 / scale, dtype=torch.float32))
    for gradient in gradients:
        if gradient.dtype == torch.float16:
            raise TypeError(
                "gradient: expected float32, got float16; copy gradients to float32 master weights "
                "(MasterWeights.collect_gradients) before they are unscaled"
            )
        overflowed |= not bool(gradient.isfinite().all())
        gradient.mul_(inverse)
    return overflowed


class LossScaler:
    """Dynamic loss scaling around any torch optimizer; scale by scale equal to GradScaler.

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)                 # only where gradients are read, as to clip them
        clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)                     # skipped after an overflow
        scaler.update()

    `step` tells whether the optimizer stepped, so that a schedule advances with it and not alone.
    """

    def __init__(self, *, init_scale: float = 65536.0, rule: ScaleRule | None = None) -> None:
        if not (math.isfinite(init_scale) and init_scale > 0):
            raise ValueError(f"init_scale: expected a positive number, got {init_scale}")
        self.rule = ScaleRule() if rule is None else rule
        self.state = ScaleState(init_scale)
        self._overflowed: dict[int, bool] = {}  # by optimizer, since the last update
        self._stepped: set[int] = set()

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the current scale."""
        return loss * self.state.scale

    def unscale_(self, optimizer: torch.optim.Optimizer) -> bool:
        """Divide the optimizer's gradients by the scale, once a step; True after an overflow.

        Raises: RuntimeError the second time, ValueError where nothing has a gradient.
        """
        key = id(optimizer)
        if key in self._overflowed:
            raise RuntimeError("unscale_: expected once before update(), got a second call")
        gradients = [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if not gradients:
            raise ValueError("optimizer: expected gradients to unscale, got none; call backward()")
        self._overflowed[key] = unscale_(gradients, self.state.scale)
        return self._overflowed[key]

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Unscale if that is still to do, then step unless a gradient overflowed.

        Raises: RuntimeError where this optimizer has stepped since the last update().
        """
        key = id(optimizer)
        if key in self._stepped:
            raise RuntimeError("step: expected update() after the last step, got a second step")
        if key not in self._overflowed:
            self.unscale_(optimizer)
        self._stepped.add(key)
        if not self._overflowed[key]:
            optimizer.step()
        return not self._overflowed[key]

    def update(self) -> None:
        """Move the scale after all optimizers have stepped.

        Raises: RuntimeError where no gradient has been checked since the last update.
        """
        if not self._overflowed:
            raise RuntimeError("update: expected step() or unscale_() before it, got neither")
        overflowed = any(self._overflowed.values())
        self.state = next_scale(self.state, self.rule, overflowed=overflowed)
        self._overflowed.clear()
        self._stepped.clear()

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with a saved scale and counters.

        Raises: ValueError for other keys than `state_dict` has.
        """
        expected = set(asdict(self.state))
        if set(state) != expected:
            raise ValueError(f"state: expected the keys {sorted(expected)}, got {sorted(state)}")
        self.state = ScaleState(**state)
