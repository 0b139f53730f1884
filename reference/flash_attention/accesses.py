"""Softmax by loads and stores: each pass over memory counted, element by element.

Where memory is slow, a softmax costs what it loads and stores. The loops here run on an array that
counts; they are as slow as they look, and meant for a few hundred numbers.

    safe softmax 4    online softmax 3    safe softmax, then top-k 5    fused with top-k 1

Source: Milakov and Gimelshein, arXiv 1805.02867, sec. 2 to 4.
"""

import heapq
import math
from collections.abc import Iterable, Sequence


class CountedArray:
    """Numbers in slow memory: each element read is a load, each one assigned a store."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = list(values)
        self.accesses = 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> float:
        self.accesses += 1
        return self.values[i]

    def __setitem__(self, i: int, value: float) -> None:
        self.accesses += 1
        self.values[i] = value


def naive(x: CountedArray, y: CountedArray) -> None:
    """Two loads and a store; overflows beyond exp(709)."""
    total = sum(math.exp(x[i]) for i in range(len(x)))
    for i in range(len(x)):
        y[i] = math.exp(x[i]) / total


def safe(x: CountedArray, y: CountedArray) -> None:
    """Three loads and a store."""
    largest = max(x[i] for i in range(len(x)))
    total = sum(math.exp(x[i] - largest) for i in range(len(x)))
    for i in range(len(x)):
        y[i] = math.exp(x[i] - largest) / total


def online(x: CountedArray, y: CountedArray) -> None:
    """Two loads and a store: maximum and sum in one pass."""
    largest, total = _normalizer(x[i] for i in range(len(x)))
    for i in range(len(x)):
        y[i] = math.exp(x[i] - largest) / total


def top_k(y: CountedArray, k: int) -> list[tuple[float, int]]:
    """The k largest values and their places: one load."""
    return heapq.nlargest(k, ((y[i], i) for i in range(len(y))), key=lambda pair: pair[0])


def online_top_k(x: CountedArray, k: int) -> list[tuple[float, int]]:
    """The k largest probabilities without storing any: one load in all.

    Softmax keeps the order, so that the k largest scores are enough.

    Source: arXiv 1805.02867, alg. 4.
    """
    best: list[tuple[float, int]] = []
    largest, total = -math.inf, 0.0
    for i in range(len(x)):
        value = x[i]
        new = max(largest, value)
        total = total * math.exp(largest - new) + math.exp(value - new)
        largest = new
        heapq.heappush(best, (value, -i))
        if len(best) > k:
            heapq.heappop(best)
    return [(math.exp(v - largest) / total, -i) for v, i in sorted(best, reverse=True)]


def _normalizer(values: Iterable[float]) -> tuple[float, float]:
    largest, total = -math.inf, 0.0
    for value in values:
        new = max(largest, value)
        total = total * math.exp(largest - new) + math.exp(value - new)
        largest = new
    return largest, total
