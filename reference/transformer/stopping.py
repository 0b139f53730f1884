"""Where an answer ends: at a token, or as soon as its text has a certain string in it.

A string may be cut into tokens in many ways, and a token may hold its end and more. So it is looked
for in the text and not among the ids.

Shapes: B batch.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

# An id, or a question to all tokens of an answer so far, the newest last.
Stop = int | Callable[[Sequence[int]], bool]


def stop_strings(
    decode: Callable[[Sequence[int]], str], strings: Sequence[str]
) -> Callable[[Sequence[int]], bool]:
    """A `stop` for `generate` and `serve`: whether an answer has one of the strings in its text.

    To be asked after each token. Only the end is decoded: a token has one byte at least.

    Raises: ValueError for no strings or an empty one.
    """
    if isinstance(strings, str) or not strings or not all(strings):
        raise ValueError(f"strings: expected some that are not empty, in a list, got {strings!r}")
    reach = max(len(s.encode()) for s in strings)

    def has_stopped(tokens: Sequence[int]) -> bool:
        end = decode(tokens[-reach:])
        return any(s in end for s in strings)

    return has_stopped


def text_before(text: str, strings: Sequence[str]) -> str:
    """The text up to the first of the strings, or all of it: what is shown of an answer."""
    return text[: min((text.index(s) for s in strings if s in text), default=len(text))]


def has_ended(stop: Stop, chosen: Sequence[Tensor]) -> Bool[Tensor, " B"]:
    """Which rows have come to their end, by the (B,) tokens chosen so far."""
    if not callable(stop):
        return chosen[-1] == stop
    rows = torch.stack(list(chosen), 1).tolist()
    return torch.tensor([stop(row) for row in rows], device=chosen[-1].device)
