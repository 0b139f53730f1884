"""Oracles: the clock of the simulated machine, alpha-beta by hand."""

import pytest
import torch

from reference.parallel.planner import a100_cluster, h100_cluster, perfect
from reference.parallel.planner.cluster import Cluster
from reference.parallel.ranks import DGX_A100, DGX_H100, run


@pytest.mark.parametrize("operation", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
@pytest.mark.parametrize("size, stride", [(2, 1), (8, 1), (4, 2), (3, 8), (16, 1)])
def test_collectives_match_the_simulated_machine(operation, size, stride):
    """The same operation, called by ranks that stand `stride` apart."""
    num_bytes = 48 * 2**20
    part = num_bytes // size if operation == "all_gather" else num_bytes

    def program(comm):
        group = comm.split(0 if comm.rank % stride == 0 else None, name="few")
        if group is not None:
            getattr(group, operation)(torch.empty(part, dtype=torch.uint8))

    world = size * stride
    seconds = run(world, program, shapes_only=True, hardware=DGX_H100).trace.seconds
    planned = perfect(DGX_H100, world).collective_seconds(operation, num_bytes, size, stride)
    assert planned == pytest.approx(seconds, rel=1e-6)


def test_message_takes_the_network_where_stages_lie_in_other_nodes():
    cluster = perfect(DGX_A100, 64)
    inside, outside = cluster.message_seconds(25e6, 1), cluster.message_seconds(25e6, 8)
    assert inside == outside == pytest.approx(9.6e-6 + 1e-3)  # some neighbours lie in two nodes
    assert perfect(DGX_A100, 8).message_seconds(30e6, 4) == pytest.approx(3.4e-6 + 1e-4)


def test_nothing_to_send_takes_no_time():
    assert h100_cluster(8).collective_seconds("all_reduce", 1e9, 1) == 0
    assert h100_cluster(8).collective_seconds("all_reduce", 0, 8) == 0


def test_large_collective_reaches_the_stated_share_of_the_link():
    cluster = a100_cluster(8)
    seconds = cluster.collective_seconds("all_reduce", 8e9, 8)
    bus_bandwidth = 2 * 7 / 8 * 8e9 / seconds
    assert bus_bandwidth == pytest.approx(0.77 * 300e9, rel=1e-3)


def test_memory_bandwidth_of_both_a100s():
    assert a100_cluster(8).memory_bytes_per_second == 2.039e12
    assert a100_cluster(8, memory_bytes=40e9).memory_bytes_per_second == 1.555e12


def test_rejects_an_empty_cluster():
    with pytest.raises(ValueError, match="num_gpus: expected at least 1, got 0"):
        h100_cluster(0)
    assert isinstance(h100_cluster(1), Cluster)
