"""Oracles: one rank on all rows; torch's DistributedDataParallel and ZeroRedundancyOptimizer."""

import copy
import math
import warnings

import pytest
import torch
from torch.testing import assert_close

from reference.parallel.ranks import run, run_one_rank
from reference.parallel.zero import Zero, elements_sent, model_states_bytes
from reference.transformer import Llama, LlamaConfig
from tests.reference.parallel.zero.workload import (
    adamw,
    batches,
    fresh,
    loss_of,
    one_rank,
    rows_of,
)
from tests.tolerances import TOLERANCE


def train(comm, stage, *, max_norm=None, model=None, num_micro=1, **options):
    model = model or fresh()
    zero = Zero(model, comm, stage, adamw, **options)
    for batch in batches():
        for rows in rows_of(comm, batch).chunk(num_micro):
            (loss_of(model, rows) / num_micro).backward()
        if max_norm is not None:
            zero.clip_grad_norm(max_norm)
        zero.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(ours, truth):
    assert ours.keys() == truth.keys()
    for name in truth:
        # Three AdamW steps from another order of summation: roundings of m and v add up.
        assert_close(ours[name], truth[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world_size, bucket_bytes", [(1, 1), (2, 2000), (3, 1), (4, 10**6)])
def test_matches_one_rank_on_all_rows(stage, world_size, bucket_bytes):
    done = run(
        world_size, lambda comm: train(comm, stage, bucket_bytes=bucket_bytes), is_measured=False
    )
    truth = one_rank()
    for ours in done.results:
        assert_same(ours, truth)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_matches_one_rank_with_clipping_and_accumulation(stage):
    truth = one_rank(max_norm=0.5)
    done = run(2, lambda comm: train(comm, stage, max_norm=0.5, num_micro=3, bucket_bytes=3000))
    assert_same(done.results[0], truth)
    assert_same(done.results[1], truth)


@pytest.mark.parametrize("stage", [1, 2])
def test_offload_gives_the_same_and_keeps_states_off_the_device(stage):
    kept, moved = (
        run(2, lambda comm, o=o: (train(comm, stage, offload=o), comm.memory.use.peak))
        for o in (False, True)
    )
    for (ours, at_device), (theirs, at_host) in zip(kept.results, moved.results, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert at_device["optimizer_states"] > 0 == at_host["optimizer_states"]
        assert at_host["host"] > 0 == at_device["host"]


def test_matches_torch_ddp_and_zero_redundancy_optimizer():
    """Bit for bit at two ranks: a sum of two has one order."""

    def theirs(comm):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its own use of torch.jit
            from torch.distributed.optim import ZeroRedundancyOptimizer
        from torch.nn.parallel import DistributedDataParallel

        model = DistributedDataParallel(fresh())
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), torch.optim.AdamW, lr=1e-2, weight_decay=0.1
        )
        for batch in batches():
            optimizer.zero_grad()
            loss_of(model, rows_of(comm, batch)).backward()
            optimizer.step()
        return {name: p.detach().clone() for name, p in model.module.named_parameters()}

    def program(comm):
        return theirs(comm), [train(comm, stage) for stage in (0, 1, 2)]

    for truth, stages in run(2, program, backend="processes", is_measured=False).results:
        for ours in stages:
            assert all(torch.equal(ours[name], truth[name]) for name in truth)


def test_simulated_ranks_equal_real_processes():
    def program(comm):
        return train(comm, 2, bucket_bytes=2000)

    simulated, real = run(2, program), run(2, program, backend="processes")
    for ours, theirs in zip(simulated.results, real.results, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert simulated.trace.total().wire_bytes == real.trace.total().wire_bytes


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_ledgers_equal_the_formulas(stage):
    """P divides by 4 in each bucket here, so that padding adds nothing."""

    def program(comm):
        model = fresh(torch.bfloat16, vocab_size=32)
        zero = Zero(model, comm, stage, adamw)
        for step, batch in enumerate(batches()):
            if step:
                comm.traffic.reset()
            loss_of(model, rows_of(comm, batch)).backward()
            if stage == 2:
                zero.reduce_gradients()
            if step:
                held = comm.memory.use.current
            zero.step()
        parameters = list(model.parameters())
        num_elements = sum(p.numel() for p in parameters)
        return len(parameters), num_elements, held, comm.traffic.total().wire_bytes

    world_size = 4
    for num_tensors, num_parameters, held, sent in run(world_size, program).results:
        expected = model_states_bytes(num_parameters, world_size, stage)
        scalars = 4 * num_tensors  # Adam's counts of steps
        assert held["parameters"] == expected.parameters
        assert held["gradients"] == expected.gradients
        assert held["optimizer_states"] == expected.optimizer_states + scalars
        # A byte for each parameter besides, all-reduced: who has used it.
        calls = 2 if stage == 2 else 1  # a second where reduction is asked for
        used = calls * 2 * (world_size - 1) / world_size * num_tensors
        assert sent - used == 2 * elements_sent(num_parameters, world_size, stage)


@pytest.mark.slow
def test_figure_1_of_zero_from_the_ledgers():
    """64 ranks, a Llama of nearly 7.5 billion parameters in bfloat16 with AdamW in float32."""
    config = LlamaConfig(
        vocab_size=32000, dim=8192, hidden_dim=28672, num_layers=7, num_heads=64, max_seq_len=64
    )

    def program(comm, stage):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = Llama(config)
        finally:
            torch.set_default_dtype(torch.float32)
        zero = Zero(model, comm, stage, adamw)
        for _ in range(2):
            loss_of(model, torch.zeros(1, 9, dtype=torch.long)).backward()
            if stage == 2:
                zero.reduce_gradients()
            held = comm.memory.use.current
            zero.step()
        states = ("parameters", "gradients", "optimizer_states")
        return sum(p.numel() for p in model.parameters()), sum(held[c] for c in states)

    for stage, printed in enumerate([120, 31.4, 16.6]):
        num_parameters, held = run_one_rank(64, program, stage).results[0]
        assert held * 7.5 / num_parameters == pytest.approx(printed, abs=0.05)


@pytest.mark.slow
def test_stage_2_frees_gradients_during_backward():
    """Stage 1 holds all gradients at once, stage 2 those of two buckets and all parts."""

    def peak_of_gradients(comm, stage):
        model = fresh(num_layers=6)
        zero = Zero(model, comm, stage, adamw, bucket_bytes=4000)
        for batch in batches():
            loss_of(model, rows_of(comm, batch)).backward()
            zero.step()
        largest = max(bucket.flat.nbytes for bucket in zero.buckets)
        total = sum(bucket.flat.nbytes for bucket in zero.buckets)
        return comm.memory.use.peak["gradients"], largest, total

    (first, _, total), (second, largest, _) = (
        run(4, peak_of_gradients, stage).results[0] for stage in (1, 2)
    )
    assert first >= total
    assert second <= total / 4 + 3 * largest < first


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_parameter_that_no_loss_reaches_stays_as_it_is(stage):
    def program(comm):
        model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 2), "idle": torch.nn.Linear(2, 2)})
        zero = Zero(model, comm, stage, adamw, bucket_bytes=1)
        before = copy.deepcopy(model["idle"].state_dict())
        model["used"](torch.ones(1, 3)).sum().backward()
        zero.step()
        after = model["idle"].state_dict()
        return all(torch.equal(before[name], after[name]) for name in before)

    assert all(run(2, program).results)


def test_ranks_start_from_rank_0():
    def program(comm):
        model = torch.nn.Linear(3, 2)
        Zero(model, comm, 1)
        return model.weight.detach().clone()

    weights = run(3, program).results
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("stage: expected 0, 1 or 2, got 3", {"stage": 3}),
        ("bucket_bytes: expected at least 1", {"stage": 1, "bucket_bytes": 0}),
    ],
)
def test_rejects(message, arguments):
    with pytest.raises(ValueError, match=message):
        run(2, lambda comm: Zero(fresh(), comm, **arguments))


def test_rejects_mixed_dtypes_and_norms():
    def mixed(comm):
        model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).double()])
        Zero(model, comm, 1)

    with pytest.raises(ValueError, match="expected parameters of one dtype"):
        run(2, mixed)
    with pytest.raises(ValueError, match="max_norm: expected more than 0"):
        run(2, lambda comm: Zero(fresh(), comm, 1).clip_grad_norm(0.0))


def test_clipping_returns_the_norm_of_the_whole_gradient():
    model = fresh()
    loss_of(model, batches()[0]).backward()
    truth = math.sqrt(sum(p.grad.double().square().sum() for p in model.parameters()))

    def program(comm):
        model = fresh()
        zero = Zero(model, comm, 2, adamw)
        loss_of(model, rows_of(comm, batches()[0])).backward()
        return zero.clip_grad_norm(1.0).item()

    for norm in run(3, program).results:
        assert norm == pytest.approx(truth, rel=TOLERANCE[torch.float32]["rtol"] * 10)
