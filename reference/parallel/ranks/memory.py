"""The ledger of memory: bytes of the storages that are alive, by what they are for.

A dispatch mode sees each operation of a rank. A storage that an operation creates is added; a weak
reference takes it off when the last tensor on it dies, one that autograd keeps included. Categories
follow what can be seen:

    parameters             storages of an nn.Parameter, from its first use on
    gradients              .grad of such a parameter, once autograd has accumulated it
    optimizer_states       what torch.optim's step creates (its temporaries too)
    communication_buffers  what a collective allocates for its result
    activations            all else: saved for backward, temporary, or input
    host                   offloaded to the CPU's memory; not part of the total

`label` corrects where the program knows better. Views share their storage and count once; tensors
that the caller created before the run do not count, unless they are labelled or parameters.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CATEGORIES = (
    "parameters", "gradients", "optimizer_states", "activations", "communication_buffers", "host",
)  # fmt: skip
ON_DEVICE = CATEGORIES[:-1]
MAX_SAMPLES = 5_000


class MemorySample(NamedTuple):
    """Bytes by category at a virtual time."""

    seconds: float
    by_category: dict[str, int]


@dataclass
class MemoryUse:
    """What a rank holds and held at most. `peak` has each category's own peak, `at_peak` all
    categories at the moment of the peak of their sum, `peak_bytes`."""

    current: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    at_peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    peak_bytes: int = 0

    @property
    def current_bytes(self) -> int:
        return sum(self.current[c] for c in ON_DEVICE)


class _Entry:
    __slots__ = ("category", "is_labelled", "num_bytes", "reference")

    def __init__(self, reference: Any, category: str) -> None:
        self.reference, self.category = reference, category
        self.num_bytes, self.is_labelled = 0, False


class MemoryLedger:
    """One rank's storages. `now` gives the virtual time for the samples."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._live: dict[int, _Entry] = {}
        self._elastic: set[int] = set()
        self._default = "activations"
        self._use = MemoryUse()
        self._total = 0
        self._samples: dict[float, dict[str, int]] = {}
        self._most_at: dict[float, int] = {}

    @property
    def use(self) -> MemoryUse:
        """Now and at most; a copy."""
        self.refresh()
        use = self._use
        return MemoryUse(dict(use.current), dict(use.peak), dict(use.at_peak), use.peak_bytes)

    def samples(self) -> list[MemorySample]:
        """The use over virtual time; of each instant the most."""
        return [MemorySample(t, dict(held)) for t, held in self._samples.items()]

    def reset_peak(self) -> None:
        """Let peaks start from what is held now: to measure one step by itself."""
        self.refresh()
        held = self._use.current
        self._use = MemoryUse(held, dict(held), dict(held), self._total)

    @contextmanager
    def category(self, category: str, *, is_weak: bool = False) -> Iterator[None]:
        """Storages created inside belong to this category; a weak one yields to one around it."""
        before = self._default
        if not (is_weak and before != "activations"):
            self._default = _known(category)
        try:
            yield
        finally:
            self._default = before

    def label(self, what: Any, category: str) -> None:
        """Move storages to a category: of a tensor, a module, an optimizer's state, or many."""
        for tensor in _tensors(what):
            entry = self._entry(tensor.untyped_storage())
            self._move(entry, _known(category))
            entry.is_labelled = True
            self.watch(tensor, is_elastic=True)

    def watch(
        self, tensor: Tensor, category: str | None = None, *, is_elastic: bool = False
    ) -> None:
        """Count the tensor's storage, once, at its present size. A label outlasts `category`.

        `is_elastic`: its size may change behind our back, by `untyped_storage().resize_`, as FSDP
        does to free and refill parameters; it is looked at again before each peak.
        """
        storage = tensor.untyped_storage()
        entry = self._entry(storage)
        if is_elastic:
            self._elastic.add(storage._cdata)
        if category is not None and category != entry.category and not entry.is_labelled:
            self._move(entry, category)
        if storage.nbytes() != entry.num_bytes:
            self._resize(entry, storage.nbytes())
            if self._elastic:
                self.refresh()
            self._mark(entry.category)

    def knows(self, key: int) -> bool:
        """Whether this storage is counted."""
        return key in self._live

    def refresh(self) -> None:
        """Look again at the storages whose size may have changed."""
        for key in self._elastic:
            entry = self._live[key]
            storage = entry.reference()
            if storage is not None and storage.nbytes() != entry.num_bytes:
                self._resize(entry, storage.nbytes())

    def close(self) -> None:
        """Stop counting: what dies after the run is no longer of interest."""
        self.refresh()
        self._live, self._elastic = {}, set()

    def _entry(self, storage: torch.UntypedStorage) -> _Entry:
        key = storage._cdata
        entry = self._live.get(key)
        if entry is None:
            reference = weakref.ref(storage, lambda _: self._forget(key))
            entry = self._live[key] = _Entry(reference, self._default)
        return entry

    def _resize(self, entry: _Entry, num_bytes: int) -> None:
        added = num_bytes - entry.num_bytes
        entry.num_bytes = num_bytes
        self._use.current[entry.category] += added
        if entry.category != "host":
            self._total += added

    def _move(self, entry: _Entry, category: str) -> None:
        num_bytes = entry.num_bytes
        self._resize(entry, 0)
        entry.category = category
        self._resize(entry, num_bytes)
        self._mark(category)

    def _forget(self, key: int) -> None:
        entry = self._live.pop(key, None)
        if entry is not None:
            self._elastic.discard(key)
            self._resize(entry, 0)

    def _mark(self, category: str) -> None:
        """After a category has grown: its peak, that of the sum, and a sample for the plot."""
        use = self._use
        use.peak[category] = max(use.peak[category], use.current[category])
        if self._total > use.peak_bytes:
            use.peak_bytes, use.at_peak = self._total, dict(use.current)
        now = self._now()
        if self._total > self._most_at.get(now, -1):
            self._most_at = {now: self._total}
            self._samples[now] = dict(use.current)
            if len(self._samples) > MAX_SAMPLES:
                del self._samples[next(iter(self._samples))]


def _known(category: str) -> str:
    if category not in CATEGORIES:
        raise ValueError(f"category: expected one of {', '.join(CATEGORIES)}; got {category!r}")
    return category


def _tensors(what: Any) -> Iterator[Tensor]:
    if isinstance(what, Tensor):
        yield what
    elif isinstance(what, nn.Module):
        yield from what.parameters()
    elif isinstance(what, torch.optim.Optimizer):
        yield from _tensors(what.state)
    elif isinstance(what, Mapping):
        yield from _tensors(what.values())
    elif isinstance(what, Iterable) and not isinstance(what, str | bytes):
        for one in what:
            yield from _tensors(one)
