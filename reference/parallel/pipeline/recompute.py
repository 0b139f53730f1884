"""Forget activations after the forward, and compute them again when the backward comes.

    recompute(block, x)                  full: a block keeps its input alone, one forward more
    attend=recomputed(attention)         selective: scores and probabilities alone, 5 a s / h of
                                         the 34 + 5 a s / h bytes an element, for few FLOPs

Autograd asks for a place for each tensor that it wants to save, and gets a number. When backward
asks for the first number back, the function runs again, and each number has its tensor. The graph
is the first run's, and there is one backward: hooks and callbacks of others see nothing unusual.
The second run must be the first: circumstances.py says what that takes.

Papers: Chen et al., 1604.06174; selective, Korthikanti et al., 2205.05198, sec. 5.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from reference.parallel.pipeline.circumstances import Circumstances

Result = TypeVar("Result")


def recompute(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """`function(*args, **kwargs)`, of which backward keeps the tensors among the arguments alone.

    Values and gradients are those of the plain call, bit by bit, whether parameters learn or are
    frozen. Dropout draws the same masks, from torch's random numbers or a torch.Generator; running
    statistics are those of one forward; collectives are called again. Calls may be nested.

    Raises: RuntimeError in backward, where the second run saves other tensors than the first, or
    with parameters that have been changed in between.
    Source: torch.utils.checkpoint with use_reentrant=False.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    call = _Call(function, args, kwargs)
    with saved_tensors_hooks(call.number, call.tensor), call.circumstances.noting_draws():
        result = function(*args, **kwargs)
    call.is_over = True
    return result


def recomputed(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function` that forgets: for `attend=` of an attention layer."""

    def forgetful(*args: Any, **kwargs: Any) -> Result:
        return recompute(function, *args, **kwargs)

    return forgetful


class _Call:
    """What the second run needs, and what it has found."""

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.function, self.circumstances, self.is_over = function, Circumstances(), False
        self.notes: list[_Note] = []
        self.found: dict[int, Tensor] = {}
        self.graph_task = -1
        values, self.structure = tree_flatten((args, kwargs))
        self.others = [None if isinstance(value, Tensor) else value for value in values]
        self.places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
        # Autograd keeps the tensors: a recompute around this one forgets them too, and a change in
        # place is found out.
        anchor = torch.empty(0, requires_grad=True)
        self.inputs = _Inputs.apply(anchor, *(values[i] for i in self.places))

    def number(self, tensor: Tensor) -> int:
        """In place of a tensor that is to be saved."""
        self.notes.append(_Note(tensor))
        return len(self.notes) - 1

    def tensor(self, number: int) -> Tensor:
        """In place of a number. Each is given once, to be freed when backward is past it."""
        task = torch._C._current_graph_task_id()
        if task != self.graph_task:
            self.found.clear()
        if number in self.found:
            return self.found.pop(number)
        again = self.run_again()
        if task == -1 or task == self.graph_task:  # looked at by hand, or for a second time
            return again[number]
        self.graph_task, self.found = task, again
        Variable._execution_engine.queue_callback(again.clear)
        return again.pop(number)

    def run_again(self) -> dict[int, Tensor]:
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            found.append(tensor.detach())
            if len(found) <= len(self.notes):
                self.notes[len(found) - 1].check(tensor, self.name)
            return found[-1]

        values = list(self.others)
        for place, tensor in zip(self.places, self.inputs.grad_fn.saved_tensors, strict=True):
            values[place] = tensor
        args, kwargs = tree_unflatten(values, self.structure)
        with (
            self.circumstances.again(),
            torch.enable_grad(),
            saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            self.function(*args, **kwargs)
        if len(found) < len(self.notes) or (self.is_over and len(found) > len(self.notes)):
            raise RuntimeError(
                f"{self.name}: expected to save {len(self.notes)} tensors again, got {len(found)}; "
                "a function that is recomputed must do the same each time"
            )
        return dict(enumerate(found))

    @property
    def name(self) -> str:
        return getattr(self.function, "__qualname__", type(self.function).__name__)


class _Note:
    """What is known of a saved tensor: its kind, and which version of which leaf it was."""

    def __init__(self, tensor: Tensor) -> None:
        self.kind = _kind(tensor)
        owner = _owner(tensor)
        self.owner = weakref.ref(owner) if owner.is_leaf else None
        self.version = owner._version

    def check(self, tensor: Tensor, name: str) -> None:
        if _kind(tensor) != self.kind:
            raise RuntimeError(
                f"{name}: expected to save {_words(self.kind)} again, got {_words(_kind(tensor))}; "
                "a function that is recomputed must do the same each time"
            )
        owner = _owner(tensor)
        is_same = self.owner is not None and self.owner() is owner
        if is_same and owner._version != self.version:
            raise RuntimeError(
                f"{name}: expected the tensor of shape {tuple(owner.shape)} as in forward, it has "
                "been changed in place; update parameters after backward"
            )


def _owner(tensor: Tensor) -> Tensor:
    """The tensor itself, or the one that it is a view of: a linear layer saves its weight's."""
    return tensor if tensor._base is None else tensor._base


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _words(kind: tuple[torch.Size, torch.dtype, torch.device]) -> str:
    shape, dtype, device = kind
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')} on {device}"


class _Inputs(torch.autograd.Function):
    """Keeps tensors as autograd does, for a backward that never comes."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("nothing depends on this node")
