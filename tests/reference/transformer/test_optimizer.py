import copy

import pytest
import torch
from torch import nn

from reference.transformer.optimizer import AdamW, clip_gradients, decay_groups


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matches_torch_bit_for_bit(dtype, weight_decay):
    ours, x = (
        network(dtype),
        torch.randn(16, 6, generator=torch.Generator().manual_seed(1)).to(dtype),
    )
    theirs = copy.deepcopy(ours)
    options = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    optimizers = [
        AdamW(ours.parameters(), **options),
        torch.optim.AdamW(theirs.parameters(), foreach=False, fused=False, **options),
    ]
    for _ in range(10):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_decay_is_decoupled_from_the_gradient():
    """Weights without a gradient decay by the same factor; with L2 Adam would divide it away."""
    weights = nn.Parameter(torch.ones(2, 1))
    optimizer = AdamW([weights], lr=0.1, weight_decay=0.5)
    weights.grad = torch.tensor([[0.0], [0.0]])
    optimizer.step()
    assert torch.allclose(weights, torch.tensor(0.95))


def test_parameters_without_a_gradient_stay():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdamW([used, unused], lr=0.1)
    used.sum().backward()
    optimizer.step()
    assert (unused == 1).all() and (used < 1).all()


def test_a_closure_is_called_with_gradients():
    weight = nn.Parameter(torch.ones(1))
    optimizer = AdamW([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 1.0 and weight < 1


def test_groups_spare_vectors():
    decayed, spared = decay_groups(network(), 0.1)
    assert [p.ndim for p in decayed["params"]] == [2, 2] and decayed["weight_decay"] == 0.1
    assert {p.ndim for p in spared["params"]} == {1} and spared["weight_decay"] == 0.0


@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_clipping_matches_torch(max_norm):
    ours = network()
    ours(torch.randn(4, 6)).square().sum().backward()
    theirs = copy.deepcopy(ours)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        b.grad = a.grad.clone()
    norm = clip_gradients(ours.parameters(), max_norm)
    assert norm == nn.utils.clip_grad_norm_(theirs.parameters(), max_norm, foreach=False).item()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_clipping_nothing():
    assert clip_gradients(network().parameters(), 1.0) == 0.0


def test_rejects_rates():
    weight = nn.Parameter(torch.ones(1))
    for options, message in (
        ({"lr": -1.0}, "lr, eps, weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamW([weight], **options)
    with pytest.raises(ValueError, match="max_norm: expected more than 0"):
        clip_gradients([weight], 0.0)


def test_one_tensor_matches_torch():
    """A tensor can be iterated over, and its rows have no gradient: nothing would be clipped."""
    ours, theirs = (torch.nn.Parameter(torch.zeros(3, 4)) for _ in range(2))
    ours.grad, theirs.grad = (torch.full((3, 4), 10.0) for _ in range(2))
    norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert clip_gradients(ours, 1.0) == pytest.approx(norm.item())
    assert torch.equal(ours.grad, theirs.grad)
