"""Where the norm stands around a sublayer f decides how deep a network can train.

    Post-LN      norm(x + f(x))             every block rescales the skip path
    Pre-LN       x + f(norm(x))             the skip path is untouched; a last norm closes the stack
    Sandwich-LN  x + norm(f(norm(x)))       what a block adds is bounded as well
    DeepNorm     norm(alpha * x + f(x))     Post-LN with a skip path heavier by a constant alpha > 1

DeepNorm's alpha is fixed by depth, never learned, and multiplies the skip path; beta < 1 is the
gain of the initial weights of the feed-forward, value and output projections.

Shapes: D model width; everything before it is batch. The dtype is what norm and sublayer make it.
Papers: Pre-LN and Post-LN, 2002.04745, table 1; Sandwich-LN, 2105.13290, sec. 2.4;
DeepNorm, 2203.00555, fig. 2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

# A sublayer or a norm: a module or any function of x (and of what else the block was called with).
Layer = Callable[..., Any]


class DeepNormConstants(NamedTuple):
    """`alpha` multiplies the skip path; `beta` is the gain of the initial weights."""

    alpha: float
    beta: float


def deepnorm_constants(num_layers: int) -> DeepNormConstants:
    """Constants of an encoder-only or decoder-only model of N layers (two sublayers each).

    Raises: ValueError below one layer.
    Source: arXiv 2203.00555, fig. 2: alpha = (2N)^(1/4), beta = (8N)^(-1/4).
    """
    _check_depth(num_layers=num_layers)
    return DeepNormConstants((2 * num_layers) ** 0.25, (8 * num_layers) ** -0.25)


def deepnorm_encoder_decoder_constants(
    num_encoder_layers: int, num_decoder_layers: int
) -> tuple[DeepNormConstants, DeepNormConstants]:
    """Constants of the encoder and of the decoder of a model with both.

    Raises: ValueError below one layer.
    Source: arXiv 2203.00555, fig. 2: encoder 0.81 (N^4 M)^(1/16), 0.87 (N^4 M)^(-1/16), decoder
    (3M)^(1/4), (12M)^(-1/4).
    """
    _check_depth(num_encoder_layers=num_encoder_layers, num_decoder_layers=num_decoder_layers)
    n, m = num_encoder_layers, num_decoder_layers
    both = (n**4 * m) ** (1 / 16)
    encoder = DeepNormConstants(0.81 * both, 0.87 / both)
    return encoder, DeepNormConstants((3 * m) ** 0.25, (12 * m) ** -0.25)


def _check_depth(**depths: int) -> None:
    for name, depth in depths.items():
        if depth < 1:
            raise ValueError(f"{name}: expected at least 1, got {depth}")


class PostNorm(nn.Module):
    """norm(x + f(x)): the original transformer. Source: arXiv 1706.03762, sec. 3.1."""

    def __init__(self, sublayer: Layer, norm: Layer) -> None:
        super().__init__()
        self.sublayer, self.norm = sublayer, norm

    def forward(self, x: Float[Tensor, "... D"], *args: Any, **kwargs: Any) -> Tensor:
        return self.norm(x + self.sublayer(x, *args, **kwargs))


class PreNorm(nn.Module):
    """x + f(norm(x)): GPT-2, Llama. The stack's output wants a norm of its own.

    Source: arXiv 2002.04745, table 1.
    """

    def __init__(self, sublayer: Layer, norm: Layer) -> None:
        super().__init__()
        self.sublayer, self.norm = sublayer, norm

    def forward(self, x: Float[Tensor, "... D"], *args: Any, **kwargs: Any) -> Tensor:
        return x + self.sublayer(self.norm(x), *args, **kwargs)


class SandwichNorm(nn.Module):
    """x + norm_after(f(norm(x))): CogView, Gemma 2. Source: arXiv 2105.13290, sec. 2.4."""

    def __init__(self, sublayer: Layer, norm: Layer, norm_after: Layer) -> None:
        super().__init__()
        self.sublayer, self.norm, self.norm_after = sublayer, norm, norm_after

    def forward(self, x: Float[Tensor, "... D"], *args: Any, **kwargs: Any) -> Tensor:
        return x + self.norm_after(self.sublayer(self.norm(x), *args, **kwargs))


class DeepNorm(nn.Module):
    """norm(alpha * x + f(x)), alpha a constant from `deepnorm_constants`.

    The block does not initialise its sublayer: give the feed-forward, value and output projections
    `nn.init.xavier_normal_(weight, gain=beta)`, queries and keys gain 1.

    Source: arXiv 2203.00555, sec. 4.1 and fig. 2.
    """

    def __init__(self, sublayer: Layer, norm: Layer, *, alpha: float) -> None:
        super().__init__()
        self.sublayer, self.norm, self.alpha = sublayer, norm, alpha

    def forward(self, x: Float[Tensor, "... D"], *args: Any, **kwargs: Any) -> Tensor:
        return self.norm(self.alpha * x + self.sublayer(x, *args, **kwargs))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:.4f}"
