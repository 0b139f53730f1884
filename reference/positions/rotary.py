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

from typing import Any

import torch
from jaxtyping import Float, Inexact, Shaped
from torch import Tensor


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
    if positions.dtype == torch.bool:
        raise TypeError("positions: expected whole numbers, got torch.bool; a mask goes elsewhere")
    angles = positions[..., None].float() * frequencies.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    return cos.to(dtype), sin.to(dtype)


def apply_rope(
    x: Float[Tensor, "B H T d"], cos: Float[Tensor, "*B T d"], sin: Float[Tensor, "*B T d"]
) -> Float[Tensor, "B H T d"]:
    """Turn queries or keys; tables (T, d) for all sequences or (B, T, d) for each its own.

    Rotate-half layout. Bit for bit transformers' apply_rotary_pos_emb, also in its gradients, with
    a third less memory traffic: halves are added where they belong instead of concatenated.

    Raises: ValueError for an odd width or tables that do not fit.
    """
    check_table(x, cos, sin)
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    if cos.requires_grad or sin.requires_grad:
        return x * cos + rotate_half(x) * sin
    if x.requires_grad and torch.is_grad_enabled():
        return Rotation.apply(x, cos, sin)
    return rotate_in_halves(x, cos, sin)


def rotate_half(x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B d"]:
    """(-second half, first half): every pair turned by 90 degrees."""
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), dim=-1)


def rotate_in_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin, the second term added half by half."""
    (first, second), (sin_first, sin_second) = x.chunk(2, -1), sin.chunk(2, -1)
    out = x * cos
    out_first, out_second = out.chunk(2, -1)
    out_first.sub_(second * sin_first)
    out_second.add_(first * sin_second)
    return out


class Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate_in_halves(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return Rotation.apply(grad, cos, -sin.roll(sin.shape[-1] // 2, -1)), None, None


def complex_table(
    positions: Shaped[Tensor, "*T"], frequencies: Float[Tensor, " half"]
) -> Inexact[Tensor, "*T half"]:
    """e^{j m theta_i} as complex numbers of length one."""
    angles = positions[..., None].float() * frequencies.to(positions.device)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rope_complex(
    x: Float[Tensor, "B H T d"], table: Inexact[Tensor, "*B T half"]
) -> Float[Tensor, "B H T d"]:
    """The same rotation on neighbouring features, as one complex product in float32.

    Raises: ValueError for an odd width or a table that does not fit.
    Source: the form of Meta's Llama code; RoFormer, arXiv 2104.09864, eq. 14.
    """
    check_table(x, table, table, width=x.shape[-1] // 2)
    if table.ndim == 3:
        table = table[:, None]
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
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


def check_table(x: Tensor, cos: Tensor, sin: Tensor, *, width: int | None = None) -> None:
    """Refuse odd widths, and tables whose positions or widths are not those of x."""
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"x: expected (B, H, T, d) with an even d, got {tuple(x.shape)}")
    tail = (x.shape[2], x.shape[3] if width is None else width)
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.shape == tail or (
            table.ndim == 3 and table.shape[1:] == tail and table.shape[0] in (1, x.shape[0])
        )
        if not fits:
            raise ValueError(
                f"{name}: expected {tail} or {(x.shape[0], *tail)}, got {tuple(table.shape)}; "
                "with a cache, tables are for the new positions alone"
            )
