"""Oracles: the plain call, bit by bit; torch.utils.checkpoint."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from reference.attention.dot_product import dropout
from reference.parallel.pipeline import recompute, recomputed
from reference.parallel.ranks import run
from tests.reference.parallel.pipeline.recomputation import equal, network, plain, torchs


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


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_matches_the_plain_call_with_generators(p):
    """One that is passed in, one that the function holds, one that it makes itself; twice each."""
    found = []
    for call in (plain, recompute):
        held, given = (torch.Generator().manual_seed(seed) for seed in (1, 2))

        def noisy(x, generator, held=held):
            own = torch.Generator().manual_seed(3)
            x = dropout(x.tanh(), p, held) + dropout(x, p, generator)
            return x * torch.empty_like(x).normal_(0, 1, generator=own) + dropout(x, p, held)

        x = torch.ones(50, requires_grad=True)
        y = call(noisy, x, given)
        torch.rand(3, generator=held)  # somebody else goes on drawing
        y.square().sum().backward()
        found.append([y.detach(), x.grad, held.get_state(), given.get_state()])
    assert equal(*found)


class Pair(NamedTuple):
    first: torch.Tensor
    rest: dict


def test_matches_any_structure_of_arguments_and_results():
    """Tensors in keywords, lists and dicts; results in a tuple with a name and a None."""

    def function(x, parts, *, scale, weights, flag):
        y = (x * scale).exp() * parts[0].sin() if flag else x
        return Pair(y, {"rest": [parts[1].cos() * weights["w"], None, x]})

    found = []
    for call in (plain, recompute):
        x, a, b, scale, w = (torch.randn(3, generator=torch.Generator().manual_seed(i))
                             .requires_grad_() for i in range(5))  # fmt: skip
        out = call(function, x, [a, b], scale=scale, weights={"w": w}, flag=True)
        assert isinstance(out, Pair) and out.rest["rest"][1] is None
        (
            out.first.sum() + out.rest["rest"][0].square().sum() + out.rest["rest"][2].sum()
        ).backward()
        found.append([t.grad for t in (x, a, b, scale, w)])
    assert equal(*found)


def test_matches_frozen_inputs_parameters_and_layers():
    """LoRA's case: neither the input nor the first layer wants a gradient; and nobody at all."""
    for frozen in ((), (0,), (0, 3)):
        found = []
        for call in (plain, recompute, torchs):
            model, x = network().eval(), torch.ones(4, 8)
            for i in frozen:
                model[i].requires_grad_(False)
            y = call(model, x)
            assert y.requires_grad == (len(frozen) < 2)
            if y.requires_grad:
                y.square().sum().backward()
            found.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert equal(found[0], found[1]) and equal(found[0], found[2])


def test_invariant_backward_twice_and_of_a_part():
    for function in (lambda x, w: (x * w).exp().tanh(), lambda x, w: torch.softmax(x * w, -1)):
        found = []
        for call in (plain, recompute):
            x, w = (torch.linspace(0, 1, 6, requires_grad=True) for _ in range(2))
            y = call(function, x, w)
            first = torch.autograd.grad(y.sum(), x, retain_graph=True)
            both = torch.autograd.grad(y.square().sum(), (x, w), retain_graph=True)
            (y + y.detach()).prod().backward()
            found.append([*first, *both, x.grad, w.grad])
        assert equal(*found)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.sum().backward()


def test_matches_second_derivatives():
    found = []
    for call in (plain, recompute):
        x = torch.linspace(0.1, 1, 5, dtype=torch.float64).requires_grad_()
        (grad,) = torch.autograd.grad(
            call(lambda x: x.exp() * x.sin(), x).sum(), x, create_graph=True
        )
        found.append(torch.autograd.grad(grad.square().sum(), x))
    assert equal(*found)


def test_matches_a_function_used_twice_and_a_result_used_twice():
    found = []
    for call in (plain, recompute):
        model, x = network(), torch.ones(2, 8, requires_grad=True)
        torch.manual_seed(0)
        y = call(model, x)
        z = call(model, y) + y * call(model, y)
        z.sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters())])
    assert equal(*found)


def test_forgets_what_a_partial_backward_has_left():
    """Of a retained graph nothing but numbers stays after each backward."""

    def program(comm):
        x = torch.ones(1000, requires_grad=True)
        y = recompute(lambda x: x.exp().exp().exp().sum(), x)
        held = comm.memory.use.current["activations"]
        for _ in range(2):
            torch.autograd.grad(y, x, retain_graph=True)
        return comm.memory.use.current["activations"] - held

    assert run(1, program).results == [0]


def test_rejects_a_second_run_that_does_something_else():
    count = []

    def longer(x):
        count.append(1)
        return x.exp().tanh() if len(count) > 1 else x.exp()

    def wider(x):
        count.append(1)
        return (torch.cat([x, x]) if len(count) > 1 else x).exp()

    def other(x):
        count.append(1)
        return (x.double() if len(count) > 1 else x).exp().float()

    for function, words in (
        (longer, "longer: expected to save 1 tensors again, got 2"),
        (wider, r"wider: expected to save \(3,\) float32 on cpu again, got \(6,\) float32"),
        (other, r"other: expected to save \(3,\) float32 on cpu again, got \(3,\) float64"),
    ):
        count.clear()
        y = recompute(function, torch.ones(3, requires_grad=True))
        with pytest.raises(RuntimeError, match=words):
            y.sum().backward()


def test_rejects_changes_between_forward_and_backward():
    """As the plain call does; torch.utils.checkpoint takes the new parameters."""
    for call, learns in ((plain, True), (recompute, True), (plain, False), (recompute, False)):
        layer = nn.Linear(2, 2).requires_grad_(learns)
        x = torch.ones(1, 2, requires_grad=True)
        y = call(layer, x.clone())
        with torch.no_grad():
            layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="in.?place"):
            y.sum().backward()
        z = x.clone()
        y = call(torch.exp, z) if call is recompute else call(lambda z: z * z, z)
        with torch.no_grad():
            z.mul_(2)
        with pytest.raises(RuntimeError, match="inplace"):
            y.sum().backward()
