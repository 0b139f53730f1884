"""AWQ: protect the weights that meet large activations, by scaling before rounding.

Rounding errs by up to half a step in each weight, and the error reaches the output multiplied by
the weight's input. So the input channels with large activations are salient, whatever their
weights. Multiply their weights by s > 1 before rounding and divide the input by s:

    y = (x / s) Q(W s)^T          the error of a salient weight shrinks by about s

provided that s seldom changes the largest weight of a group, which sets the step. All weights end
up in the same few bits. AWQ takes s = mean|x|^alpha, and tries alpha on a grid.

Shapes: N output channels, D input channels, S calibration tokens.
Papers: AWQ, 2306.00978, sec. 3.2, eq. 2 to 5.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from reference.pretrained import capture

SMALLEST_SCALE = 1e-4
# What a weight becomes when it is quantised and dequantised.
Rounding = Callable[[Tensor], Tensor]


class ScaleSearch(NamedTuple):
    """The best scale of each input channel, its alpha, and the loss at each alpha of the grid."""

    scale: Float[Tensor, " D"]
    alpha: float
    losses: list[float]


def activation_magnitude(x: Float[Tensor, "... D"]) -> Float[Tensor, " D"]:
    """mean |x| of each input channel. Source: arXiv 2306.00978, sec. 3.2 (s_X)."""
    return x.abs().flatten(0, -2).mean(0)


def scale_of(magnitude: Float[Tensor, " D"], alpha: float) -> Float[Tensor, " D"]:
    """magnitude^alpha, divided by sqrt(max * min) so that the scales lie around one.

    alpha 0 scales nothing. Source: arXiv 2306.00978, eq. 5; the division is in its code.
    """
    scale = magnitude.pow(alpha).clamp(min=SMALLEST_SCALE)
    return scale / (scale.max() * scale.min()).sqrt()


def search_scale(
    weight: Float[Tensor, "N D"],
    x: Float[Tensor, "... D"],
    rounding: Rounding,
    *,
    num_alphas: int = 20,
) -> ScaleSearch:
    """The alpha of 0, 1/n, ... (n - 1)/n whose rounded layer errs least on x, in squares.

    Layers that read the same input share one scale: pass their weights as one, torch.cat along N.

    Raises: ValueError for shapes that do not fit, an empty or non-finite x, fewer than 1 alpha.
    Source: arXiv 2306.00978, eq. 4 and 5; grid of 20.
    """
    _check(weight, x, num_alphas)
    magnitude, target = activation_magnitude(x), F.linear(x, weight)
    losses, best = [], (float("inf"), 0.0, torch.ones_like(magnitude))
    for i in range(num_alphas):
        alpha = i / num_alphas
        scale = scale_of(magnitude, alpha)
        loss = F.mse_loss(F.linear(x / scale, rounding(weight * scale)), target)
        losses.append(loss.item())
        if losses[-1] < best[0]:
            best = losses[-1], alpha, scale
    return ScaleSearch(best[2], best[1], losses)


def scaled_rounding(
    weight: Float[Tensor, "N D"], scale: Float[Tensor, " D"], rounding: Rounding
) -> Float[Tensor, "N D"]:
    """Q(W s) / s: the weight that the unscaled input seems to meet. Source: 2306.00978, eq. 2."""
    return rounding(weight * scale) / scale


def fold_into_norm(
    norm_weight: Float[Tensor, " D"], scale: Float[Tensor, " D"]
) -> Float[Tensor, " D"]:
    """1 / s costs nothing at run time: the norm before the layer multiplies by its weight anyway.

    Raises: ValueError for shapes that do not fit.
    Source: arXiv 2306.00978, sec. 3.2 (fused into the previous operator).
    """
    if norm_weight.shape != scale.shape:
        raise ValueError(
            f"scale: expected shape {tuple(norm_weight.shape)}, got {tuple(scale.shape)}; only "
            "layers that read this norm's output can share its fold"
        )
    return norm_weight / scale


@torch.no_grad()
def awq_round_model(
    model: nn.Module,
    tokens: Int[Tensor, "B T"],
    rounding: Rounding,
    *,
    num_alphas: int = 20,
    skip: tuple[str, ...] = ("lm_head",),
) -> dict[str, float]:
    """Round every linear layer of a model by AWQ, calibrated on one batch of tokens.

    In place: each weight becomes Q(W s) / s. Layers that were given the same tensor share s.
    Returns the alpha of each layer.

    Raises: as `search_scale`; ValueError for a model without linear layers.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] not in skip
    }
    if not layers:
        raise ValueError("model: expected nn.Linear layers to round, found none")
    inputs = {name: seen.input for name, seen in capture(model, tokens, layers).items()}
    sharing: dict[int, list[str]] = {}
    for name, x in inputs.items():
        sharing.setdefault(x.data_ptr(), []).append(name)
    alphas = {}
    for names in sharing.values():
        weights = torch.cat([layers[name].weight for name in names])
        found = search_scale(weights, inputs[names[0]], rounding, num_alphas=num_alphas)
        for name in names:
            weight = layers[name].weight
            weight.copy_(scaled_rounding(weight, found.scale, rounding))
            alphas[name] = found.alpha
    return alphas


def _check(weight: Tensor, x: Tensor, num_alphas: int) -> None:
    if x.ndim < 2 or x.shape[-1] != weight.shape[1] or x.numel() == 0:
        raise ValueError(
            f"x: expected one or more tokens of {weight.shape[1]} channels, got shape "
            f"{tuple(x.shape)}"
        )
    if not all(bool(torch.isfinite(torch.stack(t.aminmax())).all()) for t in (x, weight)):
        raise ValueError("x, weight: expected finite values, got inf or nan")
    if num_alphas < 1:
        raise ValueError(f"num_alphas: expected at least 1, got {num_alphas}")
