"""BatchNorm: each channel is normalised by statistics over the whole batch.

In training these are the batch's own, so an example's output depends on its neighbours; meanwhile
running averages are kept, and evaluation uses those: then the layer is a fixed scale and shift.

    training    y = (x - mean_batch) / sqrt(var_batch + eps) * weight + bias       var divides by n
                running <- (1 - momentum) * running + momentum * batch             var by n - 1
    evaluation  y = x * a + c,  a = weight / sqrt(running_var + eps),  c = bias - running_mean * a

Shapes: N examples, C channels, then any positions; n counts examples times positions.
Papers: BatchNorm, 1502.03167, algorithms 1 and 2.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reference.normalization.per_token import scale_and_shift, wide_dtype


class BatchNormResult(NamedTuple):
    """The output, and the running statistics to keep for the next call."""

    y: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None


def batch_norm(
    x: Float[Tensor, "N C ..."],
    running_mean: Float[Tensor, " C"] | None = None,
    running_var: Float[Tensor, " C"] | None = None,
    weight: Float[Tensor, " C"] | None = None,
    bias: Float[Tensor, " C"] | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> BatchNormResult:
    """Normalise each channel; nothing is changed in place: the new running statistics come back.

    Statistics in float32 at least, the result in the dtype of `x`. `momentum` is the share of the
    new batch. In training without running statistics none come back.

    Raises: ValueError for shapes that do not fit, for one value a channel in training, and for
    evaluation without running statistics; TypeError for an integer `x`.
    Source: arXiv 1502.03167, algorithms 1 and 2.
    """
    _check(x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    wide = x.to(wide_dtype(x))
    weight, bias = _per_channel(weight, x), _per_channel(bias, x)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean, running_var: evaluation needs both; train first")
        y = _fixed_scale_and_shift(wide, running_mean, running_var, weight, bias, eps)
        return BatchNormResult(y.to(x.dtype), running_mean, running_var)
    count = _values_per_channel(x)
    over = [d for d in range(x.ndim) if d != 1]
    mean = wide.mean(over, keepdim=True)
    centred = wide - mean
    variance = centred.square().mean(over, keepdim=True)
    y = scale_and_shift(centred * torch.rsqrt(variance + eps), weight, bias).to(x.dtype)
    unbiased = variance * (count / (count - 1))
    return BatchNormResult(
        y, _blend(running_mean, mean, momentum), _blend(running_var, unbiased, momentum)
    )


def _fixed_scale_and_shift(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """One multiplication and addition a value: what folds into a linear layer before it."""
    scale = torch.rsqrt(running_var.to(x.dtype) + eps).view(_channel_shape(x))
    scale = scale if weight is None else scale * weight
    shift = -running_mean.to(x.dtype).view(_channel_shape(x)) * scale
    return torch.addcmul(shift if bias is None else shift + bias, x, scale)


def _blend(running: Tensor | None, batch: Tensor, momentum: float) -> Tensor | None:
    if running is None:
        return None
    return running.lerp(batch.detach().view(running.shape).to(running.dtype), momentum)


def _values_per_channel(x: Tensor) -> int:
    count = x.numel() // x.shape[1]
    if count < 2:
        raise ValueError(
            f"x: expected more than 1 value per channel when training, got {tuple(x.shape)}; "
            "the variance of one value is unknown: use a larger batch, .eval(), or LayerNorm"
        )
    return count


def _channel_shape(x: Tensor) -> tuple[int, ...]:
    return (-1, *(1 for _ in x.shape[2:]))


def _per_channel(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(wide_dtype(x)).view(_channel_shape(x))


def _check(x: Tensor, **parameters: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}; x.float() makes one")
    if x.ndim < 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected (examples, channels, ...), got {tuple(x.shape)}")
    for name, parameter in parameters.items():
        if parameter is not None and parameter.shape != x.shape[1:2]:
            raise ValueError(
                f"{name}: expected shape {tuple(x.shape[1:2])}, got {tuple(parameter.shape)}; "
                "one value for each channel, which is dimension 1 of x"
            )


class BatchNorm(nn.Module):
    """`batch_norm` with parameters and running statistics; state dict as torch.nn.BatchNorm1d.

    `momentum=None` averages over all batches seen so far alike.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, dim: int, *, momentum: float | None = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Float[Tensor, "N C ..."]) -> Float[Tensor, "N C ..."]:
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / (int(self.num_batches_tracked) + 1)
        y, mean, var = batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=momentum,
            eps=self.eps,
        )
        if self.training:
            assert mean is not None and var is not None
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
            self.num_batches_tracked += 1
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, momentum={self.momentum}, eps={self.eps}"
