"""Oracles: a run that nobody interrupted; torch's DistributedSampler; tiny closed cases."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DistributedSampler

from reference.parallel.data_parallel import (
    DDP,
    load_replica,
    rows_of_rank,
    rows_of_step,
    run_with_restarts,
    save_replica,
)
from reference.parallel.ranks import run
from tests.reference.parallel.zero.workload import CONFIG, adamw, fresh, loss_of

ROWS = torch.randint(0, CONFIG.vocab_size, (20, 9), generator=torch.Generator().manual_seed(4))
NUM_STEPS, BATCH_ROWS = 6, 12


def train(comm, path=None, dies_at=None):
    model = fresh()
    ddp, optimizer = DDP(model, comm), adamw(model.parameters())
    done = load_replica(comm, path, model, optimizer) if path else 0
    for step in range(done, NUM_STEPS):
        if comm.rank == comm.size - 1 and (comm.size, step) == dies_at:
            raise OSError("the node has died")
        rows = ROWS[rows_of_step(len(ROWS), BATCH_ROWS, step, comm.size, comm.rank)]
        optimizer.zero_grad()
        loss_of(ddp, rows).backward()
        optimizer.step()
        if path and step % 2 == 1:
            save_replica(comm, path, model, optimizer, step + 1)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["simulated", "processes"])
def test_goes_on_with_another_number_of_ranks(tmp_path, backend):
    path = tmp_path / "state.pt"
    restarted = run_with_restarts((4, 3), train, path, (4, 3), backend=backend)
    assert [str(failure) for failure in restarted.failures] == ["the node has died"]
    (truth,) = run(1, train).results
    for ours in restarted.run.results:
        for a, b in zip(ours, truth, strict=True):
            # Where a gradient is all rounding, Adam makes a step of it: 1 % of one, lr = 0.01.
            assert_close(a, b, rtol=0, atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_goes_on_bit_for_bit_with_the_same_number(tmp_path):
    restarted = run_with_restarts((2, 2), train, tmp_path / "state.pt", (3, 0))
    assert restarted.failures == []
    path = tmp_path / "other.pt"
    with pytest.raises(OSError, match="the node has died"):
        run(2, train, path, (2, 3))
    assert torch.load(path, weights_only=True)["step"] == 2
    for a, b in zip(run(2, train, path).results[0], restarted.run.results[0], strict=True):
        assert torch.equal(a, b)


def test_raises_the_last_failure():
    def program(comm):
        raise KeyError(comm.size)

    with pytest.raises(KeyError, match="1"):
        run_with_restarts((3, 2, 1), program)
    with pytest.raises(ValueError, match="world_sizes: expected at least one, got none"):
        run_with_restarts((), program)


@pytest.mark.parametrize("num_rows", [1, 7, 12])
@pytest.mark.parametrize("is_shuffled", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_sampler_matches_torch(num_rows, is_shuffled, drop_last):
    for world_size in (1, 3, 4):
        if drop_last and num_rows < world_size:
            continue
        for rank in range(world_size):
            theirs = DistributedSampler(
                range(num_rows), world_size, rank, shuffle=is_shuffled, seed=5, drop_last=drop_last
            )
            theirs.set_epoch(2)
            ours = rows_of_rank(
                num_rows, world_size, rank, epoch=2, seed=5, is_shuffled=is_shuffled,
                drop_last=drop_last,
            )  # fmt: skip
            assert ours == list(theirs)


@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_a_step_has_the_same_rows_on_any_number_of_ranks(step):
    whole = rows_of_step(26, 12, step, 1, 0, seed=3)
    assert len(set(whole)) == 12
    for world_size in (2, 3, 4, 12):
        parts = [rows_of_step(26, 12, step, world_size, r, seed=3) for r in range(world_size)]
        assert sum(parts, []) == whole and len({len(p) for p in parts}) == 1


def test_an_epoch_sees_no_row_twice():
    first, second = (rows_of_step(26, 12, step, 1, 0) for step in (0, 1))
    assert not set(first) & set(second)
    assert rows_of_step(26, 12, 2, 1, 0) != first


def test_sampler_rejects():
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        rows_of_rank(5, 2, 2)
    with pytest.raises(ValueError, match="num_rows: expected at least 1, got 0"):
        rows_of_rank(0, 2, 0)
    with pytest.raises(ValueError, match="batch_rows: expected a multiple of 3"):
        rows_of_step(26, 10, 0, 3, 0)
    with pytest.raises(ValueError, match="rank: expected 0 to 2, got 3"):
        rows_of_step(26, 12, 0, 3, 3)
