"""Spies for invariants beside values: what a computation allocates."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class _Spy(TorchDispatchMode):
    """Sees every operation in eager mode. Without torch.compile's guard each costs half.

    `active` are those entered now, `num_entered` how many have ever been. For an answer that runs
    in another process, `order` says what to watch for there, and `absorb` takes what was seen.
    """

    active: list["_Spy"] = []
    num_entered = 0

    def __enter__(self) -> Any:
        _Spy.num_entered += 1
        _Spy.active.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _Spy.active.remove(self)

    def commission(self, arguments: Any) -> list[Any]:
        raise NotImplementedError

    def report(self) -> list[Any]:
        raise NotImplementedError

    def absorb(self, report: list[Any]) -> None:
        raise NotImplementedError

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class largest_new_tensor(_Spy):
    """Watch every torch operation in the block; `bytes` is the largest storage that one created.

    Views cost nothing: only storages count that did not exist when the operation began, or that it
    made larger. Operations of autograd's backward are seen as well. `total_bytes` adds all fresh
    storages up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.total_bytes = 0
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        known = {_storage(t): t.untyped_storage().nbytes() for t in given}
        out = func(*args, **kwargs)
        for tensor in [*_tensors(out), *given]:
            size = tensor.untyped_storage().nbytes()
            if size > known.setdefault(_storage(tensor), 0):
                known[_storage(tensor)] = size
                self.total_bytes += size
                if size > self.bytes:
                    self.bytes, self.shape = size, tuple(tensor.shape)
        return out

    def commission(self, arguments: Any) -> list[Any]:
        return ["largest_new_tensor"]

    def report(self) -> list[Any]:
        return [self.bytes, self.total_bytes, list(self.shape)]

    def absorb(self, report: list[Any]) -> None:
        largest, total, shape = report
        self.total_bytes += int(total)
        if int(largest) > self.bytes:
            self.bytes, self.shape = int(largest), tuple(int(n) for n in shape)


class order_of_reads(_Spy):
    """Watch in which order a block of code reads some tensors; `order` holds their indices.

    An index is noted whenever another tensor than the last is read: (0, 1, 2) is one pass over
    three, (0, 1, 0) comes back to the first. Only whole tensors count: a row that was kept may be
    read again.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.order: list[int] = []
        self._index = {(_storage(t), t.numel()): i for i, t in enumerate(tensors)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            index = self._index.get((_storage(tensor), tensor.numel()))
            if index is not None and self.order[-1:] != [index]:
                self.order.append(index)
        return func(*args, **(kwargs or {}))

    def commission(self, arguments: Any) -> list[Any]:
        places = enumerate(_tensors(arguments))
        found = [[place, self._index.get((_storage(t), t.numel()))] for place, t in places]
        return ["order_of_reads", [[place, i] for place, i in found if i is not None]]

    def report(self) -> list[Any]:
        return list(self.order)

    def absorb(self, report: list[Any]) -> None:
        self.order += [int(i) for i in report]


class rows_through(_Spy):
    """Counts the rows that are multiplied with each of some weights (D, d), or with parts of them.

    A copy counts as its weight. Operations that see no weight cost next to nothing.
    """

    PRODUCTS = frozenset({"mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv"})
    COPIES = frozenset({"clone", "_to_copy", "cat", "stack", "copy", "detach_copy"})

    def __init__(self, *weights: torch.Tensor) -> None:
        super().__init__()
        self.rows, self._depth, self._size = [0] * len(weights), *weights[0].shape
        self._known = {_storage(w): [i] for i, w in enumerate(weights)}
        self._held: list[torch.Tensor] = []  # copies, so that no storage is used again

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = list(_tensors(args))
        which = {i for t in given for i in self._known.get(_storage(t), ())}
        if which and isinstance(out, torch.Tensor) and _storage(out) not in self._known:
            self._count(func.overloadpacket.__name__, given, out, which)
        return out

    def _count(
        self, name: str, given: list[torch.Tensor], out: torch.Tensor, which: set[int]
    ) -> None:
        if name in self.COPIES:
            self._known[_storage(out)] = list(which)
            self._held.append(out)
            return
        rows = out.numel() // (self._depth * self._size)
        if name in self.PRODUCTS:
            others = [t for t in given[-2:] if _storage(t) not in self._known]
            rows = sum(t.numel() for t in others) // self._depth
        for i in which:
            self.rows[i] += rows

    def commission(self, arguments: Any) -> list[Any]:
        places = enumerate(_tensors(arguments))
        found = [(place, i) for place, t in places for i in self._known.get(_storage(t), ())]
        return ["rows_through", [[place, i] for place, i in found]]

    def report(self) -> list[Any]:
        return list(self.rows)

    def absorb(self, report: list[Any]) -> None:
        self.rows = [mine + int(more) for mine, more in zip(self.rows, report, strict=True)]


class count_flops(TorchDispatchMode):
    """FLOPs of the products in the block, as torch's FlopCounterMode counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += float(formula(*args, **(kwargs or {}), out_val=out))
        return out


def num_entered() -> int:
    """How many spies have been at work in this process so far."""
    return _Spy.num_entered


def active() -> list[_Spy]:
    """The spies at work now."""
    return list(_Spy.active)


@contextlib.contextmanager
def watched(commissions: list[Any], arguments: Any) -> Iterator[Callable[[], list[Any]]]:
    """Spies on the block as commissioned by those of another process; gives their reports."""
    spies: list[_Spy] = []
    for kind, *details in commissions:
        if kind == "largest_new_tensor":
            spies.append(largest_new_tensor())
            continue
        tensors = list(_tensors(arguments))
        by_index = {index: tensors[place] for place, index in details[0]}
        in_order = [by_index[index] for index in sorted(by_index)]
        spies.append({"order_of_reads": order_of_reads, "rows_through": rows_through}[kind](
            *([in_order] if kind == "order_of_reads" else in_order)))  # fmt: skip
    with contextlib.ExitStack() as stack:
        for spy in spies:
            stack.enter_context(spy)
        yield lambda: [spy.report() for spy in spies]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
