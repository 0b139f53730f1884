"""Oracles: one rank on all rows; torch's DistributedDataParallel on gloo; torch's bucket rule."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from reference.parallel.data_parallel import DDP, data_parallel_step, divide, reached_leaves
from reference.parallel.ranks import CLASSROOM, run
from reference.transformer import Llama
from tests.reference.parallel.zero.workload import (
    CONFIG,
    adamw,
    batches,
    fresh,
    loss_of,
    one_rank,
    rows_of,
)


def train(comm, wrap, *, num_micro=1):
    """Parameters after some steps of AdamW; without a number of micro-batches, in one piece."""
    model = wrap(fresh(), comm)
    optimizer = adamw(model.parameters())
    for batch in batches():
        optimizer.zero_grad()
        *first, last = rows_of(comm, batch).chunk(num_micro)
        with model.no_sync():
            for rows in first:
                (loss_of(model, rows) / num_micro).backward()
        (loss_of(model, last) / num_micro).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


def torchs(model, comm):
    return DistributedDataParallel(model)


def assert_same(ours, truth):
    for name in truth:
        assert_close(ours[name], truth[name], rtol=2e-5, atol=2e-6)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("world_size, bucket_bytes", [(1, 1), (2, 2000), (3, 10**6), (4, 1)])
def test_matches_one_rank_on_all_rows(world_size, bucket_bytes):
    truth = one_rank()
    done = run(
        world_size, lambda c: train(c, lambda m, comm: DDP(m, comm, bucket_bytes=bucket_bytes))
    )
    for ours in done.results:
        assert_same(ours, truth)
        assert_equal(ours, done.results[0])


@pytest.mark.parametrize("num_micro", [1, 3])
def test_matches_torchs_ddp_bit_for_bit(num_micro):
    def program(comm):
        return train(comm, DDP, num_micro=num_micro), train(comm, torchs, num_micro=num_micro)

    for ours, theirs in run(2, program, backend="processes", is_measured=False).results:
        assert_equal(ours, theirs)
    simulated = run(2, lambda comm: train(comm, DDP, num_micro=num_micro)).results[0]
    assert_equal(simulated, theirs)


@pytest.mark.parametrize("world_size", [4, 8])
def test_gradients_are_close_to_torchs_ddp_on_more_ranks(world_size):
    """Sums of more than two have several orders: a few roundings of float32."""

    def gradient(comm, wrap):
        model = wrap(fresh(), comm)
        loss_of(model, rows_of(comm, batches(rows=16)[0])).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    theirs = run(world_size, gradient, torchs, backend="processes", is_measured=False).results[0]
    for ours in run(world_size, gradient, DDP).results:
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_starts_from_rank_0():
    def program(comm):
        torch.manual_seed(comm.rank)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        model[1].running_mean.fill_(comm.rank)
        ddp = DDP(model, comm)
        return [t.clone() for t in [*ddp.parameters(), *ddp.buffers()]]

    first, *others = run(3, program).results
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert first[2].eq(1).all() and first[4].eq(0).all()


@pytest.mark.parametrize("sizes", [(1, 1), (300, 1000), (10**6, 10**6), (1000, 4000)])
def test_buckets_are_those_of_torch(sizes):
    model = Llama(CONFIG)
    named = list(model.named_parameters())
    for name, parameter in named:
        parameter.requires_grad_("norm" not in name)
    learning = [(n, p) for n, p in reversed(named) if p.requires_grad]
    indices, _ = torch.distributed._compute_bucket_assignment_by_size(
        [p for _, p in learning], list(sizes)
    )
    ours = divide(named, first_bucket_bytes=sizes[0], bucket_bytes=sizes[1])
    assert [[n for n, _ in b] for b in ours] == [[learning[i][0] for i in b] for b in indices]


def test_buckets_do_not_mix_dtypes():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4).to(torch.float64), nn.Linear(4, 4)])
    buckets = divide(model.named_parameters(), 10**6)
    assert [{p.dtype for _, p in b} for b in buckets] == [{torch.float32}, {torch.float64}]
    indices, _ = torch.distributed._compute_bucket_assignment_by_size(
        list(reversed(list(model.parameters()))), [10**6]
    )
    assert sorted(len(b) for b in buckets) == sorted(len(i) for i in indices)


def test_traffic_is_one_all_reduce_a_bucket():
    def program(comm):
        model = fresh()
        ddp = DDP(model, comm, bucket_bytes=3000, broadcast_buffers=False)
        comm.traffic.reset()
        loss_of(ddp, rows_of(comm, batches()[0])).backward()
        row = comm.traffic.total()
        return row.num_calls, row.payload_bytes, row.wire_bytes, len(ddp.buckets), model

    calls, payload, wire, num_buckets, model = run(4, program).results[0]
    size = sum(p.nbytes for p in model.parameters())
    assert (calls, payload, wire) == (num_buckets, size, 2 * 3 / 4 * size)
    assert num_buckets > 3


def test_no_sync_sends_nothing():
    def program(comm):
        ddp = DDP(fresh(), comm)
        comm.traffic.reset()
        with ddp.no_sync():
            loss_of(ddp, rows_of(comm, batches()[0])).backward()
        return comm.traffic.total().num_calls

    assert run(2, program).results == [0, 0]


class Chain(nn.Module):
    """Square layers, so that backward takes as long as the network."""

    def __init__(self, depth=6, dim=64):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(dim, dim, bias=False) for _ in range(depth)))

    def forward(self, x):
        return self.layers(x)


def test_communication_overlaps_backward():
    """A bucket a layer: all but the last all-reduce run beside the remaining backward."""

    def step(comm, bucket_bytes, rows):
        model = Chain()
        ddp = DDP(model, comm, bucket_bytes=bucket_bytes, first_bucket_bytes=bucket_bytes)
        begin = comm.now_seconds
        ddp(torch.ones(rows, 64)).sum().backward()
        return comm.now_seconds - begin

    rows = 3000
    alone = run(1, step, 1, rows, hardware=CLASSROOM).results[0]
    layer = 64 * 64 * 4
    exposed = 2 * 1e-6 + layer / 10e9  # two ranks: two steps of half a layer
    overlapped = run(2, step, 1, rows, hardware=CLASSROOM).results[0]
    in_one = run(2, step, 10**9, rows, hardware=CLASSROOM).results[0]
    assert overlapped == pytest.approx(alone + exposed)
    assert in_one == pytest.approx(alone + 2 * 1e-6 + 6 * layer / 10e9)


class Branches(nn.Module):
    """Uses `left`, `right`, or both, and never `idle`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.idle = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x, way):
        ways = {"left": [self.left], "right": [self.right], "both": [self.left, self.right]}
        return {"out": sum(layer(x) for layer in ways[way])}


@pytest.mark.parametrize("ways", [("left", "right"), ("both", "left"), ("left", "left")])
def test_unused_parameters_as_torch(ways):
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))

    def program(comm):
        found = []
        for wrap in (
            lambda m: DDP(m, comm, find_unused_parameters=True, bucket_bytes=1),
            lambda m: DistributedDataParallel(m, find_unused_parameters=True),
        ):
            model = Branches()
            model.idle.weight.grad = torch.full((2, 3), 7.0)
            ddp = wrap(model)
            ddp(x[comm.rank], ways[comm.rank])["out"].square().sum().backward()
            found.append({n: p.grad for n, p in model.named_parameters()})
        return found

    for ours, theirs in run(2, program, backend="processes", is_measured=False).results:
        assert ours["idle.weight"].eq(7).all() and ours["idle.bias"] is None
        for name in theirs:
            assert (ours[name] is None) == (theirs[name] is None), name
            if theirs[name] is not None:
                assert torch.equal(ours[name], theirs[name]), name


def test_rejects_unused_parameters_by_name():
    def program(comm):
        DDP(Branches(), comm)(torch.ones(2, 3), "left")["out"].sum().backward()

    message = r"without a gradient of idle.bias, idle.weight, right.bias, right.weight; DDP\(\.\.\."
    with pytest.raises(RuntimeError, match=message):
        run(2, program)


def test_recovers_after_a_backward_that_failed():
    """The next forward starts afresh."""

    def program(comm):
        model = Branches()
        ddp = DDP(model, comm, find_unused_parameters=True)
        failing = ddp(torch.ones(2, 3), "both")["out"]
        failing.register_hook(lambda grad: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            failing.sum().backward()
        model.zero_grad()
        ddp(torch.ones(2, 3), "both")["out"].sum().backward()
        return model.left.bias.grad

    assert run(2, program).results[1].tolist() == [2.0, 2.0]


def test_buffers_follow_rank_0_as_in_torch():
    x = torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(2))

    def program(comm):
        found = []
        for wrap in (lambda m: DDP(m, comm), DistributedDataParallel):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
            ddp = wrap(model)
            for rows in x[comm.rank]:
                ddp(rows).square().sum().backward()
            found.append([t.clone() for t in [*model.buffers(), *(p.grad for p in
                          model.parameters())]])  # fmt: skip
        return found

    for ours, theirs in run(2, program, backend="processes", is_measured=False).results:
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_buffers_stay_apart_where_they_are_not_broadcast():
    def program(comm):
        model = nn.Sequential(nn.BatchNorm1d(2))
        ddp = DDP(model, comm, broadcast_buffers=False)
        for _ in range(2):
            ddp(torch.randn(4, 2)).sum().backward()
        return model[0].running_mean.clone()

    first, second = run(2, program).results
    assert not torch.equal(first, second)


def test_evaluation_needs_no_reduction():
    def program(comm):
        ddp = DDP(fresh(), comm, broadcast_buffers=False)
        comm.traffic.reset()
        with torch.no_grad():
            loss_of(ddp, rows_of(comm, batches()[0]))
        return comm.traffic.total().num_calls

    assert run(2, program).results == [0, 0]


def test_rejects_modules_that_do_not_learn():
    with pytest.raises(ValueError, match="module: expected parameters that require a gradient"):
        run(1, lambda comm: DDP(nn.ReLU(), comm))
    with pytest.raises(ValueError, match="bucket_bytes: expected at least 1, got 0"):
        run(1, lambda comm: DDP(nn.Linear(1, 1), comm, bucket_bytes=0))


def test_reached_leaves_searches_containers():
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    assert reached_leaves({"x": [a * 2, (b,)], "y": b + 1}) == {a, b}
    assert c not in reached_leaves((a + b) * 3)
    with pytest.raises(TypeError, match="output: expected tensors with a graph, got float"):
        reached_leaves(1.0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_one_process_data_parallelism_matches_one_rank(world_size):
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))

    def loss_of_outputs(outputs):
        return F.cross_entropy(outputs, torch.arange(8) % 3)

    def program(comm):
        torch.manual_seed(comm.rank)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        alone = [p.detach().clone().requires_grad_() for p in model.parameters()]
        loss = data_parallel_step(comm, model, x, loss_of_outputs)
        return loss, [p.grad for p in model.parameters()], alone

    loss, grads, alone = run(world_size, program).results[0]
    w, b, v, c = alone
    truth = loss_of_outputs(torch.tanh(x @ w.T + b) @ v.T + c)
    truth.backward()
    assert_close(loss, truth.detach())
    for ours, theirs in zip(grads, alone, strict=True):
        assert_close(ours, theirs.grad)


def test_one_process_data_parallelism_rejects_uneven_rows():
    with pytest.raises(ValueError, match="batch: expected a multiple of 3 rows, got 8"):
        run(3, lambda c: data_parallel_step(c, nn.Linear(2, 2), torch.ones(8, 2), torch.sum))
