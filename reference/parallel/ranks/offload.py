"""Copies between a rank's device and its host: slower than the network inside a node, but roomy."""

from typing import Any

from torch import Tensor

from reference.parallel.ranks.comm import Comm


class HostCopy:
    """A copy under way; `wait` holds the compute stream until it is there."""

    def __init__(self, comm: Comm, result: Tensor, end_seconds: float) -> None:
        self._comm, self._result, self._end = comm, result, end_seconds

    def wait(self) -> Tensor:
        self._comm.wait_until(self._end)
        return self._result


def to_host(comm: Comm, tensor: Tensor, *, async_op: bool = False) -> Any:
    """A copy in the host's memory, counted there; the tensor itself stays until you drop it."""
    return _copy(comm, tensor, "to_host", "host", async_op)


def to_device(
    comm: Comm, tensor: Tensor, *, category: str = "activations", async_op: bool = False
) -> Any:
    """A copy of a host tensor on the rank's device, counted in the given category."""
    return _copy(comm, tensor, "to_device", category, async_op)


def _copy(comm: Comm, tensor: Tensor, name: str, category: str, async_op: bool) -> Any:
    device = "cpu" if name == "to_host" else comm.device
    with comm.memory.category(category):
        result = tensor.detach().to(device, copy=True)
    comm.traffic.add("host", name, tensor.nbytes, float(tensor.nbytes))
    copy = HostCopy(comm, result, comm.occupy_host_link(name, tensor.nbytes))
    return copy if async_op else copy.wait()
