"""What calls do to values: contents and outlines to compare, lists refilled, tensors swapped."""

from typing import Any

import torch
from torch import Tensor


def swapped(value: Any, swaps: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return swaps.get(id(value), value)
    if type(value) in (list, tuple):
        return type(value)(swapped(v, swaps) for v in value)
    if type(value) is dict:
        return {k: swapped(v, swaps) for k, v in value.items()}
    return value


def refill(mine: Any, theirs: Any) -> None:
    """Give lists and dicts of the caller's the contents that they have on the other side."""
    if type(mine) is list and type(theirs) is list:
        for a, b in zip(mine, theirs, strict=False):
            refill(a, b)
        if len(mine) != len(theirs):
            mine[:] = theirs
        else:
            mine[:] = [_kept(a, b) for a, b in zip(mine, theirs, strict=True)]
    elif type(mine) is tuple and type(theirs) in (tuple, list):
        for a, b in zip(mine, theirs, strict=False):
            refill(a, b)
    elif type(mine) is dict and type(theirs) is dict:
        for key in mine.keys() & theirs.keys():
            refill(mine[key], theirs[key])
        new = {k: _kept(mine[k], v) if k in mine else v for k, v in theirs.items()}
        mine.clear()
        mine.update(new)


def _kept(mine: Any, theirs: Any) -> Any:
    is_container = type(mine) in (list, dict, tuple) and type(theirs) is type(mine)
    stays = is_container or not isinstance(theirs, (int, float, str, bool, type(None), Tensor))
    return mine if stays else theirs


def contents(tensors: list[Tensor]) -> list[bytes]:
    found = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().flatten()
        head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        found.append(head + flat.view(torch.uint8).numpy().tobytes() if flat.numel() else head)
    return found


def outline(value: Any) -> Any:
    """What changes when somebody adds to, takes from or replaces in a list or dict."""
    if type(value) in (list, tuple):
        return [outline(v) for v in value]
    if type(value) is dict:
        return [(k, outline(v)) for k, v in value.items()]
    return id(value)
