"""Oracles: torch.utils.checkpoint; the plain call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from reference.parallel.pipeline import recompute, recomputed
from reference.parallel.ranks import run


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.GELU(), nn.Linear(16, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_matches_torch_checkpoint_with_dropout(dtype):
    found = []
    for call in (recompute, lambda f, x: checkpoint(f, x, use_reentrant=False), lambda f, x: f(x)):
        model = network().to(dtype)
        x = torch.ones(4, 8, dtype=dtype, requires_grad=True)
        torch.manual_seed(9)
        y = call(model, x)
        after = torch.rand(3)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, after, *(p.grad for p in model.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_invariant_the_backward_leaves_the_random_state_alone():
    x = torch.ones(4, 8, requires_grad=True)
    y = recompute(network(), x)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_matches_attention_with_several_inputs_and_none():
    q, k, v = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(
        F.scaled_dot_product_attention(q, k, v, None).square().sum(), (q, k, v)
    )
    out = recomputed(F.scaled_dot_product_attention)(q, k, v, None)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_keeps_the_input_alone():
    """Of a chain of eight tanh, the plain call keeps eight results."""

    def chain(x):
        for _ in range(8):
            x = x.tanh()
        return x

    def program(comm, is_forgetful):
        x = torch.ones(1000, requires_grad=True)
        y = recompute(chain, x) if is_forgetful else chain(x)
        return comm.memory.use.current["activations"] // 4000, y.shape

    kept = [run(1, program, flag).results[0][0] for flag in (False, True)]
    assert kept == [9, 2]


def test_works_without_gradients():
    with torch.no_grad():
        assert recompute(torch.tanh, torch.zeros(2)).tolist() == [0, 0]


def test_rejects_inputs_without_gradient():
    with pytest.raises(ValueError, match="inputs: expected one that requires a gradient"):
        recompute(network(), torch.ones(4, 8))
