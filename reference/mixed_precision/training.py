"""Mixed-precision training by hand: a float16 model, float32 master weights, a scaled loss.

One step, in the order of the recipe:

    1. round the master weights to float16       5. copy gradients to float32 and unscale them
    2. forward and backward in float16           6. if any is inf or NaN, skip the update
    3. the loss in float32                       7. clip, then update the float32 master weights
    4. times the loss scale

Master weights matter because an update of less than half a spacing, |u| < 2^-12 |w| in float16,
rounds to nothing.

Source: Micikevicius et al., arXiv 1710.03740, sec. 3.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference.mixed_precision.loss_scaling import LossScaler


class MasterWeights:
    """Float32 copies of a half-precision model's trainable parameters.

    Optimizers are given `parameters`; the model keeps its own.

    Raises: ValueError where the model has nothing to train.
    """

    def __init__(self, model: nn.Module) -> None:
        self.of_model = [p for p in model.parameters() if p.requires_grad]
        if not self.of_model:
            raise ValueError("model: expected trainable parameters, got none")
        self.parameters = [p.detach().float().clone().requires_grad_() for p in self.of_model]

    def collect_gradients(self) -> None:
        """Move the model's gradients, widened, to the master weights."""
        for parameter, master in zip(self.of_model, self.parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def write_to_model(self) -> None:
        """Round the master weights into the model's own dtype."""
        for parameter, master in zip(self.of_model, self.parameters, strict=True):
            parameter.copy_(master)


@dataclass(frozen=True)
class StepReport:
    """What one step did. `grad_norm` is that of unscaled gradients, before clipping."""

    loss: float
    scale: float
    grad_norm: float
    has_stepped: bool


def mixed_precision_step(
    loss_of: Callable[[], Tensor],
    master: MasterWeights,
    optimizer: torch.optim.Optimizer,
    scaler: LossScaler,
    *,
    max_norm: float = float("inf"),
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> StepReport:
    """One training step by the recipe. `loss_of()` runs the model and returns its float32 loss.

    `schedule` advances only where the optimizer did.

    Raises: TypeError where the loss is not float32.
    """
    master.write_to_model()
    loss = loss_of()
    if loss.dtype != torch.float32:
        raise TypeError(f"loss: expected float32, got {loss.dtype}; use logits.float()")
    scale = scaler.state.scale
    scaler.scale(loss).backward()
    master.collect_gradients()
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(master.parameters, max_norm)
    has_stepped = scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if has_stepped and schedule is not None:
        schedule.step()
    return StepReport(loss.item(), scale, grad_norm.item(), has_stepped)


def training_state_bytes(*, weight_bits: int, gradient_bits: int, has_master: bool) -> int:
    """Bytes a parameter that training with Adam keeps: weight, gradient, master, two moments.

    2 + 2 + 4 + 4 + 4 = 16 in mixed precision, and 4 + 4 + 4 + 4 = 16 in float32: mixed precision
    saves time and activations, not these.

    Raises: ValueError for widths that are not whole bytes.
    """
    for name, bits in (("weight_bits", weight_bits), ("gradient_bits", gradient_bits)):
        if bits < 8 or bits % 8:
            raise ValueError(f"{name}: expected a positive multiple of 8, got {bits}")
    return (weight_bits + gradient_bits) // 8 + 4 * has_master + 2 * 4


def widened(gradients: Iterable[Tensor]) -> Tensor:
    """All values of some gradients as one flat float32 tensor: what a histogram is drawn of."""
    return torch.cat([g.detach().float().flatten() for g in gradients])
