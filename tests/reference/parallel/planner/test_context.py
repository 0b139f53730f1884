"""Context parallelism of this course on the simulated machine, beside the plan."""

import pytest
import torch

from reference.parallel.context import ContextParallel
from reference.parallel.planner import Batch, Plan, memory_bytes, step_seconds
from tests.reference.parallel.planner.workload import SHAPE, fresh, machine, simulated

SEQ_LEN = 2048


def test_matches_the_clock_and_the_ledger_of_a_ring():
    """Two zigzag parts of one text; the clock up to the sum of gradients.

    To 15 %: tiles on the diagonal are computed whole, and the loss is not one of 14 bytes a logit.
    """

    def program(comm):
        context = ContextParallel(comm, layout="zigzag", block_size=512)
        model, ids = fresh(), torch.zeros(1, SEQ_LEN, dtype=torch.long)
        comm.memory.reset_peak()
        logits = context.logits(model, context.part(ids))
        context.loss(logits, context.part(ids)).backward()
        return comm.now_seconds, comm.memory.use.peak["activations"]

    seconds, activations = simulated(2, program).results[0]
    plan, batch = Plan(context=2), Batch(1, SEQ_LEN)
    step = step_seconds(SHAPE, plan, machine(2), batch)
    assert step.total - step.data == pytest.approx(seconds, rel=0.15)
    ours = memory_bytes(SHAPE, plan, batch).activations
    assert ours == pytest.approx(activations, rel=0.15)
