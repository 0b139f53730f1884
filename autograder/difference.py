"""How two tensors differ, in words: the simple relations that mistakes leave behind."""

import numpy
import torch
from torch import Tensor


def describe_difference(actual: Tensor, expected: Tensor) -> str:
    """The largest error and where it is, then the first simple relation that explains all of it.

    The tensors have equal shapes. Relations looked for: NaN or infinities, a constant factor,
    a constant offset, two swapped dimensions, errors confined to some rows, few digits.
    """
    a, e = actual.detach().to(torch.float64), expected.detach().to(torch.float64)
    if not actual.dtype.is_floating_point and not actual.dtype.is_complex:
        wrong = int((a != e).sum())
        return f"{wrong} of {a.numel()} elements differ. {_worst(a, e)}".rstrip()
    hints = [hint for hint in (_not_finite(a, e) or _relation(a, e),) if hint]
    return " ".join([_worst(a, e), *hints])


def _worst(a: Tensor, e: Tensor) -> str:
    error = torch.where((a == e) | (a.isnan() & e.isnan()), 0.0, (a - e).abs())
    error = error.nan_to_num(nan=torch.inf)
    flat = int(error.argmax())
    # Not torch.unravel_index, which imports sympy at its first call: 0.6 s.
    index = [int(i) for i in numpy.unravel_index(flat, a.shape)]
    place = f" at index {index}" if index else ""
    return f"Largest error{place}: got {a.flatten()[flat]:.6g}, expected {e.flatten()[flat]:.6g}."


def _not_finite(a: Tensor, e: Tensor) -> str:
    for name, of in (("NaN", torch.isnan), ("infinite", torch.isinf)):
        extra = of(a) & ~of(e)
        if extra.any():
            return f"{int(extra.sum())} of {a.numel()} elements are {name} where numbers belong."
    return ""


def _relation(a: Tensor, e: Tensor) -> str:
    finite = a.isfinite() & e.isfinite()
    if not torch.equal(a.isfinite(), e.isfinite()) or int(finite.sum()) < 2:
        return ""
    scale = e[finite].abs().max().clamp_min(1e-30)
    factor = (a[finite] * e[finite]).sum() / e[finite].square().sum().clamp_min(1e-60)
    offset = (a[finite] - e[finite]).mean()

    def explains(candidate: Tensor) -> bool:
        return bool((a[finite] - candidate[finite]).abs().max() <= 1e-4 * scale)

    if float(e[finite].std()) > 1e-6 * float(scale):
        if explains(e * factor) and abs(float(factor)) > 1e-6:
            if abs(float(factor) + 1) < 1e-4:
                return "Every element has the opposite sign."
            return f"Every element is {float(factor):.5g} times the expected one."
        if explains(e + offset):
            return f"Every element is off by the same amount, {float(offset):+.5g}."
        if swapped := _swapped_dimensions(a, e, float(scale)):
            return swapped
    return _confined(a, e, float(scale))


def _swapped_dimensions(a: Tensor, e: Tensor, scale: float) -> str:
    for i in range(a.ndim):
        for j in range(i + 1, a.ndim):
            if a.shape[i] == a.shape[j] and torch.allclose(
                a, e.transpose(i, j), rtol=0, atol=1e-4 * scale, equal_nan=True
            ):
                return f"It is the expected tensor with dimensions {i} and {j} swapped."
    return ""


def _confined(a: Tensor, e: Tensor, scale: float) -> str:
    error = (a - e).abs().nan_to_num(nan=0.0)
    if float(error.max()) <= 2e-2 * scale:
        return (
            f"The error is small ({float(error.max()) / scale:.1e} of the largest value): "
            "right in the main, wrong in a detail or in precision."
        )
    wrong = error > 1e-4 * scale
    for dim in range(a.ndim):
        others = [d for d in range(a.ndim) if d != dim]
        rows = wrong.any(dim=others) if others else wrong
        right = int((~rows).sum())
        if 0 < right < a.shape[dim]:
            listed = ", ".join(str(int(i)) for i in rows.nonzero().flatten()[:6])
            more = ", ..." if int(rows.sum()) > 6 else ""
            return f"Only indices {listed}{more} of dimension {dim} are wrong; the rest is right."
    return ""
