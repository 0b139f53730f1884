"""The oracle: DeepSpeed's engine at ZeRO stages 1, 2 and 3, and its Ulysses, on two processes."""

import logging
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from reference.parallel.context import ulysses_attention
from reference.parallel.context.partial import Kernel
from reference.parallel.ranks import run
from reference.parallel.zero import FSDP, Zero
from tests.oracles import enter, needs
from tests.reference.parallel.zero.workload import ROWS, adamw, batches, fresh, loss_of, rows_of
from tests.tolerances import TOLERANCE
from tools.fetch_oracles import DEEPSPEED

pytestmark = [needs(DEEPSPEED), pytest.mark.slow]

MAX_NORM = 0.5
NUM_MICRO = 3
STAGES = (1, 2, 3)
HEADS = [(4, 4), (4, 2)]


def import_deepspeed(comm):
    rank, size = str(comm.rank), str(comm.size)
    os.environ.update(DS_ACCELERATOR="cpu", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size)
    enter(DEEPSPEED)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # A kernel that it would compile, for half a minute.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    return deepspeed


def config_of(stage, *, is_clipped):
    return {
        "train_micro_batch_size_per_gpu": ROWS // 2 // NUM_MICRO,
        "gradient_accumulation_steps": NUM_MICRO,
        "gradient_clipping": MAX_NORM if is_clipped else 0.0,
        # Its own linear layer at stage 3 sums in another order.
        "zero_optimization": {"stage": stage, "memory_efficient_linear": False},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True},
        },
    }


def train_theirs(deepspeed, comm, stage, *, is_clipped):
    """Parameters by name after all steps, and the norms of the gradients."""
    model, norms = fresh(), []
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=config_of(stage, is_clipped=is_clipped),
    )
    for batch in batches():
        for rows in rows_of(comm, batch).chunk(NUM_MICRO):
            engine.backward(loss_of(engine, rows))
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return {name: p.detach().clone() for name, p in model.named_parameters()}, norms


def train_ours(comm, stage, *, is_clipped):
    model, norms = fresh(), []
    if stage == 3:
        wrapped = FSDP(model, comm, model.layers)
        optimizer = adamw(wrapped.parameters())
    else:
        wrapped = optimizer = Zero(model, comm, stage, adamw)
    for batch in batches():
        for rows in rows_of(comm, batch).chunk(NUM_MICRO):
            (loss_of(wrapped if stage == 3 else model, rows) / NUM_MICRO).backward()
        norms.append(float(wrapped.clip_grad_norm(MAX_NORM if is_clipped else 1e9)))
        optimizer.step()
        model.zero_grad()
    if stage == 3:
        return wrapped.full_state_dict(), norms
    return {name: p.detach().clone() for name, p in model.named_parameters()}, norms


def draw(heads, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, 8, 4, generator=generator, dtype=torch.float64)


def positions_first(x):
    """(B, H, t, d) as DeepSpeed has it: (t, B, H, d)."""
    return x.permute(2, 0, 1, 3).contiguous()


def heads_first(x):
    return x.permute(1, 2, 0, 3)


def attend(q, k, v):
    q, k, v = (heads_first(x) for x in (q, k, v))
    return positions_first(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def ulysses(deepspeed, comm, heads):
    """(ours, theirs): this rank's positions of the output, and of the gradients."""
    from deepspeed.sequence.layer import DistributedAttention

    num_heads, num_kv_heads = heads
    shapes = zip((num_heads, num_kv_heads, num_kv_heads), range(3), strict=True)
    parts = [draw(h, seed).chunk(comm.size, 2)[comm.rank].contiguous() for h, seed in shapes]
    grad = draw(num_heads, 3).chunk(comm.size, 2)[comm.rank]
    ours = [part.clone().requires_grad_() for part in parts]
    out = ulysses_attention(*ours, comm, Kernel(layout="contiguous"))
    out.backward(grad)
    theirs = [positions_first(part).requires_grad_() for part in parts]
    layer = DistributedAttention(attend, deepspeed.comm.get_world_group())
    their_out = layer(*theirs, 1)
    their_out.backward(positions_first(grad))
    return (
        [out.detach(), *(x.grad for x in ours)],
        [heads_first(x) for x in (their_out.detach(), *(x.grad for x in theirs))],
    )


def program(comm):
    deepspeed = import_deepspeed(comm)
    found = {}
    for stage in STAGES:
        for is_clipped in (False, True):
            options = {"is_clipped": is_clipped}
            found[stage, is_clipped] = (
                train_ours(comm, stage, **options),
                train_theirs(deepspeed, comm, stage, **options),
            )
    return found | {heads: ulysses(deepspeed, comm, heads) for heads in HEADS}


@pytest.fixture(scope="module")
def results():
    return run(2, program, backend="processes", is_measured=False).results


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("is_clipped", [False, True])
def test_training_matches_deepspeed(results, stage, is_clipped):
    """Three steps of AdamW, each over three micro-batches. A sum of two has one order; but
    norms are summed over other pieces, and at stage 3 gradients in another order."""
    is_exact = stage < 3 and not is_clipped
    for found in results:
        (ours, our_norms), (theirs, their_norms) = found[stage, is_clipped]
        assert ours.keys() == theirs.keys()
        assert our_norms == pytest.approx(their_norms, rel=TOLERANCE[torch.float32]["rtol"])
        for name in theirs:
            # As for one rank: three steps of AdamW add up the roundings of m and v.
            tolerance = {"rtol": 0, "atol": 0} if is_exact else {"rtol": 2e-5, "atol": 2e-6}
            assert_close(ours[name], theirs[name], **tolerance)


@pytest.mark.parametrize("heads", HEADS)
def test_ulysses_matches_deepspeed(results, heads):
    for found in results:
        ours, theirs = found[heads]
        assert_close(ours, theirs, **TOLERANCE[torch.float64])
