"""Which parameters a result depends on: a walk back through autograd's graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def reached_leaves(output: Any) -> set[Tensor]:
    """The leaves to which backward from `output` leads; lists, tuples and dicts are searched.

    Raises: TypeError for an output without tensors that require a gradient.
    """
    roots = [tensor.grad_fn for tensor in tensors_of(output) if tensor.grad_fn is not None]
    if not roots:
        raise TypeError(f"output: expected tensors with a graph, got {type(output).__name__}")
    seen: set[Any] = set(roots)
    leaves: set[Tensor] = set()
    while roots:
        node = roots.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.add(leaf)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                roots.append(following)
    return leaves


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of an output: itself, or those in its lists, tuples and dicts."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = output.values()
    if isinstance(output, Iterable) and not isinstance(output, str):
        return [tensor for part in output for tensor in tensors_of(part)]
    return []
