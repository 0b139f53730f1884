"""The machine that a plan runs on: datasheet peaks, the share of them that real kernels reach, and
what a collective takes among ranks that stand `stride` apart.

Efficiency is one set of numbers for each generation of GPU, for all models and layouts:

    matmul     large products of matrices, of the tensor cores' peak. Chosen, with attention, on the
               two MPT sizes of published.CALIBRATION (1B and 7B) and on nothing else.
    attention  a fused attention kernel, causal, forward and backward, of the same peak.
    memory     reads and writes of element-wise kernels, of the datasheet's bandwidth: what
               a copy reaches (STREAM on A100 and H100: about 85 to 90 %).
    link       bus bandwidth of large collectives over the link's peak: nccl-tests report some 230
               of 300 GB/s on A100's NVLink, and 20 of 25 on InfiniBand.

Latencies and the alpha-beta model are the simulated machine's (reference.parallel.ranks.cost).
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch

from reference.parallel.options import above_zero, at_least
from reference.parallel.ranks import DGX_A100, DGX_H100, Group, Hardware, Link
from reference.parallel.ranks.calls import Call
from reference.parallel.ranks.cost import seconds as seconds_of_calls

_PROBE_BYTES = 1 << 40  # far above every latency; a meta tensor of this size takes no memory


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peak; see the module's docstring for where each comes from.

    Raises: ValueError for a share that is not above 0 and at most 1.
    """

    matmul: float
    attention: float
    memory: float = 0.85
    link: float = 0.77

    def __post_init__(self) -> None:
        _check_shares([(field.name, getattr(self, field.name)) for field in fields(self)])


def _check_shares(shares: Iterable[tuple[str, float]]) -> None:
    for name, share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"{name}: expected a share above 0 and at most 1, got {share}")


PERFECT = Efficiency(1.0, 1.0, 1.0, 1.0)  # the virtual clock of the simulated machine
A100_EFFICIENCY = Efficiency(matmul=0.72, attention=0.32)
H100_EFFICIENCY = Efficiency(matmul=0.53, attention=0.18)


@dataclass(frozen=True)
class Cluster:
    """`num_gpus` of one kind. `host_...`: a GPU's share of the CPU's memory and its bandwidth.

    `usable_share` of a GPU's memory is left by the CUDA context, NCCL and fragmentation.

    Raises: ValueError for counts below 1, rates that are not above 0, a share that is none.
    """

    hardware: Hardware
    num_gpus: int
    memory_bytes_per_second: float
    efficiency: Efficiency
    host_bytes_per_second: float = 25e9
    host_memory_bytes: float = 250e9
    usable_share: float = 0.94

    def __post_init__(self) -> None:
        at_least(1, [("num_gpus", self.num_gpus)])
        rates = ("memory_bytes_per_second", "host_bytes_per_second", "host_memory_bytes")
        above_zero([(name, getattr(self, name)) for name in rates])
        _check_shares([("usable_share", self.usable_share)])

    @property
    def flops_per_second(self) -> float:
        """That products of matrices reach."""
        return self.hardware.flops_per_second * self.efficiency.matmul

    @property
    def attention_flops_per_second(self) -> float:
        return self.hardware.flops_per_second * self.efficiency.attention

    @property
    def traffic_bytes_per_second(self) -> float:
        """That element-wise kernels reach."""
        return self.memory_bytes_per_second * self.efficiency.memory

    @property
    def usable_bytes(self) -> float:
        return self.hardware.memory_bytes * self.usable_share

    @property
    def links(self) -> Hardware:
        """The hardware with the bandwidth that collectives reach."""
        return replace(
            self.hardware,
            intra=_slower(self.hardware.intra, self.efficiency.link),
            inter=_slower(self.hardware.inter, self.efficiency.link),
        )

    def collective_seconds(
        self, operation: str, payload_bytes: float, size: int, stride: int = 1
    ) -> float:
        """all_reduce, all_gather, reduce_scatter or all_to_all among ranks 0, stride, 2 stride...

        `payload_bytes`: the tensor, or the whole of which each rank has a part.
        """
        if size == 1 or not payload_bytes:
            return 0.0
        latency, per_byte = _line(operation, size, stride, self.links)
        return latency + per_byte * payload_bytes

    def message_seconds(self, num_bytes: float, stride: int) -> float:
        """From a rank to that `stride` further on; the slowest such pair of the cluster."""
        crosses = stride % self.hardware.ranks_per_node or stride >= self.hardware.ranks_per_node
        alone = self.num_gpus <= self.hardware.ranks_per_node
        link = self.links.inter if crosses and not alone else self.links.intra
        return link.latency_seconds + num_bytes / link.bytes_per_second


def a100_cluster(num_gpus: int, *, memory_bytes: float = 80e9) -> Cluster:
    """DGX A100 nodes; 2.039 TB/s with 80 GB, 1.555 TB/s with 40 GB (datasheets)."""
    hardware = replace(DGX_A100, memory_bytes=memory_bytes)
    bandwidth = 2.039e12 if memory_bytes > 40e9 else 1.555e12
    return Cluster(hardware, num_gpus, bandwidth, A100_EFFICIENCY)


def h100_cluster(num_gpus: int) -> Cluster:
    """DGX H100 nodes, 3.35 TB/s (H100 SXM datasheet)."""
    return Cluster(DGX_H100, num_gpus, 3.35e12, H100_EFFICIENCY)


def perfect(hardware: Hardware, num_gpus: int) -> Cluster:
    """What the simulated clock takes for granted: peaks, and element-wise work for nothing."""
    return Cluster(hardware, num_gpus, float("inf"), PERFECT, float("inf"), usable_share=1.0)


def _slower(link: Link, share: float) -> Link:
    return replace(link, bytes_per_second=link.bytes_per_second * share)


@lru_cache(maxsize=4096)
def _line(operation: str, size: int, stride: int, links: Hardware) -> tuple[float, float]:
    """Latency, and seconds a byte: alpha and beta of the simulated machine's cost of a call."""
    group = Group("planned", tuple(range(0, size * stride, stride)))
    part = _PROBE_BYTES // size if operation == "all_gather" else _PROBE_BYTES
    splits = (size,) * size if operation == "all_to_all" else None

    def at(num_bytes: int) -> float:
        shape = (size * size, num_bytes // size**2) if splits else (num_bytes,)
        tensor = torch.empty(shape, dtype=torch.uint8, device="meta")
        call = Call(operation, group, 0, tensor=tensor, input_splits=splits)
        return seconds_of_calls([call], links)

    whole, half = at(part), at(part // 2)
    payload = part * size if operation == "all_gather" else part
    per_byte = (whole - half) / (payload / 2)
    return max(0.0, whole - per_byte * payload), per_byte
