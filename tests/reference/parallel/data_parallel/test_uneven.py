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


def test_matches_the_mean_over_all_tokens_of_a_step():
    """Texts of different lengths, on ranks with different numbers of them: each step's gradient is
    that of one rank with all of the step's tokens."""
    lengths = ([3, 1], [5, 2, 4], [0])

    def texts(rank, i):
        return torch.randn(
            lengths[rank][i], 2, generator=torch.Generator().manual_seed(9 * rank + i)
        )

    def program(comm):
        model, found = nn.Linear(2, 1, bias=False), []
        ddp = DDP(model, comm)
        mine = [texts(comm.rank, i) for i in range(len(lengths[comm.rank]))]
        for x in uneven(ddp, mine, num_counted=len):
            model.zero_grad()
            ddp(x).square().sum().backward()
            found.append(model.weight.grad.clone())
        return found, model.weight.detach()

    done = run(3, program).results
    for i, found in enumerate(done[1][0]):
        weight = done[1][1].clone().requires_grad_()
        step = torch.cat([texts(rank, i) for rank in range(3) if i < len(lengths[rank])])
        (step @ weight.T).square().mean().backward()
        assert_close(found, weight.grad)


def test_rejects_two_divisors():
    def program(comm):
        ddp = DDP(nn.Linear(1, 1), comm)
        next(uneven(ddp, [1], divide_by_initial_world_size=False, num_counted=lambda _: 1))

    with pytest.raises(ValueError, match="divide_by_initial_world_size: expected True"):
        run(1, program)


def test_without_it_the_others_wait_for_ever():
    def program(comm):
        ddp = DDP(nn.Linear(3, 2), comm)
        for batch in batches_of(comm):
            ddp(batch).sum().backward()

    with pytest.raises(Deadlock, match="rank 2 has finished"):
        run(3, program)
