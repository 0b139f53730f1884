"""Oracle: torch's DistributedDataParallel.join on gloo."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from reference.parallel.data_parallel import DDP, uneven
from reference.parallel.ranks import Deadlock, run

COUNTS = (2, 4, 1)


def batches_of(comm):
    generator = torch.Generator().manual_seed(comm.rank)
    return torch.randn(COUNTS[comm.rank], 5, 3, generator=generator)


def model_and_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def state(model):
    return [t.detach().clone() for t in [*model.parameters(), *model.buffers()]]


def ours(comm, by_initial):
    model, optimizer = model_and_optimizer()
    ddp = DDP(model, comm)
    for batch in uneven(ddp, batches_of(comm), divide_by_initial_world_size=by_initial):
        optimizer.zero_grad()
        ddp(batch).square().mean().backward()
        optimizer.step()
    assert ddp.divisor == comm.size
    return state(model)


def theirs(comm, by_initial):
    model, optimizer = model_and_optimizer()
    ddp = DistributedDataParallel(model)
    with ddp.join(divide_by_initial_world_size=by_initial):
        for batch in batches_of(comm):
            optimizer.zero_grad()
            ddp(batch).square().mean().backward()
            optimizer.step()
    return state(model)


@pytest.mark.parametrize("by_initial", [True, False])
def test_matches_torchs_join(by_initial):
    def program(comm):
        return ours(comm, by_initial), theirs(comm, by_initial)

    for found, truth in run(3, program, backend="processes", is_measured=False).results:
        for a, b in zip(found, truth, strict=True):
            assert_close(a, b)
    simulated = run(3, lambda comm: ours(comm, by_initial)).results
    for rank in range(3):
        for a, b in zip(simulated[rank], truth, strict=True):
            assert_close(a, b)


def test_a_rank_without_any_data_takes_part():
    def program(comm):
        model = nn.Linear(2, 1, bias=False)
        nn.init.ones_(model.weight)
        ddp = DDP(model, comm)
        rows = [torch.ones(1, 2)] * (2 * (comm.rank == 0))
        for row in uneven(ddp, rows, divide_by_initial_world_size=False):
            model.zero_grad()
            ddp(row).sum().backward()
            with torch.no_grad():
                model.weight -= model.weight.grad
        return model.weight.tolist()

    assert run(3, program).results == [[[-1.0, -1.0]]] * 3


def test_without_it_the_others_wait_for_ever():
    def program(comm):
        ddp = DDP(nn.Linear(3, 2), comm)
        for batch in batches_of(comm):
            ddp(batch).sum().backward()

    with pytest.raises(Deadlock, match="rank 2 has finished"):
        run(3, program)
