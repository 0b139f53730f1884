"""RoPE: turn queries and keys by angles that grow with their positions.

Each pair of features is a point in a plane. At position m pair i is turned by m * theta_i, with
theta_i = base^(-2i/d), so that the product of a query at m and a key at n depends on both
positions through m - n alone. Lengths stay; values are not turned.

    complex form      (x_2i + j x_2i+1) e^{j m theta_i}       pairs are neighbours (Meta's code)
    rotate-half form  x * cos + (-x_second, x_first) * sin    pairs are d/2 apart (transformers)

The two differ by a permutation of features, which a checkpoint carries in its W_Q and W_K.

Shapes: B batch, H heads, T positions, d head width.
Source: RoFormer, arXiv 2104.09864, sec. 3.2 and 3.4.2.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Inexact, Shaped
from torch import Tensor

Rotate = Callable[[Tensor], Tensor]


def rope_table(
    positions: Shaped[Tensor, "*T"],
    frequencies: Float[Tensor, " half"],
    *,
    attention_factor: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "*T d"], Float[Tensor, "*T d"]]:
    """cos and sin of positions times frequencies, each angle twice, for `apply_rope`.

    Computed in float32 and rounded to `dtype` at the end: in bfloat16, position 257 would already
    be 256. `attention_factor` is YaRN's temperature; it scales queries and keys alike.

    Raises: TypeError for boolean positions.
    """
    angles = _angles(positions, frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    return cos.to(dtype), sin.to(dtype)


def apply_rope(
    x: Float[Tensor, "*BH T d"], cos: Float[Tensor, "*B T d"], sin: Float[Tensor, "*B T d"]
) -> Float[Tensor, "*BH T d"]:
    """Turn queries or keys; tables (T, d) for all sequences or (B, T, d) for each its own.

    x is (B, H, T, d), or without heads (B, T, d) or (T, d).

    Rotate-half layout. Bit for bit transformers' apply_rotary_pos_emb, also in its gradients; the
    result has the promoted dtype of `x` and the tables. `rotation` prepares tables for many calls.

    Raises: ValueError for an odd width or tables that do not fit.
    Source: RoFormer, arXiv 2104.09864, sec. 3.4.2, with pairs d/2 apart.
    """
    return rotation(cos, sin)(x)


def rotation(cos: Float[Tensor, "*B T d"], sin: Float[Tensor, "*B T d"]) -> Rotate:
    """`apply_rope` at these positions as a function of x: one preparation for all layers.

    The minus sign moves from half of x to half of the table, which all heads and layers share.
    What is left is x * cos + roll(x) * signed_sin: four operations instead of seven, as many
    backward, and nothing of x kept for it.

    Raises: ValueError for tables that are not alike; the function, for an x that does not fit.
    """
    if cos.shape != sin.shape or cos.ndim not in (2, 3) or cos.shape[-1] % 2:
        raise ValueError(
            "cos, sin: expected two tables (T, d) or (B, T, d) with an even d, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    half = cos.shape[-1] // 2
    signed_sin = sin.clone()
    signed_sin.narrow(-1, 0, half).neg_()
    if cos.ndim == 3:
        cos, signed_sin = cos.unsqueeze(1), signed_sin.unsqueeze(1)

    def rotate(x: Tensor) -> Tensor:
        if x.ndim in (2, 3):  # without heads
            return rotate(x.unsqueeze(-3) if x.ndim == 3 else x[None, None]).reshape(x.shape)
        check_fit(x, cos)
        return (x * cos).add_(x.roll(half, -1) * signed_sin)

    return rotate


def complex_table(
    positions: Shaped[Tensor, "*T"],
    frequencies: Float[Tensor, " half"],
    *,
    attention_factor: float = 1.0,
) -> Inexact[Tensor, "*T half"]:
    """e^{j m theta_i} as complex64, of length `attention_factor`: Meta's `freqs_cis`.

    Raises: TypeError for boolean positions.
    """
    angles = _angles(positions, frequencies)
    return torch.polar(torch.full_like(angles, attention_factor), angles)


def apply_rope_complex(
    x: Float[Tensor, "B H T d"], table: Inexact[Tensor, "*B T half"]
) -> Float[Tensor, "B H T d"]:
    """The same rotation on neighbouring features, as one complex product.

    In float32 at least, rounded once to the dtype of `x`.

    Raises: ValueError for an odd width or a table that does not fit.
    Source: the form of Meta's Llama code; RoFormer, arXiv 2104.09864, sec. 3.2.1.
    """
    if table.ndim == 3:
        table = table[:, None]
    check_fit(x, table, width=2 * table.shape[-1])
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def interleaved_to_half(weight: Float[Tensor, "N ..."], num_heads: int) -> Float[Tensor, "N ..."]:
    """Reorder the rows of W_Q or W_K (or a bias) from neighbouring pairs to halves, head by head.

    Raises: ValueError where the rows are no even number a head.
    """
    _check_rows(weight, num_heads)
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def half_to_interleaved(weight: Float[Tensor, "N ..."], num_heads: int) -> Float[Tensor, "N ..."]:
    """The inverse of `interleaved_to_half`.

    Raises: ValueError where the rows are no even number a head.
    """
    _check_rows(weight, num_heads)
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _check_rows(weight: Tensor, num_heads: int) -> None:
    if num_heads < 1 or weight.shape[0] % (2 * num_heads):
        raise ValueError(
            f"weight: expected an even number of rows for each of {num_heads} heads, "
            f"got {weight.shape[0]} rows"
        )


def _angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    if positions.dtype == torch.bool:
        raise TypeError("positions: expected whole numbers, got torch.bool; a mask goes elsewhere")
    return positions[..., None].float() * frequencies.to(positions.device)


def check_fit(x: Tensor, table: Tensor, *, width: int | None = None) -> None:
    """Refuse an x whose positions, width or batch are not those of a table (T, d), (B, 1, T, d)."""
    tail = (table.shape[-2], table.shape[-1] if width is None else width)
    if x.ndim != 4 or x.shape[2:] != tail or table.shape[:-3] not in ((), (1,), x.shape[:1]):
        batch = "B" if len(table.shape) == 2 or table.shape[0] == 1 else table.shape[0]
        raise ValueError(
            f"x: expected ({batch}, H, {tail[0]}, {tail[1]}) to fit the table, "
            f"got {tuple(x.shape)}; with a cache, tables are for the new positions alone"
        )
