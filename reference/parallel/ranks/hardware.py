"""Machines for the virtual clock: peak arithmetic, and links with a latency and a bandwidth.

A message of n bytes over a link takes alpha + n / bandwidth seconds: the alpha-beta model. All
figures are the vendor's peaks for one GPU and one direction, so the clock is an optimist; a
measured machine is `dataclasses.replace(DGX_H100, flops_per_second=...)`.

Sources. A100: NVIDIA A100 80GB SXM datasheet (312 TFLOP/s dense bf16, NVLink 600 GB/s both ways
together, PCIe 4 64 GB/s), DGX A100 datasheet (8 GPUs, one 200 Gb/s InfiniBand adapter a GPU).
H100: NVIDIA H100 SXM datasheet (1,979 TFLOP/s bf16 with sparsity, half of it dense; NVLink
900 GB/s, PCIe 5 128 GB/s), DGX H100 datasheet (8 GPUs, one 400 Gb/s ConnectX-7 a GPU). Latencies
are no datasheet's: those of a ring step in NCCL's cost model (src/graph/tuning.cc, hwLat, Simple),
3.4 us on NVLink and 9.6 us on a network; 10 us for a copy to the host is our assumption.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A message of n bytes takes latency_seconds + n / bytes_per_second, in each direction."""

    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Hardware:
    """One rank's share of a cluster. Ranks fill the nodes in order, `ranks_per_node` each.

    `intra` joins ranks of one node, `inter` is a rank's own adapter to other nodes, `host` its way
    to the memory of the CPU.
    """

    name: str
    flops_per_second: float
    memory_bytes: float
    ranks_per_node: int
    intra: Link
    inter: Link
    host: Link

    def node(self, rank: int) -> int:
        """The node on which a global rank stands."""
        return rank // self.ranks_per_node


DGX_A100 = Hardware(
    name="DGX A100",
    flops_per_second=312e12,
    memory_bytes=80e9,
    ranks_per_node=8,
    intra=Link(3.4e-6, 300e9),
    inter=Link(9.6e-6, 25e9),
    host=Link(10e-6, 32e9),
)
DGX_H100 = Hardware(
    name="DGX H100",
    flops_per_second=989.5e12,
    memory_bytes=80e9,
    ranks_per_node=8,
    intra=Link(3.4e-6, 450e9),
    inter=Link(9.6e-6, 50e9),
    host=Link(10e-6, 64e9),
)
# Round numbers for sums in the head, and small enough that small models show overlap.
CLASSROOM = Hardware(
    name="classroom",
    flops_per_second=1e12,
    memory_bytes=1e9,
    ranks_per_node=8,
    intra=Link(1e-6, 10e9),
    inter=Link(10e-6, 1e9),
    host=Link(10e-6, 1e9),
)
