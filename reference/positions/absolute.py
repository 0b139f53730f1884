"""Positions that are added to the embedding: sinusoids, and a learned table.

    PE(m, 2i) = sin(m / base^(2i/D))        PE(m, 2i + 1) = cos(m / base^(2i/D))

A sinusoid is defined for every m; D limits how many frequencies there are, not how long a text may
be. A learned table ends where it ends.

Shapes: T positions, D model width.
Source: Attention is all you need, arXiv 1706.03762, sec. 3.5.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def sinusoidal_positions(
    positions: Int[Tensor, "*T"], dim: int, *, base: float = 10000.0
) -> Float[Tensor, "*T D"]:
    """The table's rows for these positions: sine and cosine side by side, float32.

    Angles in float64: in float32 that of position 100,000 is off by up to 0.004.

    Raises: ValueError for an odd dim.
    Source: arXiv 1706.03762, sec. 3.5.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim: expected an even number of at least 2, got {dim}")
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = positions[..., None].double() / base**exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).float()


class LearnedPositions(nn.Module):
    """One trained vector a position, added to the embedding, as in BERT and GPT-2.

    Raises: ValueError at call for a position beyond the table.
    """

    def __init__(self, max_positions: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_positions, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, positions: Int[Tensor, "*T"]) -> Float[Tensor, "*T D"]:
        if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < len(
            self.weight
        ):
            raise ValueError(
                f"positions: expected 0 to {len(self.weight) - 1}, got {int(positions.min())} to "
                f"{int(positions.max())}; a learned table knows nothing beyond its end"
            )
        return self.weight[positions]
