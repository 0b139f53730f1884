"""Oracles: one rank with the whole model; DTensor's parallelize_module on gloo."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from reference.parallel.ranks import run
from reference.parallel.tensor import parallelize, vocab_parallel_cross_entropy
from reference.transformer import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=32, dim=16, hidden_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=16
)
TOKENS = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]


def fresh(**changes):
    torch.manual_seed(1)
    model = Llama(dataclasses.replace(CONFIG, **changes)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def one_rank(model):
    logits = model(INPUTS)
    loss = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    loss.backward()
    return logits.detach(), loss.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    "world_size, num_kv_heads", [(1, 2), (2, 2), (4, 4), (4, 2), (4, 1), (2, 4)]
)
@pytest.mark.parametrize("is_tied", [False, True])
def test_matches_one_rank(world_size, num_kv_heads, sequence_parallel, is_tied):
    """Logits, loss and the gradient of every parameter, gathered."""
    model = fresh(num_kv_heads=num_kv_heads, is_tied=is_tied)

    def program(comm):
        part = parallelize(copy.deepcopy(model), comm, sequence_parallel=sequence_parallel)
        logits = part(INPUTS)
        losses = vocab_parallel_cross_entropy(logits, TARGETS, comm)
        losses.mean().backward()
        return (
            logits.detach(),
            losses.mean().detach(),
            part.whole(lambda p: p.grad),
            part.whole(lambda p: p),
        )

    logits, loss, grads = one_rank(copy.deepcopy(model))
    done = run(world_size, program, is_measured=False).results
    assert_close(torch.cat([r[0] for r in done], -1), logits, rtol=1e-10, atol=1e-10)
    for _, ours, found, weights in done:
        assert_close(ours, loss, rtol=1e-10, atol=1e-10)
        assert found.keys() == grads.keys()
        for name in grads:
            assert_close(found[name], grads[name], rtol=1e-9, atol=1e-10, msg=name)
        for name, p in model.named_parameters():
            assert torch.equal(weights[name], p), name


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_matches_dtensor(sequence_parallel):
    """The same weights on two gloo processes, parallelized by torch's own styles."""
    model = fresh()

    def theirs(comm):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            PrepareModuleInput,
            RowwiseParallel,
            SequenceParallel,
            parallelize_module,
        )

        mesh = init_device_mesh("cpu", (comm.size,))
        mlp = copy.deepcopy(model.layers[0].mlp)
        norm = nn.RMSNorm(16, eps=CONFIG.norm_eps).double()
        norm.weight = model.layers[0].post_attention_layernorm.weight
        whole = nn.ModuleDict({"norm": copy.deepcopy(norm), "mlp": mlp})
        plan = {
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        if sequence_parallel:
            plan |= {
                "norm": SequenceParallel(),
                "mlp": PrepareModuleInput(
                    input_layouts=Shard(1), desired_input_layouts=Replicate()
                ),
                "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            }
        parallelize_module(whole, mesh, plan)
        y = whole["mlp"](
            whole["norm"](x.chunk(comm.size, 1)[comm.rank] if sequence_parallel else x)
        )
        y = y.full_tensor() if sequence_parallel else y
        (y * weight).sum().backward()
        norm_grad = whole["norm"].weight.grad
        norm_grad = norm_grad.full_tensor() if sequence_parallel else norm_grad
        down = whole["mlp"].down_proj.weight.grad
        return y.detach(), down.full_tensor(), norm_grad

    def ours(comm):
        part = parallelize(copy.deepcopy(model), comm, sequence_parallel=sequence_parallel)
        block = part.layers[0]
        mine = x.chunk(comm.size, 1)[comm.rank] if sequence_parallel else x
        region = part.region
        y = region.leave(block.mlp(region.enter(block.post_attention_layernorm(mine))))
        here = weight.chunk(comm.size, 1)[comm.rank] if sequence_parallel else weight
        (y * here).sum().backward()
        y = y.detach()
        y = (
            comm.all_gather(y.transpose(0, 1).contiguous()).transpose(0, 1)
            if sequence_parallel
            else y
        )
        down = comm.all_gather(block.mlp.down_proj.weight.grad.T.contiguous()).T
        return y, down, block.post_attention_layernorm.weight.grad

    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(2, 2, 8, 16, generator=generator, dtype=torch.float64)
    done = run(2, lambda comm: (theirs(comm), ours(comm)), backend="processes", is_measured=False)
    for truth, found in done.results:
        for a, b in zip(found, truth, strict=True):
            assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_traffic_of_a_block_is_four_reductions(sequence_parallel):
    """Forward and backward of a block: 4 all-reduces of B T D, or the same bytes in halves."""
    model = fresh(num_layers=1)
    deep = fresh(num_layers=3)

    def sent(comm, model):
        part = parallelize(copy.deepcopy(model), comm, sequence_parallel=sequence_parallel)
        comm.traffic.reset()
        vocab_parallel_cross_entropy(part(INPUTS), TARGETS, comm).mean().backward()
        rows = {}
        for operation in ("all_reduce", "all_gather", "reduce_scatter"):
            row = comm.traffic.total(operation=operation)
            rows[operation] = row.num_calls, row.wire_bytes
        return rows

    n = 4
    shallow, more = (run(n, sent, m).results[0] for m in (model, deep))
    block = {k: [(b - a) / 2 for a, b in zip(shallow[k], more[k], strict=True)] for k in more}
    stream = 2 * 8 * 16 * 8
    ring = (n - 1) / n * stream
    shared_kv = 2 * 2 * (2 - 1) / 2 * 16 * 4 * 8  # gradients of k_proj and v_proj, in pairs
    if sequence_parallel:
        norms = 2 * 2 * (n - 1) / n * 16 * 8
        assert block["all_gather"] == [4, 4 * ring]
        assert block["reduce_scatter"] == [4, 4 * ring]
        assert block["all_reduce"] == [4, shared_kv + norms]
    else:
        assert block["all_reduce"] == [4 + 2, 4 * 2 * ring + shared_kv]
        assert block["all_gather"] == block["reduce_scatter"] == [0, 0]


def test_matches_processes():
    def program(comm):
        part = parallelize(fresh(), comm, sequence_parallel=True)
        loss = vocab_parallel_cross_entropy(part(INPUTS), TARGETS, comm).mean()
        loss.backward()
        return [loss.detach(), *(p.grad for p in part.parameters())]

    simulated, real = run(2, program), run(2, program, backend="processes")
    for ours, theirs in zip(simulated.results, real.results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "world_size, changes, message",
    [
        (3, {}, "vocab_size: expected a multiple of 3"),
        (3, {"vocab_size": 33}, "num_heads, num_kv_heads: expected 4 to be a multiple of 3"),
        (4, {"num_heads": 12, "num_kv_heads": 6, "head_dim": 2}, "and 6 a multiple or a divisor"),
        (4, {"hidden_dim": 22}, "out_features: expected a multiple of 4, .* got 22"),
    ],
)
def test_rejects_models_that_do_not_divide(world_size, changes, message):
    with pytest.raises(ValueError, match=message):
        run(world_size, lambda comm: parallelize(fresh(**changes), comm))


def test_rejects_texts_that_do_not_divide():
    def program(comm):
        parallelize(fresh(), comm, sequence_parallel=True)(INPUTS[:, :7])

    with pytest.raises(
        ValueError, match="expected dimension 1 to be a multiple of 2.*pad the text"
    ):
        run(2, program)
