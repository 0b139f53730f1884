"""How two tensors differ, in words: the simple relations that mistakes leave behind."""

import itertools

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[numpy.float64]


def describe_difference(actual: Tensor, expected: Tensor) -> str:
    """The largest error and where it is, then the first simple relation that explains all of it.

    The tensors have equal shapes. Relations looked for: NaN or infinities, a constant factor,
    a constant offset, dimensions in another order, errors confined to some rows, few digits.
    """
    a, e = (t.detach().to(torch.float64).numpy() for t in (actual, expected))
    if not actual.dtype.is_floating_point and not actual.dtype.is_complex:
        return f"{int((a != e).sum())} of {a.size} elements differ. {_worst(a, e)}".rstrip()
    hints = [hint for hint in (_not_finite(a, e) or _relation(a, e),) if hint]
    return " ".join([_worst(a, e), *hints])


def _worst(a: Array, e: Array) -> str:
    with numpy.errstate(invalid="ignore"):
        error = numpy.nan_to_num(numpy.abs(a - e), nan=numpy.inf)
    error = numpy.where((a == e) | (numpy.isnan(a) & numpy.isnan(e)), 0.0, error)
    index = tuple(int(i) for i in numpy.unravel_index(int(error.argmax()), a.shape))
    place = f" at index {list(index)}" if index else ""
    got, wanted = float(a[index]), float(e[index])
    digits = 6 if f"{got:.6g}" != f"{wanted:.6g}" else 12
    return f"Largest error{place}: got {got:.{digits}g}, expected {wanted:.{digits}g}."


def _not_finite(a: Array, e: Array) -> str:
    for name, of in (("NaN", numpy.isnan), ("infinite", numpy.isinf)):
        extra = int((of(a) & ~of(e)).sum())
        if extra:
            return f"{extra} of {a.size} elements are {name} where numbers belong."
    return ""


def _relation(a: Array, e: Array) -> str:
    finite = numpy.isfinite(e)
    if not numpy.array_equal(numpy.isfinite(a), finite) or int(finite.sum()) < 2:
        return ""
    ours, theirs = a[finite], e[finite]
    scale = max(float(numpy.abs(theirs).max()), 1e-30)
    factor = float((ours * theirs).sum() / max(float((theirs * theirs).sum()), 1e-60))
    offset = float((ours - theirs).mean())

    def explains(candidate: Array) -> bool:
        return bool(numpy.abs(ours - candidate).max() <= 1e-4 * scale)

    if float(theirs.std()) > 1e-6 * scale:
        if explains(theirs):
            return _confined(a, e, scale)
        if explains(theirs * factor) and abs(factor) > 1e-6:
            if abs(factor + 1) < 1e-4:
                return "Every element has the opposite sign."
            return f"Every element is {factor:.5g} times the expected one."
        if explains(theirs + offset):
            return f"Every element is off by the same amount, {offset:+.5g}."
        if reordered := _reordered_dimensions(a, e, scale):
            return reordered
    return _confined(a, e, scale)


def _reordered_dimensions(a: Array, e: Array, scale: float) -> str:
    orders = itertools.permutations(range(a.ndim)) if a.ndim <= 4 else ()
    for order in itertools.islice(orders, 1, None):
        moved = e.transpose(order)
        if moved.shape != a.shape or not numpy.allclose(
            a, moved, rtol=0, atol=1e-4 * scale, equal_nan=True
        ):
            continue
        swapped = [dim for dim in range(a.ndim) if order[dim] != dim]
        if len(swapped) == 2:
            i, j = swapped
            return f"It is the expected tensor with dimensions {i} and {j} swapped."
        return f"It is the expected tensor with its dimensions in another order, permute{order}."
    return ""


def _confined(a: Array, e: Array, scale: float) -> str:
    with numpy.errstate(invalid="ignore"):
        error = numpy.nan_to_num(numpy.abs(a - e), nan=0.0)
    digits = float(error.max()) / scale
    if digits <= 1e-4:
        return (
            f"The error is tiny ({digits:.0e} of the largest value), but more than rounding: a "
            "step in a narrower dtype (.float() of float64?), or a small term such as eps."
        )
    if digits <= 2e-2:
        return (
            f"The error is small ({digits:.1e} of the largest value): "
            "right in the main, wrong in a detail or in precision."
        )
    wrong = error > 1e-4 * scale
    for dim in range(a.ndim):
        rows = wrong.any(axis=tuple(d for d in range(a.ndim) if d != dim))
        right = int((~rows).sum())
        if 0 < right < a.shape[dim]:
            listed = ", ".join(str(int(i)) for i in numpy.flatnonzero(rows)[:6])
            more = ", ..." if int(rows.sum()) > 6 else ""
            return f"Only indices {listed}{more} of dimension {dim} are wrong; the rest is right."
    return ""
