"""Oracles: float64 sums, torch.distributed on gloo, and the closed forms on the ledgers."""

import math

import pytest
import torch
from torch.testing import assert_close

from reference.parallel.data_parallel import (
    ALGORITHMS,
    all_reduce_cost,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
)
from reference.parallel.ranks import CLASSROOM, run
from tests.tolerances import TOLERANCE


def tensors(world_size, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(world_size)
    drawn = torch.randn(world_size, *shape, generator=generator, dtype=torch.float64) * 3
    return drawn.to(dtype)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("shape", [(24,), (3, 5), (), (0,), (1,)])
def test_matches_the_sum(algorithm, world_size, shape):
    given = tensors(world_size, shape)
    kept = given.clone()
    done = run(world_size, lambda comm: ALGORITHMS[algorithm](comm, given[comm.rank]))
    for ours in done.results:
        assert ours.shape == given.shape[1:]
        assert_close(ours, given.double().sum(0).float(), rtol=2e-6, atol=4e-6)
        assert torch.equal(ours, done.results[0])
    assert torch.equal(given, kept)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_matches_gloo_in_each_dtype(algorithm, dtype):
    """Two ranks, where a sum has one order: bit for bit."""
    given = tensors(2, (5, 3), dtype)

    def program(comm):
        return ALGORITHMS[algorithm](comm, given[comm.rank]), comm.all_reduce(
            given[comm.rank].clone()
        )

    for backend in ("processes", "simulated"):
        for ours, theirs in run(2, program, backend=backend).results:
            assert torch.equal(ours, theirs)


def test_takes_tensors_that_are_not_contiguous():
    given = tensors(3, (4, 6))
    done = run(3, lambda comm: ring_all_reduce(comm, given[comm.rank].T))
    assert_close(done.results[1], given.sum(0).T, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("world_size, numel", [(2, 10), (3, 10), (4, 3)])
def test_halves_of_the_ring(world_size, numel):
    given = tensors(world_size, (numel,))
    whole = given.double().sum(0).float()

    def program(comm):
        part = ring_reduce_scatter(comm, given[comm.rank])
        parts = [torch.full_like(p, -1.0) for p in whole.tensor_split(comm.size)]
        parts[comm.rank] = part.clone()
        return part, torch.cat(ring_all_gather(comm, parts))

    for rank, (part, gathered) in enumerate(run(world_size, program).results):
        assert_close(part, whole.tensor_split(world_size)[rank], rtol=2e-6, atol=4e-6)
        assert_close(gathered, whole, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ledger_and_clock_equal_the_closed_form(algorithm, world_size):
    """Powers of two, where the tree's last level is full."""
    x = torch.ones(64 * world_size)
    done = run(world_size, lambda comm: ALGORITHMS[algorithm](comm, x) is None, hardware=CLASSROOM)
    cost = all_reduce_cost(algorithm, world_size, x.nbytes)
    sent = [done.trace.total(rank=rank).wire_bytes for rank in range(world_size)]
    assert max(sent) == cost.busiest_bytes
    assert done.trace.seconds == pytest.approx(cost.seconds(CLASSROOM.intra))


@pytest.mark.parametrize("world_size", [2, 5, 8])
def test_ring_is_the_machines_own_all_reduce(world_size):
    """The same bytes by the same ways, and the same time on the clock."""
    x = torch.ones(40 * world_size)
    ours = run(world_size, lambda comm: ring_all_reduce(comm, x) is None).trace
    theirs = run(world_size, lambda comm: comm.all_reduce(x.clone()) is None).trace
    assert ours.traffic_matrix() == theirs.traffic_matrix()
    assert ours.seconds == pytest.approx(theirs.seconds)


@pytest.mark.parametrize("world_size", [3, 5, 6, 7])
def test_tree_of_any_size_takes_two_logarithms(world_size):
    x = torch.ones(64)
    done = run(
        world_size, lambda comm: ALGORITHMS["tree"](comm, x) is None, hardware=CLASSROOM
    ).trace
    step = CLASSROOM.intra.latency_seconds + x.nbytes / CLASSROOM.intra.bytes_per_second
    assert done.seconds <= 2 * math.ceil(math.log2(world_size)) * step * (1 + 1e-9)


def test_rejects_unknown_algorithms_and_worlds():
    with pytest.raises(ValueError, match=r"algorithm: expected star, .*got 'torus'"):
        all_reduce_cost("torus", 4, 8)
    with pytest.raises(ValueError, match="world_size: expected at least 1, got 0"):
        all_reduce_cost("ring", 0, 8)
