"""Oracles: one rank on the whole batch; torch.distributed.pipelining on gloo; the formulas."""

import contextlib
import io
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from reference.parallel.pipeline import (
    Pipeline,
    bubble_seconds,
    gpipe,
    one_f_one_b,
    peak_in_flight,
    split_llama,
    sum_tied_gradients,
    zero_bubble_h1,
)
from reference.parallel.ranks import CLASSROOM, run
from tests.reference.parallel.pipeline.workload import (
    SCHEDULES,
    batch,
    fresh,
    gradients,
    loss_of,
    losses_of,
    one_rank,
)
from tests.tolerances import TOLERANCE

TOL = TOLERANCE[torch.float32]


def step(comm, make, num_micro, *, recompute="none", **changes):
    schedule = make(comm.size, num_micro)
    stages = split_llama(fresh(**changes), comm.rank, comm.size, recompute=recompute,
                         num_chunks=schedule.num_chunks)  # fmt: skip
    loss = Pipeline(comm, stages, schedule, losses_of).step(*batch())
    sum_tied_gradients(comm, stages)
    found = {}
    for stage in stages:
        found |= gradients(stage)
    return loss, found


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("world_size, num_micro", [(1, 2), (2, 2), (2, 8), (4, 4)])
def test_matches_one_rank(name, world_size, num_micro):
    changes = {"num_layers": 8} if world_size == 4 else {}
    loss, truth = one_rank(**changes)
    done = run(world_size, step, SCHEDULES[name], num_micro) if not changes else run(
        world_size, lambda comm: step(comm, SCHEDULES[name], num_micro, **changes))  # fmt: skip
    found = {}
    for theirs, part in done.results:
        found |= part
        if theirs is not None:
            assert_close(theirs, loss, **TOL)
    assert found.keys() == truth.keys()
    for key in truth:
        assert_close(found[key], truth[key], **TOL, msg=key)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", SCHEDULES)
def test_matches_one_rank_with_tied_embeddings(name, world_size):
    _, truth = one_rank(is_tied=True)
    done = run(world_size, lambda comm: step(comm, SCHEDULES[name], 4, is_tied=True))
    for _, found in done.results:
        for key in found:
            assert_close(found[key], truth[key], **TOL, msg=key)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("is_empty", [False, True])
def test_matches_one_rank_where_micro_batches_count_different_numbers(name, is_empty):
    """A mean of the micro-batches' means is another number (torchtitan#2206), and NaN where a
    micro-batch counts nothing."""
    tokens, targets = batch()
    for row in range(8):
        targets[row, : row + 1] = -100
    if is_empty:
        targets[:] = -100
    model = fresh()
    losses = losses_of(model(tokens), targets)
    truth = losses.sum() / (targets != -100).sum().clamp(min=1)
    truth.backward()

    def program(comm):
        schedule = SCHEDULES[name](comm.size, 4)
        stages = split_llama(fresh(), comm.rank, comm.size, num_chunks=schedule.num_chunks)
        loss = Pipeline(comm, stages, schedule, losses_of).step(tokens, targets)
        return loss, [(n.removeprefix("model."), p.grad)
                      for s in stages for n, p in s.named_parameters()]  # fmt: skip

    expected = dict(model.named_parameters())
    for loss, found in run(2, program, is_measured=False).results:
        if loss is not None:
            assert_close(loss, truth.detach(), **TOL)
        for key, grad in found:
            assert_close(grad, expected[key].grad, **TOL, msg=key)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputation_changes_no_bit(name, kind):
    plain = run(2, step, SCHEDULES[name], 4, is_measured=False)
    again = run(2, lambda comm: step(comm, SCHEDULES[name], 4, recompute=kind), is_measured=False)
    for (_, ours), (_, theirs) in zip(again.results, plain.results, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def torch_step(comm, name, num_micro):
    """The same stages under torch's runtime."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.pipelining import (
            PipelineStage,
            Schedule1F1B,
            ScheduleGPipe,
            ScheduleInterleaved1F1B,
            ScheduleInterleavedZeroBubble,
        )

        chosen = {
            "GPipe": ScheduleGPipe,
            "1F1B": Schedule1F1B,
            "interleaved": ScheduleInterleaved1F1B,
            "ZB-H1": ScheduleInterleavedZeroBubble,
        }[name]
        num_chunks = 2 if "Interleaved" in chosen.__name__ else 1
        modules = split_llama(fresh(), comm.rank, comm.size, num_chunks=num_chunks)
        stages = [
            PipelineStage(module, comm.rank + chunk * comm.size, num_chunks * comm.size,
                          torch.device("cpu"))
            for chunk, module in enumerate(modules)
        ]  # fmt: skip
        schedule = chosen(stages if num_chunks > 1 else stages[0], num_micro, loss_fn=loss_of)
        tokens, targets = batch()
        losses: list[torch.Tensor] = []
        first = (tokens,) if comm.rank == 0 else ()
        last = comm.rank == comm.size - 1
        options = {"target": targets, "losses": losses} if last else {}
        with contextlib.redirect_stdout(io.StringIO()):
            schedule.step(*first, **options)
    found = {}
    for module in modules:
        found |= gradients(module)
    return (torch.stack(losses).mean().detach() if last else None), found


@pytest.mark.parametrize("name", SCHEDULES)
def test_matches_torch_pipelining_on_gloo(name):
    done = run(
        2,
        lambda comm: (step(comm, SCHEDULES[name], 4), torch_step(comm, name, 4)),
        backend="processes",
        is_measured=False,
    )
    ours, theirs = {}, {}
    for (loss, found), (their_loss, their_found) in done.results:
        if loss is not None:
            assert_close(loss, their_loss, **TOL)
        ours |= found
        theirs |= their_found
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert_close(ours[key], theirs[key], **TOL, msg=key)


@pytest.mark.parametrize("name", SCHEDULES)
def test_simulated_ranks_equal_real_processes(name):
    simulated = run(2, step, SCHEDULES[name], 4)
    real = run(2, step, SCHEDULES[name], 4, backend="processes")
    for (_, ours), (_, theirs) in zip(simulated.results, real.results, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert simulated.trace.total().wire_bytes == real.trace.total().wire_bytes


class Square(nn.Module):
    """F = B = W to the FLOP: two products, and a tanh."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh(),
                                   nn.Linear(width, width, bias=False))  # fmt: skip

    def forward(self, x):
        return self.inner(x)


def squares(comm, make, num_micro, width=256, *, input_gradient=True):
    schedule = make(comm.size, num_micro)
    stages = [Square(width) for _ in range(schedule.num_chunks)]
    pipeline = Pipeline(
        comm, stages, schedule, lambda y, t: (y - t).square(), like=torch.empty_like
    )
    x = torch.randn(num_micro * 8, width, requires_grad=input_gradient)
    comm.memory.reset_peak()
    before = comm.memory.use.current["activations"]
    pipeline.step(x, x.detach())
    return comm.memory.use.peak["activations"] - before


FAST = CLASSROOM.__class__(**{**CLASSROOM.__dict__, "flops_per_second": 1e9,
                              "intra": CLASSROOM.intra.__class__(1e-9, 1e15)})  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_ranks, num_micro", [(2, 4), (4, 8)])
def test_clock_shows_the_bubbles_of_the_formulas(name, num_ranks, num_micro):
    trace = run(num_ranks, squares, SCHEDULES[name], num_micro, hardware=FAST).trace
    busy = trace.busy_seconds(1)
    one = busy / num_micro / 3
    schedule = SCHEDULES[name](num_ranks, num_micro)
    times = {"forward": one, "backward": 2 * one}
    if schedule.is_split:
        times = {"forward": one, "backward": one, "weight": one}
    bubble = bubble_seconds(name, num_ranks, num_chunks=schedule.num_chunks, **times)
    assert trace.seconds - busy == pytest.approx(bubble, rel=0.01)


@pytest.mark.parametrize("make", [gpipe, one_f_one_b, zero_bubble_h1])
def test_ledger_shows_activations_of_the_micro_batches_in_flight(make):
    """What grows with m is what is kept for one: GPipe m of them, 1F1B and ZB-H1 no more."""
    few, many = (
        run(2, lambda comm, m=m: squares(comm, make, m, input_gradient=False), hardware=FAST)
        for m in (4, 12)
    )
    one = 8 * 256 * 4
    for rank in range(2):
        growth = peak_in_flight(make(2, 12), rank) - peak_in_flight(make(2, 4), rank)
        kept = 2 + rank  # tanh's result and the output; the last keeps its input and the error
        measured = (many.results[rank] - few.results[rank]) / one
        assert measured == pytest.approx(kept * growth, abs=0.02)


def test_rejects_what_does_not_fit():
    def program(comm, schedule, chunks=1, rows=4):
        pipeline = Pipeline(comm, [Square(4)] * chunks, schedule, losses_of, like=torch.empty_like)
        pipeline.step(torch.ones(rows, 4), torch.ones(rows, 4))

    with pytest.raises(ValueError, match="schedule: expected one for 2 ranks, got 3"):
        run(2, program, gpipe(3, 4))
    with pytest.raises(ValueError, match="stages: expected 1, the schedule's chunks, got 2"):
        run(2, program, gpipe(2, 4), 2)
    with pytest.raises(ValueError, match="expected a multiple of 4 micro-batches, got 6"):
        run(2, program, gpipe(2, 4), 1, 6)

    def mean_of(comm):
        pipeline = Pipeline(comm, [Square(4)], gpipe(1, 2), nn.functional.mse_loss)
        pipeline.step(torch.ones(4, 4), torch.ones(4, 4))

    with pytest.raises(ValueError, match="losses: expected one for each of the targets, 8 of"):
        run(1, mean_of)


def test_rejects_a_stream_of_unknown_shape():
    def program(comm):
        stages = [Square(4)]
        Pipeline(comm, stages, gpipe(2, 1), lambda y, t: y.sum()).step(
            torch.ones(1, 4), torch.ones(1, 4)
        )

    with pytest.raises(ValueError, match="like: expected a function"):
        run(2, program)
