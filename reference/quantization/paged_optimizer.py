"""A paged optimizer: Adam's moments on the device while there is room, on the host while not.

Memory peaks when a long sequence comes by. The moments, 8 bytes a trained parameter, are needed
only in `step`. As pages they can make room for the peak and come back when they are touched, as
memory that an operating system swaps; where everything fits, nothing ever moves.

The device is simulated: it has a budget in bytes, and what is on it is counted exactly. A page
holds both moments of a stretch of one parameter. Touching a page that is on the host is a page
fault: it is copied in, after the least recently used pages were copied out.

Papers: QLoRA, 2305.14314, sec. 3, "Paged Optimizers".
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reference.transformer.optimizer import AdamW, adamw_update


class OutOfDeviceMemory(RuntimeError):
    """What was asked for does not fit the device, even with every page on the host."""


@dataclass
class PagingCounts:
    """Page faults, evictions, and the bytes that they moved."""

    faults: int = 0
    evictions: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass
class PagedMemory:
    """A device of `budget_bytes` and a host without limit, which share pages.

    `page_bytes` is the largest page. `on_device` is in order of use, the least recent first.

    Raises: ValueError for a budget below one page or a page below 16 bytes, two float64.
    """

    budget_bytes: int
    page_bytes: int = 1 << 16
    on_device: OrderedDict[int, Tensor] = field(default_factory=OrderedDict, repr=False)
    on_host: dict[int, Tensor] = field(default_factory=dict, repr=False)
    counts: PagingCounts = field(default_factory=PagingCounts)
    reserved_bytes: int = 0
    used_bytes: int = 0
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        if self.page_bytes < 16:
            raise ValueError(
                f"page_bytes: expected at least 16, two float64 moments, got {self.page_bytes}"
            )
        if self.budget_bytes < self.page_bytes:
            raise ValueError(
                f"budget_bytes: expected at least one page of {self.page_bytes} bytes, got "
                f"{self.budget_bytes}; a page must be on the device to be used"
            )

    def allocate(self, page: Tensor) -> int:
        """A new page's number. It starts on the device if there is room, else on the host.

        Raises: ValueError for a page larger than `page_bytes`.
        """
        if page.nbytes > self.page_bytes:
            raise ValueError(f"page: expected at most {self.page_bytes} bytes, got {page.nbytes}")
        number = len(self.on_device) + len(self.on_host)
        if self.free_bytes >= page.nbytes:
            self._place(number, page)
        else:
            self.on_host[number] = page
        return number

    def touch(self, number: int) -> Tensor:
        """The page, on the device; valid until the next call that may move pages.

        Raises: KeyError for a page that was never allocated; OutOfDeviceMemory where reservations
            leave no room for it.
        """
        if number in self.on_device:
            self.on_device.move_to_end(number)
            return self.on_device[number]
        self._make_room(self.on_host[number].nbytes)
        page = self.on_host.pop(number)
        self.counts.faults += 1
        self.counts.bytes_in += page.nbytes
        self._place(number, page.clone())
        return self.on_device[number]

    def peek(self, number: int) -> Tensor:
        """The page wherever it is, without moving it: to be read, not kept."""
        return self.on_device[number] if number in self.on_device else self.on_host[number]

    @contextmanager
    def reserve(self, num_bytes: int) -> Iterator[None]:
        """Activations of a forward and backward: pages are evicted until they fit, then freed.

        Raises: OutOfDeviceMemory where they do not fit even alone.
        """
        self._make_room(num_bytes)
        self.reserved_bytes += num_bytes
        self._account(num_bytes)
        try:
            yield
        finally:
            self.reserved_bytes -= num_bytes
            self._account(-num_bytes)

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self.used_bytes

    def _make_room(self, num_bytes: int) -> None:
        if num_bytes < 0:
            raise ValueError(f"num_bytes: expected at least 0, got {num_bytes}")
        if num_bytes > self.budget_bytes - self.reserved_bytes:
            raise OutOfDeviceMemory(
                f"{num_bytes} bytes asked for, {self.budget_bytes - self.reserved_bytes} left of "
                f"{self.budget_bytes} with every page on the host; shorten the batch"
            )
        while self.free_bytes < num_bytes:
            number, page = self.on_device.popitem(last=False)
            self.on_host[number] = page.clone()
            self.counts.evictions += 1
            self.counts.bytes_out += page.nbytes
            self._account(-page.nbytes)

    def _place(self, number: int, page: Tensor) -> None:
        self.on_device[number] = page
        self._account(page.nbytes)

    def _account(self, num_bytes: int) -> None:
        self.used_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)


class PagedAdamW(AdamW):
    """AdamW whose moments live in the pages of a `PagedMemory`; the numbers are AdamW's exactly.

    Parameters and gradients are not paged. `memory` is required; the other options are AdamW's.

    Raises: as `AdamW`.
    Source: arXiv 2305.14314, sec. 3.
    """

    def __init__(self, parameters: Iterable[Any], memory: PagedMemory, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.memory = memory

    def moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of m and v, shaped as the parameter, wherever their pages are; nothing moves.

        Raises: KeyError before the parameter's first step.
        """
        m, v = torch.cat([self.memory.peek(n) for n in self.state[parameter]["pages"]], 1)
        return m.view_as(parameter), v.view_as(parameter)

    def state_dict(self) -> dict[str, Any]:
        """As AdamW's: moments as tensors, so that either can load what the other saved."""
        saved = super().state_dict()
        for index, parameter in enumerate(self._parameters()):
            if index in saved["state"]:
                m, v = self.moments(parameter)
                saved["state"][index] = {"step": self.state[parameter]["step"], "m": m, "v": v}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The moments go into new pages of the memory. Raises: as torch's."""
        super().load_state_dict(state_dict)
        for parameter in self._parameters():
            state = self.state[parameter]
            if "m" in state:
                both = torch.stack([state.pop("m").flatten(), state.pop("v").flatten()])
                size = self._numbers_a_page(parameter)
                state["pages"] = [self.memory.allocate(page) for page in both.split(size, 1)]

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not parameter.is_contiguous():
            raise ValueError("parameter: expected it contiguous; pages are stretches of memory")
        size = self._numbers_a_page(parameter)
        flat = parameter.view(-1).split(size)
        if not state:
            pages = [self.memory.allocate(w.new_zeros(2, len(w))) for w in flat]
            state.update(step=0, pages=pages)
        state["step"] += 1
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        gradients = gradient.reshape(-1).split(size)
        for w, g, number in zip(flat, gradients, state["pages"], strict=True):
            m, v = self.memory.touch(number)
            adamw_update(w, g, m, v, step=state["step"], **options)

    def _numbers_a_page(self, parameter: Tensor) -> int:
        return self.memory.page_bytes // (2 * parameter.element_size())

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]
