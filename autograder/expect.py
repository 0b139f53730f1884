"""Comparisons for graders. Each refusal says what was expected, what came, and how they differ.

Types are compared exactly: a subclass could redefine equality, and no answer decides its own grade.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autograder import refusals
from autograder.difference import describe_difference
from autograder.refusals import Refusal

# Relative and absolute tolerance by dtype. Wider than rounding asks, so that every order of
# operations passes, and narrower than any mistake worth naming.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
TENSOR_TYPES = (Tensor, torch.nn.Parameter)
# Bound before any answer is imported: what an answer makes of torch.allclose is its own affair.
_allclose, _equal = torch.allclose, torch.equal


def close(
    actual: Any,
    expected: Any,
    what: str = "the output",
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Require equal structure, types, shapes and dtypes, and values within a tolerance.

    `expected` may be a tensor, a number, a string, or a tuple, list or dict of these.
    """
    if isinstance(expected, Tensor):
        _tensors_close(actual, expected, what, rtol, atol)
    elif isinstance(expected, dict):
        _require_type(actual, expected, what)
        if set(actual) != set(expected):
            raise _wrong(refusals.WRONG_VALUE, f"the keys of {what}", sorted(expected, key=str),
                         sorted(actual, key=str))  # fmt: skip
        for key in expected:
            close(actual[key], expected[key], f"{what}[{key!r}]", rtol=rtol, atol=atol)
    elif isinstance(expected, (tuple, list)):
        _require_type(actual, expected, what)
        if len(actual) != len(expected):
            raise _wrong(refusals.WRONG_VALUE, f"the length of {what}", len(expected), len(actual))
        for i, item in enumerate(expected):
            close(actual[i], item, f"{what}[{i}]", rtol=rtol, atol=atol)
    elif isinstance(expected, float):
        number(actual, expected, rel=1e-6 if rtol is None else rtol, what=what)
    else:
        equal(actual, expected, what)


def equal(actual: Any, expected: Any, what: str = "the output") -> None:
    """Require the same type and exactly the same value."""
    if isinstance(expected, (Tensor, dict, tuple, list)):
        return close(actual, expected, what, rtol=0.0, atol=0.0)
    _require_type(actual, expected, what)
    if actual != expected:
        raise _wrong(refusals.WRONG_VALUE, what, repr(expected), repr(actual))


def number(actual: Any, expected: float, *, rel: float = 1e-6, what: str = "the output") -> None:
    """Require an int or float within a relative tolerance of `expected`."""
    if type(actual) not in (int, float):
        got = describe_type(actual)
        remedy = " (use .item())" if isinstance(actual, Tensor) and actual.numel() == 1 else ""
        raise Refusal(refusals.WRONG_TYPE, f"{what}: expected a number, got {got}{remedy}.")
    if not math.isclose(actual, expected, rel_tol=rel, abs_tol=1e-12):
        ratio = f" (that is {actual / expected:.6g} times it)" if expected else ""
        raise Refusal(
            refusals.WRONG_VALUE, f"{what}: expected {expected:,.10g}, got {actual:,.10g}{ratio}."
        )


def true(condition: Any, message: str) -> None:
    """Require a condition of the grader's own; `message` is what the student reads."""
    if not bool(condition):
        raise Refusal(refusals.WRONG_VALUE, message)


def raises(error: type[Exception], call: Callable[[], Any], what: str = "the call") -> None:
    """Require that the student's function refuses an input by raising `error`."""
    from autograder.student import StudentError

    try:
        call()
    except StudentError as caught:
        if isinstance(caught.original, error) and type(caught.original) is not NotImplementedError:
            return
        raise
    except Refusal as refusal:
        if refusal.kind != refusals.RETURNED_NONE:
            raise
    raise Refusal(refusals.WRONG_VALUE, f"{what}: expected {error.__name__}, nothing was raised.")


def describe_type(value: Any) -> str:
    """A value's type as a student would name it: 'a tensor of shape (2, 3)', 'None', 'a list'."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _tensors_close(
    actual: Any, expected: Tensor, what: str, rtol: float | None, atol: float | None
) -> None:
    if type(actual) not in TENSOR_TYPES:
        raise Refusal(
            refusals.WRONG_TYPE, f"{what}: expected a tensor, got {describe_type(actual)}."
        )
    if actual.shape != expected.shape:
        raise _wrong(
            refusals.WRONG_SHAPE, f"{what}: shape", tuple(expected.shape), tuple(actual.shape)
        )
    if actual.dtype != expected.dtype:
        raise _wrong(refusals.WRONG_DTYPE, f"{what}: dtype", expected.dtype, actual.dtype)
    default = TOLERANCE.get(expected.dtype, 0.0)
    rtol, atol = default if rtol is None else rtol, default if atol is None else atol
    if not _same_values(actual, expected.to(actual.device), rtol, atol):
        raise Refusal(
            refusals.WRONG_VALUE,
            f"{what}: wrong values. {describe_difference(actual.cpu(), expected.cpu())}",
        )


def _same_values(actual: Tensor, expected: Tensor, rtol: float, atol: float) -> bool:
    if not (expected.dtype.is_floating_point or expected.dtype.is_complex):
        return _equal(actual, expected)
    return _allclose(actual, expected, rtol, atol, equal_nan=True)


def _require_type(actual: Any, expected: Any, what: str) -> None:
    if type(actual) is not type(expected):
        article = describe_type(expected)
        raise Refusal(
            refusals.WRONG_TYPE, f"{what}: expected {article}, got {describe_type(actual)}."
        )


def _wrong(kind: str, what: str, expected: Any, actual: Any) -> Refusal:
    return Refusal(kind, f"{what}: expected {expected}, got {actual}.")
