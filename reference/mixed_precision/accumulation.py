"""Sums in few bits: where low precision hurts most, and why hardware accumulates in float32.

Each addition rounds the running total to its format. Once the total is 2^(m+1) times a term, half
a spacing is more than the term and the addition changes nothing: the sum stalls.

Source: Micikevicius et al., arXiv 1710.03740, sec. 3.3; Kahan, CACM 8(1), 1965.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def running_sum(x: Float[Tensor, "N ..."], *, dtype: torch.dtype) -> Float[Tensor, "..."]:
    """x[0] + x[1] + ... in this order, the total rounded to `dtype` after each addition."""
    total = torch.zeros(x.shape[1:], dtype=dtype, device=x.device)
    for term in x.to(dtype):
        total = total + term
    return total


def compensated_sum(x: Float[Tensor, "N ..."], *, dtype: torch.dtype) -> Float[Tensor, "..."]:
    """`running_sum` that keeps what each addition rounds off and adds it to the next term (Kahan).

    Two values of few bits then serve nearly as well as one of twice as many.
    """
    total = torch.zeros(x.shape[1:], dtype=dtype, device=x.device)
    lost = torch.zeros_like(total)
    for term in x.to(dtype):
        corrected = term + lost
        grown = total + corrected
        lost = corrected - (grown - total)
        total = grown
    return total


def matmul_accumulating(
    a: Float[Tensor, "M K"],
    b: Float[Tensor, "K N"],
    *,
    accumulate: torch.dtype,
    chunk: int = 16,
) -> Float[Tensor, "M N"]:
    """a @ b as a tensor core does it: exact products, `chunk` of them summed in float32, and each
    chunk added to an accumulator in the dtype `accumulate`, which is that of the result.

    Raises: ValueError for shapes that do not fit or a chunk below 1.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"a, b: expected (M, K) and (K, N), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    total = torch.zeros(a.shape[0], b.shape[1], dtype=accumulate, device=a.device)
    for rows, columns in zip(a.split(chunk, 1), b.split(chunk, 0), strict=True):
        total = total + (rows.float() @ columns.float()).to(accumulate)
    return total
