"""Recomputation with others: autocast, itself and torch's, batch norm, DDP, tensor parallelism.

Oracles: the plain call, bit by bit; torch.utils.checkpoint.
"""

import copy
import functools

import pytest
import torch
from torch import nn

from reference.mixed_precision import Autocast
from reference.parallel.data_parallel import DDP, SyncBatchNorm
from reference.parallel.pipeline import recompute
from reference.parallel.ranks import run
from reference.parallel.tensor import parallelize
from reference.transformer import Llama, LlamaConfig
from tests.reference.parallel.pipeline.recomputation import equal, network, plain, torchs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_torchs", [False, True])
@pytest.mark.parametrize("is_backward_inside", [False, True])
def test_matches_the_plain_call_under_autocast(dtype, is_torchs, is_backward_inside):
    """torch's and this course's; backward within the block, and after it as it should be."""
    found = []
    for call in (plain, recompute):
        model = network()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(9)
        context = torch.autocast("cpu", dtype) if is_torchs else Autocast(dtype)
        with context:
            y = call(model, x)
            loss = y.float().square().sum()
            if is_backward_inside:
                loss.backward()
        if not is_backward_inside:
            loss.backward()
        assert torch.is_autocast_enabled("cpu") is False
        found.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
    assert equal(*found)


@pytest.mark.parametrize("depth", [2, 3])
def test_matches_recompute_inside_recompute(depth):
    """With dropout; inner calls keep nothing while the outer one waits: memory of one input."""

    def nested(call, layers, x):
        if len(layers) == 1:
            return call(layers[0], x)
        return call(lambda y: nested(call, layers[1:], layers[0](y).tanh()), x)

    def program(comm):
        found = []
        for call in (plain, recompute):
            torch.manual_seed(3)
            layers = [nn.Sequential(nn.Linear(250, 250), nn.Dropout(0.3)) for _ in range(depth)]
            x = torch.ones(4, 250, requires_grad=True)
            comm.memory.label([*layers, x], "parameters")
            before = comm.memory.use.current["activations"]
            torch.manual_seed(4)
            y = nested(call, layers, x)
            held = comm.memory.use.current["activations"] - before
            y.square().sum().backward()
            weights = [p.grad for layer in layers for p in layer.parameters()]
            found.append(([y.detach(), x.grad, *weights], held // 4000))
        return found

    (expected, _), (grads, held) = run(1, program).results[0]
    assert equal(grads, expected) and held == 1  # the result; the input is the caller's


@pytest.mark.parametrize("outer, inner", [(recompute, torchs), (torchs, recompute)])
def test_matches_with_torchs_around_or_inside(outer, inner):
    found = []
    for around, inside in ((plain, plain), (outer, inner)):
        model, drop = network(), nn.Dropout(0.4)
        x = torch.ones(3, 8, requires_grad=True)
        torch.manual_seed(3)
        y = around(lambda x, f=inside, m=model, d=drop: d(f(m, x).exp() + f(m, x.sin())), x)
        y.sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
    assert equal(*found)


def test_matches_a_function_that_differentiates():
    """A gradient penalty runs a backward of its own, in both runs."""

    def penalty(x):
        (grad,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
        return grad.square()

    found = []
    for call in (plain, recompute):
        x = torch.linspace(0.1, 1, 4, requires_grad=True)
        call(penalty, x * 1).sum().backward()
        found.append([x.grad])
    assert equal(*found)


@pytest.mark.parametrize("options", [{}, {"momentum": None}])
def test_invariant_running_statistics_see_a_batch_once(options):
    """torch.utils.checkpoint updates them twice (pytorch#96136)."""

    def program(comm, kind):
        found = []
        for call in (plain, recompute):
            torch.manual_seed(1)
            norm = nn.BatchNorm1d(3, **options)
            model = nn.Sequential(
                nn.Linear(3, 3), norm if kind == "torch" else SyncBatchNorm(norm, comm)
            )
            x = torch.randn(4, 3) + comm.rank
            for _ in range(2):
                y = call(model, x)
                y.square().mean().backward()
            buffers = list(norm.buffers())
            assert buffers[2] == 2
            found.append([*buffers, y.detach(), *(p.grad for p in model.parameters())])
        return equal(*found)

    assert run(1, program, "torch").results == [True]
    assert run(2, program, "synchronised").results == [True] * 2


def test_matches_under_ddp_and_with_collectives_inside():
    """DDP's callback at the end of backward sees one backward; a tensor parallel block's second run
    communicates again."""
    config = LlamaConfig(vocab_size=16, dim=8, hidden_dim=16, num_layers=1, num_heads=2,
                         num_kv_heads=2, max_seq_len=8)  # fmt: skip

    def program(comm):
        mesh = comm.mesh(dp=2, tp=2)
        found, calls = [], []
        for call in (plain, recompute):
            torch.manual_seed(0)
            model = DDP(parallelize(Llama(config), mesh.tp), mesh.dp, bucket_bytes=256)
            tokens = torch.arange(8)[None] + mesh.dp.rank
            block = model.module.layers[0]
            block.forward = functools.partial(call, block.forward)
            before = mesh.tp.traffic.total().num_calls
            model(tokens).square().sum().backward()
            calls.append(mesh.tp.traffic.total().num_calls - before)
            found.append([p.grad for p in model.parameters()])
        return equal(*found), calls[1] - calls[0]

    for is_equal, more in run(4, program).results:
        assert is_equal and more == 2  # forward's two all-reduces of a block


def test_matches_a_transformer_with_checkpointing_under_lora():
    """transformers' case: dropout, a frozen base, an adapter that learns."""
    found = []
    for call in (plain, recompute, torchs):
        model = copy.deepcopy(network())
        model[0].requires_grad_(False)
        torch.manual_seed(5)
        down = nn.Parameter(torch.randn(8, 2))
        y = call(lambda x, model=model, down=down: model(x @ down @ down.T), torch.ones(3, 8))
        y.sum().backward()
        found.append([y.detach(), down.grad, torch.rand(2)])
    assert equal(found[0], found[1]) and equal(found[0], found[2])
