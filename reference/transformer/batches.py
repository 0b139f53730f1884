"""Batches from one long text of token ids, which may lie on disk and be larger than memory.

    batch_at     the step-th batch of random windows: a function of the seed and the step alone
    Batches      an epoch of windows side by side, each once, in an order drawn anew

A text is a tensor, or a numpy array such as `np.memmap(path, np.uint16, "r")`: of that, only the
windows of a batch are read.

Shapes: B batch, T tokens, N tokens of the text.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

Text = Tensor | np.ndarray


def batch_at(
    text: Text, *, step: int, batch_size: int, seq_len: int, seed: int = 0
) -> Int[Tensor, "B T"]:
    """The `step`-th batch: windows of `seq_len` tokens from random places.

    Raises: ValueError for a text shorter than a window, TypeError for one of no whole numbers.
    """
    _check(text, seq_len)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(text) - seq_len + 1, (batch_size, 1), generator=generator)
    return _windows(text, starts, seq_len)


class Batches:
    """An epoch of batches, like a DataLoader: `len` of them, and each iteration is an epoch.

    Windows lie side by side. Those that do not fill a last batch are left out; shuffled, they are
    others in each epoch. `epoch` counts those begun: set it, and pass `start`, to go on with a run.

    Raises: ValueError for a text that is shorter than one batch or counts below 1, TypeError for
    one of no whole numbers.
    """

    def __init__(
        self,
        text: Text,
        *,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        is_shuffled: bool = True,
    ) -> None:
        for name, count in (("batch_size", batch_size), ("seq_len", seq_len)):
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        _check(text, batch_size * seq_len)
        self.text, self.batch_size, self.seq_len = text, batch_size, seq_len
        self.seed, self.is_shuffled, self.epoch = seed, is_shuffled, 0

    def __len__(self) -> int:
        return len(self.text) // self.seq_len // self.batch_size

    def __iter__(self) -> Iterator[Int[Tensor, "B T"]]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[Int[Tensor, "B T"]]:
        """The next epoch's batches from the `start`-th on."""
        num_windows = len(self.text) // self.seq_len
        order = torch.arange(num_windows)
        if self.is_shuffled:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(num_windows, generator=generator)
        self.epoch += 1
        for rows in order.split(self.batch_size)[start : len(self)]:
            yield _windows(self.text, rows[:, None] * self.seq_len, self.seq_len)


def _windows(text: Text, starts: Int[Tensor, "B 1"], seq_len: int) -> Int[Tensor, "B T"]:
    places = starts + torch.arange(seq_len)
    if isinstance(text, Tensor):
        return text[places]
    return torch.from_numpy(text[places.numpy()].astype(np.int64))


def _check(text: Text, needed: int) -> None:
    if len(text) < needed:
        raise ValueError(f"text: expected at least {needed} tokens, got {len(text)}")
    if isinstance(text, Tensor):
        is_whole = not text.is_floating_point() and text.dtype != torch.bool
    else:
        is_whole = np.issubdtype(text.dtype, np.integer)
    if text.ndim != 1 or not is_whole:
        raise TypeError(f"text: expected a row of whole numbers, got {text.dtype}")
