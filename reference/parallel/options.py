"""An option is honoured or refused: a value that is none of its own is no default in disguise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args


def one_of(name: str, value: Any, choices: Any) -> None:
    """Refuse what is not among `choices`, a Literal or some values.

    Raises: ValueError.
    """
    values = get_args(choices) or tuple(choices)
    if value not in values:
        words = ", ".join(map(str, values[:-1])) + f" or {values[-1]}"
        raise ValueError(f"{name}: expected {words}, got {value!r}")


def at_least(minimum: int, counts: Iterable[tuple[str, Any]]) -> None:
    """Refuse each count, by name, that is less, or that is no whole number.

    Raises: ValueError, TypeError.
    """
    for name, count in counts:
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"{name}: expected a whole number, got {count!r}")
        if count < minimum:
            raise ValueError(f"{name}: expected at least {minimum}, got {count}")


def above_zero(numbers: Iterable[tuple[str, float]]) -> None:
    """Refuse each number, by name, that is not above 0.

    Raises: ValueError.
    """
    for name, number in numbers:
        if not number > 0:
            raise ValueError(f"{name}: expected above 0, got {number}")
