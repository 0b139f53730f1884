"""What a benchmark compares and how: interleaved medians of time, and exact counts of bytes.

Two callables that do the same work are timed in turns, so that a busy machine slows both alike,
and the medians are compared. Bytes are counted, not timed: what autograd keeps for the backward
pass, and the high-water mark of fresh storages while forward and backward run.
"""

import ctypes
import gc
import json
import platform
import statistics
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer

RESULTS = Path(__file__).parent / "results"
NUM_TURNS = 9
TURN_SECONDS = 0.03
Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table: `what` was measured, ours and theirs, in `unit`; lower is better."""

    what: str
    ours: float
    theirs: float
    unit: str

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs if self.theirs else float("nan")


def compare(
    what: str, ours: Forward, theirs: Forward, parameters: Sequence[Tensor] = ()
) -> list[Row]:
    """Rows for forward, backward, bytes kept for backward, and peak memory.

    `parameters` are the leaves that backward reaches; without them only forward is measured.
    """
    with torch.no_grad():
        forward = time_in_turns(ours, theirs)
        peak = peak_bytes(ours), peak_bytes(theirs)
    rows = [Row(f"{what}: forward", *forward, "us")]
    if not parameters:
        return [*rows, Row(f"{what}: peak memory", *peak, "bytes")]
    kept = saved_bytes(ours), saved_bytes(theirs)
    backward = time_in_turns(backward_of(ours, parameters), backward_of(theirs, parameters))
    peak = peak_bytes(_step(ours, parameters)), peak_bytes(_step(theirs, parameters))
    return [
        *rows,
        Row(f"{what}: backward", *backward, "us"),
        Row(f"{what}: kept for backward", *kept, "bytes"),
        Row(f"{what}: peak memory", *peak, "bytes"),
    ]


def time_in_turns(*calls: Callable[[], Any]) -> tuple[float, ...]:
    """Median microseconds of each callable on one thread, measured in turns."""
    timers = [Timer("call()", globals={"call": call}) for call in calls]
    loops = []
    for timer in timers:
        timer.timeit(2)
        once = timer.timeit(3).mean
        loops.append(max(1, int(TURN_SECONDS / max(once, 1e-9))))
    turns = [
        [timer.timeit(n).mean for timer, n in zip(timers, loops, strict=True)]
        for _ in range(NUM_TURNS)
    ]
    return tuple(statistics.median(column) * 1e6 for column in zip(*turns, strict=True))


def backward_of(forward: Forward, parameters: Sequence[Tensor]) -> Callable[[], Any]:
    """Backward alone: the graph is built once and walked again and again."""
    output = forward()
    grad = torch.ones_like(output)
    return lambda: torch.autograd.grad(output, parameters, grad, retain_graph=True)


def saved_bytes(forward: Forward) -> int:
    """Bytes of the storages that autograd keeps for backward, inputs and weights included."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del output
    return total


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes of tensors created by `call` that were alive at one time."""
    gc.collect()
    with _LiveStorages() as live:
        call()
    return live.peak


def machine() -> dict[str, Any]:
    """The machine in general terms."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def keep_memory() -> None:
    """Tell glibc to keep freed memory, so that timings measure arithmetic and not page faults.

    By default a freed tensor of some megabytes goes back to the system, and the next one costs a
    page fault every 4 KiB: ten times the arithmetic of a norm. Elsewhere than on Linux: no effect.
    """
    mmap_threshold, trim_threshold = -3, -1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is not None:
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 1 << 30)


def write(name: str, rows: Sequence[Row], folder: Path = RESULTS) -> Path:
    """Keep the rows and the machine as folder/name.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    record = [{**asdict(row), "ratio": round(row.ratio, 3)} for row in rows]
    for entry in record:
        entry["ours"], entry["theirs"] = round(entry["ours"], 1), round(entry["theirs"], 1)
    path.write_text(json.dumps({"machine": machine(), "rows": record}, indent=2) + "\n")
    return path


class _LiveStorages(TorchDispatchMode):
    """Adds a storage up when an operation creates it and takes it off when it dies."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        known = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _storage(tensor) not in known | self._sizes.keys():
                storage = tensor.untyped_storage()
                self._sizes[_storage(tensor)] = storage.nbytes()
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._release, _storage(tensor))
        self.peak = max(self.peak, self.alive)
        return out

    def _release(self, key: int) -> None:
        self.alive -= self._sizes.pop(key, 0)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _step(forward: Forward, parameters: Sequence[Tensor]) -> Callable[[], Any]:
    def step() -> Any:
        output = forward()
        return torch.autograd.grad(output, parameters, torch.ones_like(output))

    return step


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()
