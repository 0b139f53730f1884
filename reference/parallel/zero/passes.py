"""How many backward passes a step has had: the same number on all ranks, whatever they reach.

A pass inside of another one, as a checkpoint makes, is part of it. So is what a zero-bubble
schedule has put off: weights' gradients, each in a backward of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd import Variable

_of_this_thread = threading.local()  # simulated ranks are threads


@contextmanager
def same_pass() -> Iterator[None]:
    """Backward passes inside go on with one that has been counted."""
    before = getattr(_of_this_thread, "is_same", False)
    _of_this_thread.is_same = True
    try:
        yield
    finally:
        _of_this_thread.is_same = before


class Passes:
    """Counts them, told of each gradient that arrives; `at_end` is called when one has ended."""

    def __init__(self, at_end: Callable[[], None]) -> None:
        self.count, self._at_end = 0, at_end
        self._seen: set[int] = set()
        self._open: set[int] = set()

    def note(self) -> None:
        """A gradient has arrived, in the backward pass that runs now."""
        task = torch._C._current_graph_task_id()
        if task in self._seen:
            return
        self._seen.add(task)
        if self._open or getattr(_of_this_thread, "is_same", False):
            return
        self.count += 1
        self._open.add(task)
        Variable._execution_engine.queue_callback(lambda: self._end(task))

    def _end(self, task: int) -> None:
        self._open.discard(task)
        self._at_end()

    def clear(self) -> None:
        """Begin to count again, for the next step."""
        self.count, self._seen, self._open = 0, set(), set()
