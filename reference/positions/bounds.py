"""How a RoPE score may depend on distance: bounds that papers print.

With h_i the complex product of the query's and the key's pair i, the score at distance s is
Re sum_i h_i e^{j s theta_i}. Summation by parts bounds it by max |h_i - h_i+1| times a sum of
partial sums S_i(s) = sum_{k < i} e^{j s theta_k}, which depends on distance and base alone.

Sources: RoFormer, arXiv 2104.09864, sec. 3.4.3; position interpolation, 2306.15595, theorem 2.1.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def mean_partial_sum(
    distances: Float[Tensor, " S"], frequencies: Float[Tensor, " half"]
) -> Float[Tensor, " S"]:
    """(1 / (d/2)) sum_i |S_i(s)| for each distance: RoFormer's "relative upper bound". Float64.

    It falls with distance as a trend, not monotonically.
    """
    angles = distances.double()[:, None] * frequencies.double()
    partial = torch.polar(torch.ones_like(angles), angles).cumsum(-1)
    return partial.abs().mean(-1)


def interpolation_bound(head_dim: int, base: float = 10000.0) -> float:
    """max |score error| / max |h| of interpolating between two trained positions: d / (32 ln base).

    Source: arXiv 2306.15595, theorem 2.1, at the middle between two whole positions.
    """
    return head_dim / (32 * math.log(base))


def extrapolation_bound(
    distances: Float[Tensor, " S"], frequencies: Float[Tensor, " half"]
) -> Float[Tensor, " S"]:
    """How large a score can be at each distance for max |h| = 1: 2 B(s) = 2 sum_i |S_i(s)|.

    Source: arXiv 2306.15595, sec. 2.3: the bound that holds beyond the length of training, too.
    """
    return 2 * len(frequencies) * mean_partial_sum(distances, frequencies)
